//! One sidecar's stream, from its hello to its end.
//!
//! Invariants: the certificate decides who it is, and the live index whether that pod is there;
//! nothing is sent before every kind was listed; there is at most one response on its way, and the
//! next one is made when that one was taken.

use std::sync::Arc;
use std::time::SystemTime;

use sidegate_api::control::watch_request::Message;
use sidegate_api::control::{Hello, WatchRequest, WatchResponse};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::index::{Greeting, HelloError, SidecarId, Target};
use crate::server::Caller;
use crate::shared::Shared;

/// Longest name or UID of a hello, in bytes.
const NAME_BYTES_MAX: usize = 253;

/// One stream.
pub(crate) struct Session {
    pub shared: Arc<Shared>,
    pub caller: Caller,
    pub answers: mpsc::Sender<Result<WatchResponse, Status>>,
}

/// Why a stream ended.
enum End {
    /// The sidecar went.
    Gone,
    /// The controller stops.
    Stopping,
    /// This end ends it: a word for metrics, and what the sidecar hears.
    Refused(&'static str, Status),
}

impl Session {
    pub(crate) async fn run(self, mut requests: Streaming<WatchRequest>) {
        let cancel = self.shared.cancel.clone();
        let end = tokio::select! {
            () = cancel.cancelled() => End::Stopping,
            () = self.answers.closed() => End::Gone,
            end = self.serve(&mut requests) => end,
        };
        match end {
            End::Gone => self.shared.metrics.stream_ended("gone"),
            // It comes again, to another replica.
            End::Stopping => self.shared.metrics.stream_ended("stopping"),
            End::Refused(reason, status) => {
                self.shared.metrics.stream_ended(reason);
                tracing::debug!(
                    peer.id = %self.caller.peer.id,
                    peer.addr = %self.caller.address,
                    reason,
                    "stream ended"
                );
                self.answers.try_send(Err(status)).ok();
            }
        }
    }

    async fn serve(&self, requests: &mut Streaming<WatchRequest>) -> End {
        let hello = match self.hello(requests).await {
            Ok(hello) => hello,
            Err(end) => return end,
        };
        self.shared.synced.all().await;
        let id = match self.admit(&hello).await {
            Ok(id) => id,
            Err(error) => {
                self.shared.metrics.hello_refused(error.code());
                tracing::warn!(
                    peer.id = %self.caller.peer.id,
                    peer.addr = %self.caller.address,
                    pod = hello.pod,
                    reason = error.code(),
                    "sidecar refused"
                );
                return End::Refused("hello", Status::permission_denied(error.to_string()));
            }
        };
        let connected = Connected {
            shared: Arc::clone(&self.shared),
            id,
        };
        tracing::info!(
            peer.id = %self.caller.peer.id,
            pod = hello.pod,
            version = hello.version,
            "sidecar connected"
        );
        self.follow(&connected, requests).await
    }

    async fn hello(&self, requests: &mut Streaming<WatchRequest>) -> Result<Hello, End> {
        let bound = self
            .shared
            .clock
            .sleep(self.shared.config.limits.hello_timeout);
        let message = tokio::select! {
            message = requests.message() => message,
            () = bound => {
                let status = Status::deadline_exceeded("no hello");
                return Err(End::Refused("hello_timeout", status));
            }
        };
        let Ok(Some(request)) = message else {
            return Err(End::Gone);
        };
        match request.message {
            Some(Message::Hello(hello))
                if hello.pod.len() <= NAME_BYTES_MAX && hello.pod_uid.len() <= NAME_BYTES_MAX =>
            {
                Ok(hello)
            }
            _ => {
                let status = Status::invalid_argument("a stream begins with a hello");
                Err(End::Refused("no_hello", status))
            }
        }
    }

