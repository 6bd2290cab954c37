//! `sidegate-loadtest run --grpc-data`: the message's type comes from a real reflection service.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests"
)]

use std::net::SocketAddr;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    MethodDescriptorProto, ServiceDescriptorProto,
};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::body::Body;
use tonic::codegen::Service as _;

fn field(name: &str, number: i32, kind: Type, type_name: Option<&str>) -> FieldDescriptorProto {
    FieldDescriptorProto {
        name: Some(name.to_owned()),
        number: Some(number),
        label: Some(Label::Optional.into()),
        r#type: Some(kind.into()),
        type_name: type_name.map(str::to_owned),
        ..FieldDescriptorProto::default()
    }
}

/// `shop.Orders/Find`, whose request holds a message of another file.
fn descriptors() -> Vec<u8> {
    let message = |name: &str, fields| DescriptorProto {
        name: Some(name.to_owned()),
        field: fields,
        ..DescriptorProto::default()
    };
    let file = |name: &str, package: &str, messages| FileDescriptorProto {
        name: Some(name.to_owned()),
        package: Some(package.to_owned()),
        message_type: messages,
        syntax: Some("proto3".to_owned()),
        ..FileDescriptorProto::default()
    };
    let number = message("Number", vec![field("value", 1, Type::Int32, None)]);
    let request = message(
        "Request",
        vec![
            field("name", 1, Type::String, None),
            field("number", 2, Type::Message, Some(".types.Number")),
        ],
    );
    let method = |name: &str, streams| MethodDescriptorProto {
        name: Some(name.to_owned()),
        input_type: Some(".shop.Request".to_owned()),
        output_type: Some(".shop.Request".to_owned()),
        server_streaming: Some(streams),
        ..MethodDescriptorProto::default()
    };
    let service = ServiceDescriptorProto {
        name: Some("Orders".to_owned()),
        method: vec![method("Find", false), method("Watch", true)],
        ..ServiceDescriptorProto::default()
    };
    let orders = FileDescriptorProto {
        dependency: vec!["types.proto".to_owned()],
        service: vec![service],
        ..file("orders.proto", "shop", vec![request])
    };
    let types = file("types.proto", "types", vec![number]);
    let set = FileDescriptorSet {
        file: vec![types, orders],
    };
    set.encode_to_vec()
}

/// A server with reflection in both versions or the older one, whose other methods keep their
/// message and answer nothing.
struct Server {
    address: SocketAddr,
    messages: Arc<Mutex<Vec<Bytes>>>,
}

impl Server {
    fn start(newer: bool) -> Self {
        let messages = Arc::new(Mutex::new(Vec::new()));
        let (sender, receiver) = mpsc::channel();
        let kept = Arc::clone(&messages);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                sender.send(listener.local_addr().unwrap()).unwrap();
                serve(listener, newer, kept).await;
            });
        });
        let address = receiver.recv().unwrap();
        Self { address, messages }
    }
}

async fn serve(listener: TcpListener, newer: bool, messages: Arc<Mutex<Vec<Bytes>>>) {
    let set = descriptors();
    let builder = || {
        tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(&set)
    };
    let (current, former) = (
        builder().build_v1().unwrap(),
        builder().build_v1alpha().unwrap(),
    );
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (current, former, messages) = (current.clone(), former.clone(), Arc::clone(&messages));
        let service = service_fn(move |request: Request<Incoming>| {
            let (mut current, mut former, messages) =
                (current.clone(), former.clone(), Arc::clone(&messages));
            async move {
                let path = request.uri().path();
                if path.starts_with("/grpc.reflection.v1.") && newer {
                    return current.call(request).await;
                }
                if path.starts_with("/grpc.reflection.v1alpha.") {
                    return former.call(request).await;
                }
                let status = if path.starts_with("/grpc.") {
                    "12"
                } else {
                    "0"
                };
                let message = request.into_body().collect().await.unwrap().to_bytes();
                if status == "0" {
                    messages.lock().unwrap().push(message);
                }
                Ok(answer(status))
            }
        });
        connections.spawn(async move {
            let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            http2
                .serve_connection(TokioIo::new(stream), service)
                .await
                .ok();
        });
    }
}

fn answer(status: &'static str) -> Response<Body> {
    let trailers = HeaderMap::from_iter([(
        "grpc-status".parse().unwrap(),
        HeaderValue::from_static(status),
    )]);
    let frames = [Ok::<Frame<Bytes>, std::convert::Infallible>(
        Frame::trailers(trailers),
    )];
    let body = StreamBody::new(futures_util::stream::iter(frames));
    Response::new(Body::new(body))
}

fn run(server: &Server, method: &str, data: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sidegate-loadtest"))
        .args(["run", "--url", &format!("http://{}/", server.address)])
        .args([
            "--protocol",
            "grpc",
            "--grpc-method",
            method,
            "--grpc-data",
            data,
        ])
        .args(["--rate", "100", "--connections", "2", "--duration", "200ms"])
        .args(["--warmup", "0s", "--output", "json"])
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn message_from_json_is_what_the_servers_descriptors_make_of_it() {
    for newer in [true, false] {
        let server = Server::start(newer);
        let output = run(
            &server,
            "shop.Orders/Find",
            r#"{"name":"x","number":{"value":7}}"#,
        );
        assert!(output.status.success(), "{output:?}");
        let messages = server.messages.lock().unwrap();
        assert_eq!(messages.len(), 20);
        // Not compressed, seven bytes: field 1 is "x", field 2 a message whose field 1 is 7.
        let expected = [0, 0, 0, 0, 7, 0x0A, 1, b'x', 0x12, 2, 0x08, 7];
        assert!(
            messages.iter().all(|message| *message == expected[..]),
            "{messages:?}"
        );
    }
}

#[test]
fn what_cannot_be_called_so_is_told_before_the_load() {
    let server = Server::start(true);
    let check = |method: &str, data: &str, words: &str| {
        let output = run(&server, method, data);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{method}");
        assert!(told.contains(words), "{method}: {told}");
    };
    check("shop.Orders/Find", r#"{"nam":"x"}"#, "no shop.Request: ");
    check(
        "shop.Orders/Find",
        r#"{"name":"x"} {}"#,
        "no shop.Request: ",
    );
    check("shop.Orders/Lose", "{}", "it has Find, Watch");
    check("shop.Orders/Watch", "{}", "streams");
    check("shop.Bills/Find", "{}", "does not describe shop.Bills");
    assert!(server.messages.lock().unwrap().is_empty());
}
