//! gRPC through two sidecars, with tonic at both ends: all four kinds, errors, deadlines,
//! cancellation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::clone_on_ref_ptr,
    clippy::format_push_string,
    missing_docs,
    dead_code,
    unreachable_pub,
    reason = "tests"
)]

#[path = "support/mesh.rs"]
mod mesh;
#[path = "data_path/pair.rs"]
mod pair;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut};
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use http::uri::PathAndQuery;
use pair::Pair;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::server::{
    ClientStreamingService, NamedService, ServerStreamingService, StreamingService, UnaryService,
};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Response, Status, Streaming};

/// Messages of plain text.
#[derive(Clone, Copy, Default)]
struct Text;

impl Codec for Text {
    type Encode = String;
    type Decode = String;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Text {
    type Item = String;
    type Error = Status;

    fn encode(&mut self, item: String, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(item.as_bytes());
        Ok(())
    }
}

impl Decoder for Text {
    type Item = String;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<String>, Status> {
        let bytes = from.copy_to_bytes(from.remaining());
        Ok(Some(String::from_utf8(bytes.to_vec()).unwrap()))
    }
}

/// The service; `dropped` tells when a call that never ends was given up.
#[derive(Clone)]
struct Test {
    dropped: Arc<Notify>,
}

type Messages = BoxStream<'static, Result<String, Status>>;

impl UnaryService<String> for Test {
    type Response = String;
    type Future = BoxFuture<'static, Result<Response<String>, Status>>;

    fn call(&mut self, request: Request<String>) -> Self::Future {
        let dropped = GaveUp(Arc::clone(&self.dropped));
        Box::pin(async move {
            match request.into_inner().as_str() {
                "fail" => Err(Status::already_exists("twice")),
                "hang" => {
                    let _dropped = dropped;
                    std::future::pending().await
                }
                text => Ok(Response::new(format!("got {text}"))),
            }
        })
    }
}

impl ServerStreamingService<String> for Test {
    type Response = String;
    type ResponseStream = Messages;
    type Future = BoxFuture<'static, Result<Response<Messages>, Status>>;

    fn call(&mut self, request: Request<String>) -> Self::Future {
        let dropped = GaveUp(Arc::clone(&self.dropped));
        Box::pin(async move {
            let count: usize = request.into_inner().parse().unwrap();
            let counted = futures_util::stream::iter((0..count).map(|i| Ok(i.to_string())));
            let rest = futures_util::stream::once(async move {
                let _dropped = dropped;
                if count > 1_000 {
                    std::future::pending::<()>().await;
                }
                Err(Status::out_of_range("the end"))
            });
            Ok(Response::new(counted.chain(rest).boxed()))
        })
    }
}

impl ClientStreamingService<String> for Test {
    type Response = String;
    type Future = BoxFuture<'static, Result<Response<String>, Status>>;

    fn call(&mut self, request: Request<Streaming<String>>) -> Self::Future {
        Box::pin(async move {
            let all: Vec<String> = request.into_inner().try_collect().await?;
            Ok(Response::new(all.join(" ")))
        })
    }
}

impl StreamingService<String> for Test {
    type Response = String;
    type ResponseStream = Messages;
    type Future = BoxFuture<'static, Result<Response<Messages>, Status>>;

    fn call(&mut self, request: Request<Streaming<String>>) -> Self::Future {
        let echo = request.into_inner().map_ok(|text| format!("echo {text}"));
        Box::pin(async move { Ok(Response::new(echo.boxed())) })
    }
}

struct GaveUp(Arc<Notify>);

impl Drop for GaveUp {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl NamedService for Test {
    const NAME: &'static str = "shop.v1.Test";
}

impl tower::Service<http::Request<tonic::body::Body>> for Test {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Text);
            Ok(match request.uri().path().rsplit('/').next().unwrap() {
                "Get" => grpc.unary(this, request).await,
                "Watch" => grpc.server_streaming(this, request).await,
                "Restock" => grpc.client_streaming(this, request).await,
                _ => grpc.streaming(this, request).await,
            })
        })
    }
}

struct Rig {
    pair: Pair,
    dropped: Arc<Notify>,
    grpc: tonic::client::Grpc<Channel>,
}

async fn serve(test: Test) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(
        Server::builder()
            .add_service(test)
            .serve_with_incoming(incoming),
    );
    address
}

impl Rig {
    async fn start() -> Self {
        let dropped = Arc::new(Notify::new());
        let application = serve(Test {
            dropped: Arc::clone(&dropped),
        })
        .await;
        let pair = Pair::grpc(application).await;
        let endpoint = Endpoint::from_shared(format!("http://{}", pair.outbound)).unwrap();
        let channel = endpoint
            .origin("http://orders.shop".parse().unwrap())
            .connect()
            .await
            .unwrap();
        let mut grpc = tonic::client::Grpc::new(channel);
        grpc.ready().await.unwrap();
        Self {
            pair,
            dropped,
            grpc,
        }
    }

    async fn get(&mut self, request: Request<String>) -> Result<String, Status> {
        self.grpc.ready().await.unwrap();
        let path = PathAndQuery::from_static("/shop.v1.Test/Get");
        self.grpc
            .unary(request, path, Text)
            .await
            .map(Response::into_inner)
    }
}

async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(30), future)
        .await
        .expect("nothing happened for 30 s")
}

