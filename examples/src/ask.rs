//! One call, made from a command line and told as one line of JSON.
//!
//! Invariant: a call that was answered is [`Told`] whatever the answer says; only what made no
//! answer at all is an `error`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use axum::http::{Method, Request, Uri, header};
use bytes::Bytes;
use http_body_util::Full;
use serde::Serialize;
use tonic::Code;

use crate::calls::{self, Kind};
use crate::client::{self, Error};

/// Longest wait for one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest body that is told.
const BODY_BYTES_MAX: usize = 16 * 1024;

/// What a call came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Told {
    /// HTTP status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Headers of the answer, lower-case names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// The body's first 16 KiB, as text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Bytes of the whole body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<usize>,
    /// The gRPC status, such as `Ok` or `PermissionDenied`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// What a server said: its greeting and its answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub said: Option<Vec<String>>,
    /// Why there was no answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

impl Told {
    /// What a watcher is told the change of: everything but figures and bodies.
    pub fn outcome(&self) -> String {
        let said = [
            self.status.map(|status| status.to_string()),
            self.headers.get("sidegate-error").cloned(),
            self.code.clone(),
            self.said
                .as_ref()
                .and_then(|said| said.first())
                .map(|_| "answered".to_owned()),
            self.error.clone(),
        ];
        said.into_iter().flatten().collect::<Vec<_>>().join(" ")
    }
}

/// A call to make.
#[derive(Clone, Debug)]
pub enum Call {
    /// HTTP/1.1.
    Http {
        /// Where and what.
        url: Uri,
        /// How.
        method: Method,
        /// More headers; `host` replaces the URL's.
        headers: Vec<(String, String)>,
        /// The body.
        body: String,
    },
    /// One call of the inventory.
    Grpc {
        /// `HOST:PORT`, the authority as well.
        address: String,
        /// Which.
        kind: Kind,
    },
    /// One message and its echo.
    WebSocket {
        /// Where.
        url: Uri,
        /// What is sent.
        message: String,
    },
    /// A conversation in which the server speaks first.
    Tcp {
        /// `HOST:PORT`.
        address: String,
        /// What is said, each line after the answer to the one before.
        lines: Vec<String>,
    },
}

/// Makes `call`, once; it has 30 seconds.
pub async fn ask(call: &Call) -> Told {
    let started = Instant::now();
    let made = tokio::time::timeout(CALL_TIMEOUT, make(call)).await;
    let told = match made {
        Ok(Ok(told)) => told,
        Ok(Err(error)) => failed(error.to_string()),
        Err(_elapsed) => failed(format!("no answer within {} s", CALL_TIMEOUT.as_secs())),
    };
    Told {
        ms: started.elapsed().as_secs_f64() * 1000.0,
        ..told
    }
}

fn failed(error: String) -> Told {
    Told {
        error: Some(error),
        ..Told::default()
    }
}

async fn make(call: &Call) -> Result<Told, Error> {
    match call {
        Call::Http {
            url,
            method,
            headers,
            body,
        } => http(url, method.clone(), headers, body).await,
        Call::Grpc { address, kind } => {
            let code = match calls::grpc(address.clone(), &format!("http://{address}"), *kind).await
            {
                Ok(()) => Code::Ok,
                Err(status) => status.code(),
            };
            Ok(Told {
                code: Some(format!("{code:?}")),
                ..Told::default()
            })
        }
        Call::WebSocket { url, message } => websocket(url, message).await,
        Call::Tcp { address, lines } => {
            let lines = lines.iter().map(String::as_str).collect::<Vec<_>>();
            Ok(Told {
                said: Some(client::converse(address.as_str(), &lines).await?),
                ..Told::default()
            })
        }
    }
}

async fn http(
    url: &Uri,
    method: Method,
    headers: &[(String, String)],
    body: &str,
) -> Result<Told, Error> {
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::builder().method(method).uri(path);
    let mut host = url.authority().map(ToString::to_string);
    for (name, value) in headers {
        if name.eq_ignore_ascii_case("host") {
            host = Some(value.clone());
        } else {
            request = request.header(name, value);
        }
    }
    let request = request
        .header(header::HOST, host.unwrap_or_default())
        .body(Full::new(Bytes::from(body.to_owned())))?;
    let answer = client::send(address(url)?, request).await?;
    let mut seen = BTreeMap::new();
    for (name, value) in &answer.headers {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        seen.insert(name.to_string(), value);
    }
    let shown = answer.body.slice(..answer.body.len().min(BODY_BYTES_MAX));
    Ok(Told {
        status: Some(answer.status.as_u16()),
        headers: seen,
        bytes: Some(answer.body.len()),
        body: Some(String::from_utf8_lossy(&shown).into_owned()),
        ..Told::default()
    })
}

/// A refused upgrade is an answer too: its status.
async fn websocket(url: &Uri, message: &str) -> Result<Told, Error> {
    match client::websocket(address(url)?, &url.to_string(), message).await {
        Ok(echo) => Ok(Told {
            status: Some(101),
            said: Some(vec![echo]),
            ..Told::default()
        }),
        Err(error) => {
            let text = error.to_string();
            let status = text
                .strip_prefix("HTTP ")
                .and_then(|code| code.parse().ok());
            match status {
                Some(status) => Ok(Told {
                    status: Some(status),
                    ..Told::default()
                }),
                None => Err(error),
            }
        }
    }
}

/// Where a URL's connection goes.
fn address(url: &Uri) -> Result<(String, u16), Error> {
    let host = url.host().ok_or("the URL names no host")?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host.to_owned(), url.port_u16().unwrap_or(80)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shop::{ledger, orders};

    const ANYWHERE: std::net::SocketAddr =
        std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    fn get(url: &str) -> Call {
        Call::Http {
            url: url.parse().unwrap(),
            method: Method::GET,
            headers: vec![("X-Seen".to_owned(), "yes".to_owned())],
            body: String::new(),
        }
    }

    #[tokio::test]
    async fn an_answer_is_told_and_no_answer_is_an_error() {
        let orders = orders::serve(ANYWHERE).await.unwrap();
        let told = ask(&get(&format!("http://{}/headers", orders.address))).await;
        assert_eq!(told.status, Some(200));
        assert!(told.body.as_deref().unwrap().contains("\"x-seen\":\"yes\""));
        let told = ask(&get(&format!("http://{}/status/503", orders.address))).await;
        assert_eq!((told.outcome().as_str(), told.error), ("503", None));
        let url = format!("ws://{}/orders/7/events", orders.address);
        let message = "packed".to_owned();
        let told = ask(&Call::WebSocket {
            url: url.parse().unwrap(),
            message,
        })
        .await;
        assert_eq!(told.said, Some(vec!["packed".to_owned()]));
        orders.stop().await;
        let told = ask(&get(&format!("http://{}/headers", orders.address))).await;
        assert!(told.error.is_some() && told.status.is_none(), "{told:?}");
    }

    #[tokio::test]
    async fn a_conversation_is_told_line_by_line() {
        let ledger = ledger::serve(ANYWHERE).await.unwrap();
        let told = ask(&Call::Tcp {
            address: ledger.address.to_string(),
            lines: vec!["ADD tea 2".to_owned()],
        })
        .await;
        assert_eq!(
            told.said,
            Some(vec!["220 ledger ready".to_owned(), "250 2".to_owned()])
        );
        ledger.stop().await;
    }
}
