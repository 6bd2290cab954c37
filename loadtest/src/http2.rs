//! HTTP/2 and gRPC calls: streams of a shared connection.
//!
//! Invariant: a connection that has ended is replaced by the first stream that needs it; the
//! others wait for that one.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::HeaderMap;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::failure::Failure;
use crate::http1::Answer;
use crate::target::{Protocol, Target};

const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// A connection that streams share.
pub(crate) struct Shared {
    sender: Mutex<Option<SendRequest<Bytes>>>,
    tasks: Rc<RefCell<JoinSet<()>>>,
}

impl Shared {
    /// Connects; the connection is driven by a task of `tasks`.
    pub(crate) async fn open(
        target: &Target,
        timeout: Duration,
        tasks: Rc<RefCell<JoinSet<()>>>,
    ) -> Result<Self, Failure> {
        let shared = Self {
            sender: Mutex::new(None),
            tasks,
        };
        shared.sender(target, timeout).await?;
        Ok(shared)
    }

    async fn sender(
        &self,
        target: &Target,
        timeout: Duration,
    ) -> Result<SendRequest<Bytes>, Failure> {
        let mut kept = self.sender.lock().await;
        if let Some(sender) = kept.as_ref() {
            return Ok(sender.clone());
        }
        let io = target.connect(timeout).await?;
        let (sender, connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake(io)
            .await?;
        let mut tasks = self.tasks.borrow_mut();
        // What has ended would otherwise be kept until the end.
        while tasks.try_join_next().is_some() {}
        // Its error reaches every stream; nobody else needs it.
        tasks.spawn_local(async move {
            connection.await.ok();
        });
        *kept = Some(sender.clone());
        Ok(sender)
    }

    /// Lets go of the connection: the next call opens another, and this one ends with its calls.
    pub(crate) async fn forget(&self) {
        *self.sender.lock().await = None;
    }

    /// Makes one call on a stream of its own and reads the whole answer.
    ///
    /// # Errors
    ///
    /// Any [`Failure`]; one that ends the connection makes the next call open another.
    pub(crate) async fn call(&self, target: &Target, timeout: Duration) -> Result<Answer, Failure> {
        self.call_and_read(target, timeout, &mut |_data| {}).await
    }

    /// As [`Self::call`]; `read` is shown the body, piece by piece.
    ///
    /// # Errors
    ///
    /// As [`Self::call`].
    pub(crate) async fn call_and_read(
        &self,
        target: &Target,
        timeout: Duration,
        read: &mut impl FnMut(&[u8]),
    ) -> Result<Answer, Failure> {
        let sender = self.sender(target, timeout).await?;
        let mut sender = match sender.ready().await {
            Ok(sender) => sender,
            Err(error) => {
                self.forget().await;
                return Err(error.into());
            }
        };
        let sent = exchange(&mut sender, target, read).await;
        if matches!(
            &sent,
            Err(Failure::Io(_) | Failure::Closed | Failure::Protocol(_))
        ) {
            self.forget().await;
        }
        sent
    }
}

async fn exchange(
    sender: &mut SendRequest<Bytes>,
    target: &Target,
    read: &mut impl FnMut(&[u8]),
) -> Result<Answer, Failure> {
    let empty = target.body.is_empty();
    let (response, mut stream) = sender.send_request(target.request.clone(), empty)?;
    if !empty {
        stream.send_data(target.body.clone(), true)?;
    }
    let response = response.await?;
    let status = response.status().as_u16();
    let mut grpc_status = grpc_status(response.headers());
    let mut body = response.into_body();
    let mut bytes = 0;
    while let Some(data) = body.data().await {
        let data = data?;
        bytes += data.len() as u64;
        read(&data);
        body.flow_control().release_capacity(data.len())?;
    }
    if let Some(trailers) = body.trailers().await? {
        grpc_status = grpc_status.or(self::grpc_status(&trailers));
    }
    if target.protocol == Protocol::Grpc && status == 200 && grpc_status.is_none() {
        return Err(Failure::Protocol("an answer without grpc-status".into()));
    }
    Ok(Answer {
        status,
        grpc_status,
        bytes,
        reusable: true,
    })
}

fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}
