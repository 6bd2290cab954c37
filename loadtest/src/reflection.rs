//! The message of a gRPC call, from JSON: its type comes from the server, by reflection.
//!
//! Invariant: the server is asked before the load, once for each file of descriptors, and what it
//! may answer is bounded.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::{Buf, Bytes};
use http::HeaderMap;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor};
use prost_types::FileDescriptorProto;
use tokio::task::JoinSet;

use crate::http2::Shared;
use crate::target::{Call, Target};

/// The current name of the service, and the one before it.
const SERVICES: [&str; 2] = [
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer to one question.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Most files of descriptors.
const FILES_MAX: usize = 1_000;
/// What gRPC says of a method that is not there.
const UNIMPLEMENTED: u16 = 12;

#[derive(Clone, PartialEq, prost::Message)]
struct Question {
    #[prost(oneof = "Asked", tags = "3, 4")]
    asked: Option<Asked>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Asked {
    #[prost(string, tag = "3")]
    FileByName(String),
    #[prost(string, tag = "4")]
    FileOfSymbol(String),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Reply {
    #[prost(oneof = "Told", tags = "4, 7")]
    told: Option<Told>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Told {
    #[prost(message, tag = "4")]
    Files(Files),
    #[prost(message, tag = "7")]
    Refusal(Refusal),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Files {
    #[prost(bytes = "vec", repeated, tag = "1")]
    encoded: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Refusal {
    #[prost(string, tag = "2")]
    message: String,
}

/// The encoded message of `call`, which names a method, from `json`.
///
/// # Errors
///
/// When the server has no reflection, does not know the method, or the JSON is not its message.
pub(crate) async fn message(call: &Call, json: &str) -> anyhow::Result<Bytes> {
    let name = call.grpc_method.as_deref().unwrap_or_default();
    let method = method(call, name).await?;
    ensure!(
        !method.is_client_streaming() && !method.is_server_streaming(),
        "{name} streams; only unary methods can be called"
    );
    let kind = method.input();
    let wrong = || format!("--grpc-data is no {}", kind.full_name());
    let mut reader = serde_json::Deserializer::from_str(json);
    let message = DynamicMessage::deserialize(kind.clone(), &mut reader).with_context(wrong)?;
    reader.end().with_context(wrong)?;
    Ok(message.encode_to_vec().into())
}

async fn method(call: &Call, name: &str) -> anyhow::Result<MethodDescriptor> {
    let (service, method) = name
        .trim_start_matches('/')
        .split_once('/')
        .context("--grpc-method is not package.Service/Method")?;
    let files = files_of(call, service).await?;
    let mut pool = DescriptorPool::new();
    pool.add_file_descriptor_protos(files)
        .context("the server's descriptors do not fit together")?;
    let found = pool
        .get_service_by_name(service)
        .with_context(|| format!("the server knows no service {service}"))?;
    let named = found.methods().find(|known| known.name() == method);
    named.with_context(|| {
        let known: Vec<String> = found
            .methods()
            .map(|known| known.name().to_owned())
            .collect();
        format!(
            "{service} has no method {method}; it has {}",
            known.join(", ")
        )
    })
}

/// The file that declares `service`, and all that it imports.
async fn files_of(call: &Call, service: &str) -> anyhow::Result<Vec<FileDescriptorProto>> {
    let mut reflection = Reflection::open(call).await?;
    let mut files = BTreeMap::new();
    let mut missing = vec![Asked::FileOfSymbol(service.to_owned())];
    while let Some(asked) = missing.pop() {
        if matches!(&asked, Asked::FileByName(name) if files.contains_key(name)) {
            continue;
        }
        let told = match well_known(&asked) {
            Some(file) => vec![file],
            None => reflection.ask(asked).await?,
        };
        for file in told {
            let imports = file.dependency.iter().cloned();
            missing.extend(imports.map(Asked::FileByName));
            files.insert(file.name().to_owned(), file);
        }
        ensure!(
            files.len() <= FILES_MAX,
            "the server's descriptors are in more than {FILES_MAX} files"
        );
    }
    Ok(files.into_values().collect())
}

/// Google's own files, which not every server serves.
fn well_known(asked: &Asked) -> Option<FileDescriptorProto> {
    let Asked::FileByName(name) = asked else {
        return None;
    };
    let file = DescriptorPool::global().get_file_by_name(name)?;
    Some(file.file_descriptor_proto().clone())
}

/// A connection on which questions are asked, each in a call of its own.
struct Reflection {
    call: Call,
    connection: Shared,
}

impl Reflection {
    async fn open(call: &Call) -> anyhow::Result<Self> {
        let call = Call {
            headers: HeaderMap::new(),
            grpc_method: Some(SERVICES[0].to_owned()),
            ..call.clone()
        };
        let target = Target::prepare(&call).await?;
        let tasks = Rc::new(RefCell::new(JoinSet::new()));
        let connection = Shared::open(&target, TIMEOUT, tasks).await?;
        Ok(Self { call, connection })
    }

    async fn ask(&mut self, asked: Asked) -> anyhow::Result<Vec<FileDescriptorProto>> {
        let what = match &asked {
            Asked::FileByName(name) | Asked::FileOfSymbol(name) => name.clone(),
        };
        let question = Question { asked: Some(asked) };
        self.call.body = question.encode_to_vec().into();
        let mut told = self.send().await?;
        if told.0 == Some(UNIMPLEMENTED) {
            self.call.grpc_method = Some(SERVICES[1].to_owned());
            told = self.send().await?;
        }
        let (status, body) = told;
        match status {
            Some(0) => {}
            Some(UNIMPLEMENTED) => {
                bail!("the server has no reflection; give the encoded message with --body-file")
            }
            Some(status) => bail!("the server does not describe {what} (grpc-status {status})"),
            None => bail!("the server's reflection answers without grpc-status"),
        }
        match reply(body)?.told {
            Some(Told::Files(files)) => {
                let files = files.encoded.iter();
                let files = files.map(|file| FileDescriptorProto::decode(file.as_slice()));
                let files: Result<Vec<_>, _> = files.collect();
                files.with_context(|| format!("the server's descriptor of {what} is damaged"))
            }
            Some(Told::Refusal(refusal)) => {
                bail!("the server does not describe {what}: {}", refusal.message)
            }
            None => bail!("the server says nothing of {what}"),
        }
    }

    /// The status of the answer, and its body.
    async fn send(&self) -> anyhow::Result<(Option<u16>, Bytes)> {
        let target = Target::prepare(&self.call).await?;
        let mut body = Vec::new();
        let mut keep = |data: &[u8]| {
            if body.len() <= ANSWER_BYTES_MAX {
                body.extend_from_slice(data);
            }
        };
        let asking = self.connection.call_and_read(&target, TIMEOUT, &mut keep);
        let answer = tokio::time::timeout(TIMEOUT, asking).await;
        let answer = answer.context("the server's reflection does not answer")??;
        ensure!(
            body.len() <= ANSWER_BYTES_MAX,
            "the server's reflection answers with more than {ANSWER_BYTES_MAX} bytes"
        );
        Ok((answer.grpc_status, body.into()))
    }
}

/// The one message of an answer.
fn reply(mut body: Bytes) -> anyhow::Result<Reply> {
    let whole = "the server's reflection answers with no message";
    ensure!(body.len() >= 5 && body.get_u8() == 0, "{whole}");
    let length = usize::try_from(body.get_u32())?;
    ensure!(length <= body.len(), "{whole}");
    Reply::decode(body.slice(..length)).context(whole)
}