    /// Waits a while for a pod that the watch has not shown yet.
    async fn admit(&self, hello: &Hello) -> Result<SidecarId, HelloError> {
        let greeting = Greeting {
            id: &self.caller.peer.id,
            address: self.caller.address.ip().to_canonical(),
            pod: &hello.pod,
            uid: &hello.pod_uid,
        };
        let mut changed = self.shared.hub.subscribe();
        let mut bound = self
            .shared
            .clock
            .sleep(self.shared.config.limits.hello_timeout);
        loop {
            changed.mark_unchanged();
            let error = match self.shared.hub.look(|index| index.check(&greeting)) {
                Ok(_) => return self.shared.hub.change(|index| index.connect(&greeting)),
                Err(error) if !error.may_pass() => return Err(error),
                Err(error) => error,
            };
            tokio::select! {
                changed = changed.changed() => if changed.is_err() {
                    return Err(error);
                },
                () = &mut bound => return Err(error),
            }
        }
    }

    async fn follow(&self, connected: &Connected, requests: &mut Streaming<WatchRequest>) -> End {
        let hub = &self.shared.hub;
        let waker = hub.waker(connected.id);
        let mut epoch = self.shared.store.subscribe();
        let end = self.end_of_certificates();
        let mut certificates_end = self.shared.clock.sleep_until(end);
        let mut is_owed = true;
        loop {
            tokio::select! {
                permit = self.answers.reserve(), if is_owed => {
                    let Ok(permit) = permit else { return End::Gone };
                    match hub.change(|index| index.take(connected.id)) {
                        Some(response) => {
                            self.shared.metrics.responded();
                            permit.send(Ok(response));
                        }
                        None => is_owed = false,
                    }
                }
                () = waker.notified() => {
                    if hub.look(|index| index.is_over(connected.id)) {
                        let status = Status::not_found("the pod is gone, or has come again");
                        return End::Refused("over", status);
                    }
                    is_owed = true;
                }
                message = requests.message() => match message {
                    Ok(Some(request)) => if let Err(end) = self.hear(connected.id, request) {
                        return end;
                    },
                    _ => return End::Gone,
                },
                changed = epoch.changed() => if changed.is_err() || !self.is_trusted() {
                    let status = Status::unauthenticated("the certificate is not believed any more");
                    return End::Refused("untrusted", status);
                },
                () = &mut certificates_end => {
                    let status = Status::unauthenticated("a certificate of this connection has ended");
                    return End::Refused("certificate_ended", status);
                }
            }
        }
    }

    fn hear(&self, id: SidecarId, request: WatchRequest) -> Result<(), End> {
        let target = |text: &str| {
            text.parse::<Target>().map_err(|error| {
                End::Refused("destination", Status::invalid_argument(error.to_string()))
            })
        };
        let hub = &self.shared.hub;
        match request.message {
            Some(Message::Subscribe(said)) => {
                let target = target(&said.destination)?;
                hub.change(|index| index.subscribe(id, target));
            }
            Some(Message::Unsubscribe(said)) => {
                let target = target(&said.destination)?;
                hub.change(|index| index.unsubscribe(id, &target));
            }
            Some(Message::Acknowledge(said)) => {
                let is_known = hub.change(|index| index.acknowledge(id, &said));
                self.shared
                    .metrics
                    .acknowledged(match (is_known, said.refusal.is_empty()) {
                        (false, _) => "unknown",
                        (true, true) => "live",
                        (true, false) => "refused",
                    });
            }
            Some(Message::Hello(_)) => {
                let status = Status::invalid_argument("a stream has one hello");
                return Err(End::Refused("second_hello", status));
            }
            // Of a newer version, perhaps.
            None => {}
        }
        Ok(())
    }

    fn is_trusted(&self) -> bool {
        let current = self.shared.store.current();
        current.is_some_and(|current| current.still_trusts(&self.caller.peer).is_ok())
    }

    fn end_of_certificates(&self) -> SystemTime {
        self.caller.peer.not_after
    }
}

/// A sidecar that is in the index for as long as its stream lives.
struct Connected {
    shared: Arc<Shared>,
    id: SidecarId,
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.shared.hub.disconnect(self.id);
    }
}
