//! What is said to the controller: who asks, what is called, what became of each resource.
//!
//! Invariant: what waits to be said is bounded by what there is to say it about, whether or not the
//! controller listens: of each resource and each destination only the last word waits.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::Stream;
use sidegate_api::control as proto;
use sidegate_api::control::watch_request::Message;
use tokio::sync::Notify;

use crate::destinations::{Change, Destinations};

/// Acknowledgements that wait to be sent on one stream.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    waiting: Mutex<BTreeMap<String, proto::Acknowledge>>,
    more: Notify,
}

impl Outbox {
    /// Says what became of a resource, in place of what was to be said of it before.
    pub(super) fn put(&self, acknowledge: proto::Acknowledge) {
        self.lock().insert(acknowledge.uid.clone(), acknowledge);
        self.more.notify_one();
    }

    async fn next(&self) -> proto::Acknowledge {
        loop {
            let more = self.more.notified();
            if let Some((_, acknowledge)) = self.lock().pop_first() {
                return acknowledge;
            }
            more.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, proto::Acknowledge>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The requests of one stream, as fast as the controller takes them.
pub(super) fn requests(
    hello: proto::Hello,
    outbox: Arc<Outbox>,
    destinations: Arc<Destinations>,
) -> impl Stream<Item = proto::WatchRequest> + Send + 'static {
    futures_util::stream::unfold(
        (Some(hello), outbox, destinations),
        |(hello, outbox, destinations)| async move {
            let message = if let Some(hello) = hello {
                Message::Hello(hello)
            } else {
                tokio::select! {
                    change = destinations.next_change() => subscription(change),
                    acknowledge = outbox.next() => Message::Acknowledge(acknowledge),
                }
            };
            let request = proto::WatchRequest {
                message: Some(message),
            };
            Some((request, (None, outbox, destinations)))
        },
    )
}

fn subscription(change: Change) -> Message {
    match change {
        Change::Subscribe(at) => Message::Subscribe(proto::Subscribe {
            destination: at.to_string(),
        }),
        Change::Unsubscribe(at) => Message::Unsubscribe(proto::Unsubscribe {
            destination: at.to_string(),
        }),
    }
}
