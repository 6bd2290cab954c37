//! Applications: hyper for those that behave, sockets for those that do not.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub type AppBody = BoxBody<Bytes, hyper::Error>;

/// What an application saw, in order.
#[derive(Clone, Default)]
pub struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    pub fn note(&self, what: impl ToString) {
        self.0.lock().unwrap().push(what.to_string());
    }

    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    pub fn has(&self, what: &str) -> bool {
        self.0.lock().unwrap().iter().any(|seen| seen == what)
    }
}

/// An HTTP/1.1 application: `POST` echoes, `GET` lists the head that arrived.
pub async fn http() -> (SocketAddr, Seen) {
    let seen = Seen::default();
    let noted = seen.clone();
    let address = raw(move |stream| {
        let seen = noted.clone();
        async move {
            seen.note("connection");
            let service = service_fn(move |request| serve(request, seen.clone()));
            let builder = hyper::server::conn::http1::Builder::new();
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            drop(connection.await);
        }
    })
    .await;
    (address, seen)
}

async fn serve(request: Request<Incoming>, seen: Seen) -> Result<Response<AppBody>, Infallible> {
    seen.note(format!(
        "{} {} {:?}",
        request.method(),
        request.uri(),
        request.version()
    ));
    let mut response = if request.method() == http::Method::POST {
        Response::new(request.into_body().boxed())
    } else {
        let mut text = String::new();
        for (name, value) in request.headers() {
            text.push_str(&format!("{name}: {}\n", value.to_str().unwrap()));
        }
        Response::new(full(text))
    };
    let headers = response.headers_mut();
    headers.insert("x-app", "1".parse().unwrap());
    headers.insert("sidegate-error", "forged".parse().unwrap());
    headers.insert("sidegate-decision", "forged".parse().unwrap());
    Ok(response)
}

fn full(text: impl Into<Bytes>) -> AppBody {
    Full::new(text.into())
        .map_err(|never| match never {})
        .boxed()
}

/// An application that speaks HTTP/2: each stream goes to `serve`.
pub async fn h2<F, T>(serve: F) -> SocketAddr
where
    F: Fn(Request<RecvStream>, SendResponse<Bytes>) -> T + Clone + Send + Sync + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    raw(move |stream| {
        let serve = serve.clone();
        async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(serve(request, respond));
            }
        }
    })
    .await
}

/// An application made of a socket: each connection goes to `serve`.
pub async fn raw<F, T>(serve: F) -> SocketAddr
where
    F: Fn(TcpStream) -> T + Send + Sync + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    address
}

/// An address where nobody listens.
pub async fn nobody() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

/// Reads until `end` has come; what was read.
pub async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(end.as_bytes()) {
        if stream.read(&mut byte).await.unwrap_or(0) == 0 {
            break;
        }
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}

/// Reads a head and answers with `answer`, then goes on with the connection.
pub async fn answer(stream: &mut TcpStream, answer: &str) -> String {
    let head = read_until(stream, "\r\n\r\n").await;
    stream.write_all(answer.as_bytes()).await.unwrap();
    head
}

/// Answers without reading anything.
pub async fn answer_now(stream: &mut TcpStream, answer: &str) {
    stream.write_all(answer.as_bytes()).await.unwrap();
}

/// How a connection ended: `fin`, or the error's kind.
pub async fn end_of(stream: &mut TcpStream) -> String {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) => return "fin".to_owned(),
            Ok(_) => {}
            Err(error) => return error.kind().to_string(),
        }
    }
}
