//! A guarded hyper over scripted bytes, for the guard's tests.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use sidegate_mesh::ManualClock;
use sidegate_proxy::http1::{self, ClientGuard, GuardLimits, Reason, Rejection, ServerGuard};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What stands behind the last scripted byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Open,
    Closed,
}

/// A socket that says what it was told to, piece by piece, and keeps what is written to it.
pub struct Script {
    pieces: VecDeque<Vec<u8>>,
    end: End,
    written: Arc<Mutex<Vec<u8>>>,
    /// Says nothing before something was written: a server does not answer unasked.
    silent: bool,
}

impl Script {
    pub fn new(pieces: Vec<Vec<u8>>, end: End) -> Self {
        Self {
            pieces: pieces
                .into_iter()
                .filter(|piece| !piece.is_empty())
                .collect(),
            end,
            written: Arc::default(),
            silent: false,
        }
    }
}

impl AsyncRead for Script {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.silent && self.written.lock().unwrap().is_empty() {
            return Poll::Pending;
        }
        let Some(mut piece) = self.pieces.pop_front() else {
            return match self.end {
                End::Open => Poll::Pending,
                End::Closed => Poll::Ready(Ok(())),
            };
        };
        let bytes = piece.len().min(buffer.remaining());
        buffer.put_slice(&piece[..bytes]);
        piece.drain(..bytes);
        if !piece.is_empty() {
            self.pieces.push_front(piece);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Script {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.written.lock().unwrap().extend_from_slice(data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A request as the service saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub method: String,
    pub target: String,
    /// `None`: the body broke off.
    pub body: Option<Vec<u8>>,
    pub trailers: usize,
}

/// What became of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub seen: Vec<Seen>,
    pub rejection: Option<Rejection>,
    /// Everything hyper wrote.
    pub written: String,
}

impl Outcome {
    pub fn reason(&self) -> Option<Reason> {
        self.rejection.map(|rejection| rejection.reason)
    }
}

pub fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::new(SystemTime::UNIX_EPOCH))
}

/// Gives everything that can happen without time passing the chance to happen.
async fn settle(rounds: usize) {
    for _ in 0..rounds {
        tokio::task::yield_now().await;
    }
}

/// Serves `pieces` with a guarded hyper whose service reads every body and answers 200.
pub fn serve(pieces: Vec<Vec<u8>>, end: End) -> Outcome {
    serve_limited(pieces, end, GuardLimits::default())
}

pub fn serve_limited(pieces: Vec<Vec<u8>>, end: End, limits: GuardLimits) -> Outcome {
    let rounds = pieces.len() * 3 + 64;
    let script = Script::new(pieces, end);
    let written = Arc::clone(&script.written);
    let (guard, handle) = ServerGuard::new(script, limits, clock());
    let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
    let service = {
        let (seen, handle) = (Arc::clone(&seen), handle.clone());
        service_fn(move |request: Request<Incoming>| {
            let admitted = handle.admit(&request).map(drop);
            let seen = Arc::clone(&seen);
            async move {
                let answer = match admitted {
                    Ok(()) => {
                        note(&seen, request).await;
                        Response::new(Full::new(Bytes::from_static(b"ok")))
                    }
                    Err(rejection) => Response::builder()
                        .status(rejection.status())
                        .header("sidegate-error", rejection.code())
                        .body(Full::default())
                        .unwrap(),
                };
                Ok::<_, Infallible>(answer)
            }
        })
    };
    runtime().block_on(async {
        let connection = http1::server(Duration::from_mins(1), &limits)
            .serve_connection(TokioIo::new(guard), service);
        tokio::select! { biased; _ = connection => {} () = settle(rounds) => {} }
    });
    Outcome {
        seen: seen.lock().unwrap().clone(),
        rejection: handle.rejection(),
        written: String::from_utf8_lossy(&written.lock().unwrap()).into_owned(),
    }
}

async fn note(seen: &Arc<Mutex<Vec<Seen>>>, request: Request<Incoming>) {
    let index = {
        let mut seen = seen.lock().unwrap();
        seen.push(Seen {
            method: request.method().to_string(),
            target: request.uri().to_string(),
            body: None,
            trailers: 0,
        });
        seen.len() - 1
    };
    if let Ok(body) = request.into_body().collect().await {
        let mut seen = seen.lock().unwrap();
        seen[index].trailers = body.trailers().map_or(0, http::HeaderMap::len);
        seen[index].body = Some(body.to_bytes().to_vec());
    }
}

/// What became of a call to an application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Status and body; `None` where the head or the body failed.
    pub response: Option<(u16, Option<Vec<u8>>)>,
    pub rejection: Option<Rejection>,
    /// Whether hyper would send another request.
    pub reusable: bool,
}

/// Calls an application that answers `pieces`.
pub fn call(method: &Method, upgrade: bool, pieces: Vec<Vec<u8>>, end: End) -> Answer {
    let rounds = pieces.len() * 3 + 64;
    let mut script = Script::new(pieces, end);
    script.silent = true;
    let limits = GuardLimits::default();
    let (guard, handle) = ClientGuard::new(script, limits, clock());
    let mut request = Request::builder()
        .method(method)
        .uri("/")
        .header("host", "a");
    if upgrade {
        request = request
            .header("connection", "upgrade")
            .header("upgrade", "websocket");
    }
    let request = request.body(Empty::<Bytes>::new()).unwrap();
    runtime().block_on(async {
        let io = TokioIo::new(guard);
        let (mut sender, connection) = http1::client(&limits).handshake(io).await.unwrap();
        handle.begin(method, upgrade);
        let answer = Mutex::new(None);
        let reusable = AtomicBool::new(false);
        let calling = async {
            if let Ok(response) = sender.send_request(request).await {
                let status = response.status().as_u16();
                *answer.lock().unwrap() = Some((status, None));
                if let Ok(body) = response.into_body().collect().await {
                    *answer.lock().unwrap() = Some((status, Some(body.to_bytes().to_vec())));
                }
            }
            settle(rounds / 2).await;
            reusable.store(sender.is_ready(), Ordering::Relaxed);
        };
        let both = async { tokio::join!(calling, connection) };
        tokio::select! { biased; _ = both => {} () = settle(rounds * 2) => {} }
        Answer {
            response: answer.lock().unwrap().clone(),
            rejection: handle.rejection(),
            reusable: reusable.load(Ordering::Relaxed),
        }
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}
