//! A server with known delays and one known stall, which writes down what it did.
//!
//! Invariant: it runs on a thread and a runtime of its own, and records each call when it has
//! arrived and when it was answered, on the clock that all processes share.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// How a server behaves.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// Call `n` is answered this long after it arrived: `delays[n % len]`.
    pub delays: Vec<Duration>,
    /// From the first call: no answer between these two.
    pub stall: Option<(Duration, Duration)>,
    /// Every `n`th connection's call is cut instead of answered.
    pub cut_every: Option<usize>,
    /// Status of every answer.
    pub status: StatusCode,
}

/// One call as the server saw it.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Number of the connection.
    pub connection: usize,
    pub arrived: Instant,
    pub answered: Option<Instant>,
}

/// A running server.
pub struct Server {
    pub address: SocketAddr,
    /// Before anybody could call.
    pub started: Instant,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    /// Listens on a free port, speaking HTTP/1 and HTTP/2.
    pub fn start(behaviour: Behaviour) -> Self {
        let started = Instant::now();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (sender, receiver) = std::sync::mpsc::channel();
        let kept = Arc::clone(&seen);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                sender.send(listener.local_addr().unwrap()).unwrap();
                accept(listener, Arc::new(behaviour), kept).await;
            });
        });
        let address = receiver.recv().unwrap();
        Self {
            address,
            started,
            seen,
        }
    }

    /// Every call so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn url(&self) -> String {
        format!("http://{}/calls", self.address)
    }
}

async fn accept(listener: TcpListener, behaviour: Arc<Behaviour>, seen: Arc<Mutex<Vec<Seen>>>) {
    let mut connections = JoinSet::new();
    for number in 0.. {
        let (stream, _) = listener.accept().await.unwrap();
        let (behaviour, seen) = (Arc::clone(&behaviour), Arc::clone(&seen));
        connections.spawn(connection(stream, number, behaviour, seen));
    }
}

async fn connection(
    stream: TcpStream,
    number: usize,
    behaviour: Arc<Behaviour>,
    seen: Arc<Mutex<Vec<Seen>>>,
) {
    stream.set_nodelay(true).unwrap();
    let mut first = [0];
    let http2 = stream
        .peek(&mut first)
        .await
        .is_ok_and(|length| length == 1)
        && first == *b"P";
    let service = service_fn(move |request| {
        answer(request, number, Arc::clone(&behaviour), Arc::clone(&seen))
    });
    let io = TokioIo::new(stream);
    if http2 {
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        server.serve_connection(io, service).await.ok();
    } else {
        let server = hyper::server::conn::http1::Builder::new();
        server.serve_connection(io, service).await.ok();
    }
}

async fn answer(
    request: Request<Incoming>,
    connection: usize,
    behaviour: Arc<Behaviour>,
    seen: Arc<Mutex<Vec<Seen>>>,
) -> Result<Response<BoxBody<Bytes, std::convert::Infallible>>, std::io::Error> {
    let arrived = Instant::now();
    let (number, first) = {
        let mut seen = seen.lock().unwrap();
        seen.push(Seen {
            connection,
            arrived,
            answered: None,
        });
        (seen.len() - 1, seen[0].arrived)
    };
    let grpc = request.headers().contains_key("te");
    let message = request
        .into_body()
        .collect()
        .await
        .map_err(std::io::Error::other)?
        .to_bytes();
    let count = behaviour.delays.len().max(1);
    let delay = behaviour
        .delays
        .get(number % count)
        .copied()
        .unwrap_or_default();
    let mut due = arrived + delay;
    if let Some((from, to)) = behaviour.stall
        && due >= first + from
        && due < first + to
    {
        due = first + to;
    }
    precise_sleep(due).await;
    if behaviour
        .cut_every
        .is_some_and(|every| number % every == every - 1)
    {
        return Err(std::io::Error::other("cut"));
    }
    seen.lock().unwrap()[number].answered = Some(Instant::now());
    let mut response = Response::new(Full::new(Bytes::from_static(b"fine")).boxed());
    *response.status_mut() = behaviour.status;
    if grpc {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("7"));
        let frames = [Ok(Frame::data(message)), Ok(Frame::trailers(trailers))];
        *response.body_mut() = StreamBody::new(futures_util::stream::iter(frames)).boxed();
    }
    Ok(response)
}

/// Tokio's timer rounds up to a millisecond: what was really waited is what is written down.
async fn precise_sleep(due: Instant) {
    if due > Instant::now() {
        tokio::time::sleep_until(due.into()).await;
    }
}