#[tokio::test]
async fn all_four_kinds_of_call_pass() {
    let mut rig = Rig::start().await;
    assert_eq!(
        soon(rig.get(Request::new("one".into()))).await.unwrap(),
        "got one"
    );
    rig.grpc.ready().await.unwrap();
    let path = PathAndQuery::from_static("/shop.v1.Test/Watch");
    let watch = rig
        .grpc
        .server_streaming(Request::new("3".to_owned()), path, Text);
    let mut watch = soon(watch).await.unwrap().into_inner();
    for number in ["0", "1", "2"] {
        assert_eq!(soon(watch.message()).await.unwrap().unwrap(), number);
    }
    let end = soon(watch.message()).await.unwrap_err();
    assert_eq!((end.code(), end.message()), (Code::OutOfRange, "the end"));
    rig.grpc.ready().await.unwrap();
    let messages = futures_util::stream::iter(["a", "b", "c"].map(str::to_owned));
    let path = PathAndQuery::from_static("/shop.v1.Test/Restock");
    let all = rig
        .grpc
        .client_streaming(Request::new(messages), path, Text);
    assert_eq!(soon(all).await.unwrap().into_inner(), "a b c");
    rig.grpc.ready().await.unwrap();
    let (send, receive) = tokio::sync::mpsc::channel(1);
    let messages = tokio_stream::wrappers::ReceiverStream::new(receive);
    let path = PathAndQuery::from_static("/shop.v1.Test/Reserve");
    let talk = rig.grpc.streaming(Request::new(messages), path, Text);
    let mut talk = soon(talk).await.unwrap().into_inner();
    for word in ["x", "y"] {
        send.send(word.to_owned()).await.unwrap();
        assert_eq!(
            soon(talk.message()).await.unwrap().unwrap(),
            format!("echo {word}")
        );
    }
    drop(send);
    assert!(soon(talk.message()).await.unwrap().is_none());
    let record = rig
        .pair
        .record("orders", |record| record["grpc_method"] == "Reserve")
        .await;
    assert_eq!(
        (record["grpc_status"].as_u64(), record["protocol"].as_str()),
        (Some(0), Some("grpc"))
    );
}

#[tokio::test]
async fn a_status_of_the_application_and_one_of_the_mesh_both_arrive() {
    let mut rig = Rig::start().await;
    let failed = soon(rig.get(Request::new("fail".into())))
        .await
        .unwrap_err();
    assert_eq!(
        (failed.code(), failed.message()),
        (Code::AlreadyExists, "twice")
    );
    rig.grpc.ready().await.unwrap();
    let path = PathAndQuery::from_static("/shop.v1.Other/Get");
    let denied = rig.grpc.unary(Request::new("x".to_owned()), path, Text);
    let denied: Status = soon(denied)
        .await
        .map(|_: Response<String>| ())
        .unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    assert!(denied.metadata().get("sidegate-decision").is_some());
    let record = rig
        .pair
        .record("orders", |record| record["decision"] == "deny")
        .await;
    assert_eq!(record["grpc_status"], 7);
}

#[tokio::test]
async fn a_deadline_ends_the_call_and_the_application_hears_of_it() {
    let mut rig = Rig::start().await;
    let mut request = Request::new("hang".to_owned());
    request
        .metadata_mut()
        .insert("grpc-timeout", "200m".parse().unwrap());
    let failed = soon(rig.get(request)).await.unwrap_err();
    // tonic has timers of its own at both ends, which say CANCELLED; the sidecar says the other.
    let code = failed.code();
    assert!(
        matches!(code, Code::DeadlineExceeded | Code::Cancelled),
        "{failed:?}"
    );
    soon(rig.dropped.notified()).await;
}

#[tokio::test]
async fn a_cancelled_call_is_cancelled_in_the_application() {
    let mut rig = Rig::start().await;
    rig.grpc.ready().await.unwrap();
    let path = PathAndQuery::from_static("/shop.v1.Test/Watch");
    let watch = rig
        .grpc
        .server_streaming(Request::new("1001".to_owned()), path, Text);
    let mut watch = soon(watch).await.unwrap().into_inner();
    let _: String = soon(watch.message()).await.unwrap().unwrap();
    drop(watch);
    soon(rig.dropped.notified()).await;
    let call = tokio::time::timeout(
        Duration::from_millis(200),
        rig.get(Request::new("hang".to_owned())),
    );
    assert!(call.await.is_err(), "it hangs, and is dropped");
    soon(rig.dropped.notified()).await;
}

#[tokio::test]
async fn a_mesh_that_has_no_such_service_says_so_as_grpc() {
    let rig = Rig::start().await;
    let endpoint = Endpoint::from_shared(format!("http://{}", rig.pair.outbound)).unwrap();
    let channel = endpoint
        .origin("http://nobody.shop".parse().unwrap())
        .connect()
        .await
        .unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = PathAndQuery::from_static("/shop.v1.Test/Get");
    let failed: Result<Response<String>, Status> =
        soon(grpc.unary(Request::new("x".to_owned()), path, Text)).await;
    let failed = failed.unwrap_err();
    assert_eq!(failed.code(), Code::Unavailable);
    assert_eq!(
        failed.metadata().get("sidegate-error").unwrap(),
        "destination_unknown"
    );
}
