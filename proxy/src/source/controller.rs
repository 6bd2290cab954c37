//! What the controller of a cluster streams: policies, destinations, and facts of the own pod.
//!
//! Invariants: exactly the controller's identity is at the other end before a byte of a request is
//! sent; nothing counts before the controller has said that it is complete, and after a new
//! connection what counted before stays in force until then; a controller that is gone changes
//! nothing; every wait, and everything that is kept, has a bound.

mod answer;
mod follow;
mod held;
mod outbox;

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use sidegate_api::control as proto;
use sidegate_api::control::control_client::ControlClient;
use sidegate_mesh::{SpiffeId, SpiffeIdError};
use sidegate_mtls::{Connector, HandshakeError, Peer, control_plane_id};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tracing::{debug, info, warn};

use super::{Publisher, Report};
use crate::config::absolute;
use crate::destinations::Destinations;
use crate::shared::Shared;
use follow::Known;
use outbox::{Outbox, requests};

/// The authority of each request; nobody resolves it.
const AUTHORITY: &str = "http://sidegate-controller";
/// Bound for a look-up of addresses, and for the head of the stream's answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of one message.
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// How often a quiet controller is asked whether it is there, and how long it may take to say so.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));
/// The pause after the first failure, and the longest one.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A stream that lived this long was a good one: the next failure is a first one.
const LIVED: Duration = Duration::from_secs(30);

/// Follows the controller and publishes what it says.
pub(crate) struct ControllerSource {
    address: String,
    shared: Arc<Shared>,
    destinations: Arc<Destinations>,
    publisher: Publisher,
    known: Known,
    /// Why the controller was lost, as it was said last.
    said: String,
}

/// Why there is no stream, or no longer.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the addresses of {address} are not known: {reason}")]
    Addresses { address: String, reason: String },
    #[error("the controller at {address} cannot be reached: {source}")]
    Unreachable {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("what answers at {address} is not the controller: {}", chain(source))]
    NotTheController {
        address: SocketAddr,
        source: HandshakeError,
    },
    #[error("this workload has no identity of the mesh: {0}")]
    Identity(#[from] SpiffeIdError),
    #[error("the controller refused with {code:?}: {message}")]
    Refused { code: Code, message: String },
    #[error("the connection to the controller failed: {0}")]
    Connection(#[from] tonic::transport::Error),
    #[error("the controller did not answer within {after:?}")]
    Timeout { after: Duration },
    #[error("the controller ended the stream")]
    Closed,
    #[error("the controller did not say within {after:?} that it is complete")]
    Incomplete { after: Duration },
    #[error("the controller is no longer trusted: {0}")]
    Distrusted(&'static str),
    #[error("the certificate of one end is about to end")]
    CertificateEnds,
    #[error(transparent)]
    TooMuch(#[from] held::TooMuch),
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        Self::Refused {
            code: status.code(),
            message: status.message().to_owned(),
        }
    }
}

impl ControllerSource {
    /// Will follow the controller at `address`, `HOST:PORT`.
    pub(crate) fn new(address: String, shared: Arc<Shared>) -> Self {
        let destinations = shared.destinations.clone().unwrap_or_else(|| {
            let (limits, metrics) = (&shared.config.limits, &shared.metrics);
            Arc::new(Destinations::new(
                limits,
                metrics,
                Arc::clone(&shared.clock),
            ))
        });
        Self {
            address,
            destinations,
            publisher: Publisher::new(&shared),
            known: Known::default(),
            said: String::new(),
            shared,
        }
    }

    /// Where the last reading can be seen.
    pub(crate) fn report(&self) -> Report {
        self.publisher.report()
    }

    /// Follows the controller for ever.
    pub(crate) async fn run(mut self) {
        let mut failures = 0;
        loop {
            self.credentials().await;
            let begun = self.shared.clock.now();
            let ended = self.try_all().await;
            self.shared.metrics.controller_connected.set(0);
            self.destinations.set_connected(false);
            let lived = self.shared.clock.now().duration_since(begun);
            if lived.is_ok_and(|lived| lived >= LIVED) {
                failures = 0;
            }
            if matches!(ended, Ended::CertificateEnds) {
                // Nothing is wrong; the next one is made with the certificate that is there by now.
                info!("stream to the controller ends with its certificate");
            } else {
                self.publisher.lose(ended.to_string());
            }
            let pause = pause(failures);
            failures = failures.saturating_add(1);
            self.say(&ended, pause);
            self.shared.clock.sleep(pause).await;
        }
    }

    /// Waits for an SVID, without which the controller would not know us.
    async fn credentials(&self) {
        let credentials = &self.shared.credentials;
        let mut epochs = credentials.subscribe();
        while credentials.current().is_none() {
            if epochs.changed().await.is_err() {
                // The store is shared, so it outlives this; without it there is nothing to do.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Follows the first controller that answers, to the end of its stream; returns why the last
    /// one that was tried would not do.
    async fn try_all(&mut self) -> Ended {
        let addresses = match self.addresses().await {
            Ok(addresses) => addresses,
            Err(ended) => return ended,
        };
        let mut last = Ended::Addresses {
            address: self.address.clone(),
            reason: "there are none".to_owned(),
        };
        for address in addresses {
            match self.open(address).await {
                Ok((messages, outbox, peer)) => {
                    info!(peer.addr = %address, "controller found");
                    return self.follow(messages, &outbox, &peer).await;
                }
                Err(error) => {
                    debug!(peer.addr = %address, %error, "controller not found");
                    last = error;
                }
            }
        }
        last
    }

    /// Every address of the controller, in an order of its own for each attempt.
    async fn addresses(&self) -> Result<Vec<SocketAddr>, Ended> {
        let unknown = |reason: String| Ended::Addresses {
            address: self.address.clone(),
            reason,
        };
        let look_up = tokio::net::lookup_host(absolute(&self.address));
        let found = self.within(CALL_TIMEOUT, look_up).await?;
        let mut addresses: Vec<SocketAddr> =
            found.map_err(|error| unknown(error.to_string()))?.collect();
        fastrand::shuffle(&mut addresses);
        Ok(addresses)
    }

    /// One stream to one controller, which has said that it takes us.
    async fn open(
        &self,
        address: SocketAddr,
    ) -> Result<(Streaming<proto::WatchResponse>, Arc<Outbox>, Peer), Ended> {
        let timeout = self.shared.config.limits.connect_timeout;
        let (stream, peer) = self.within(timeout, self.connect(address)).await??;
        let channel = self.within(timeout, channel(stream)).await??;
        let outbox = Arc::new(Outbox::default());
        // Whatever was said on another stream is not known on this one.
        self.destinations.set_connected(true);
        let (said, calls) = (Arc::clone(&outbox), Arc::clone(&self.destinations));
        let requests = requests(self.hello(), said, calls);
        let mut client = ControlClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let answer = self.within(CALL_TIMEOUT, client.watch(requests)).await??;
        Ok((answer.into_inner(), outbox, peer))
    }

    async fn connect(&self, address: SocketAddr) -> Result<(TlsStream<TcpStream>, Peer), Ended> {
        let unreachable = |source| Ended::Unreachable { address, source };
        let io = TcpStream::connect(address).await.map_err(unreachable)?;
        io.set_nodelay(true).map_err(unreachable)?;
        let expected = self.controller_id()?;
        let connector = Connector::control_plane(
            Arc::clone(&self.shared.credentials),
            self.shared.config.limits.handshake_timeout,
            Arc::clone(&self.shared.clock),
        );
        match connector.connect(io, &expected).await {
            Ok(connected) => Ok(connected),
            Err(HandshakeError::Io(source)) => Err(unreachable(source)),
            Err(source) => Err(Ended::NotTheController { address, source }),
        }
    }

    fn controller_id(&self) -> Result<SpiffeId, SpiffeIdError> {
        control_plane_id(&self.shared.workload.trust_domain, "sidegate-controller")
    }

    fn hello(&self) -> proto::Hello {
        let pod = self.shared.config.pod.as_ref();
        proto::Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pod: pod.map(|pod| pod.name.clone()).unwrap_or_default(),
            pod_uid: pod.map(|pod| pod.uid.clone()).unwrap_or_default(),
        }
    }

    async fn within<F: Future>(&self, bound: Duration, call: F) -> Result<F::Output, Ended> {
        tokio::select! {
            biased;
            output = call => Ok(output),
            () = self.shared.clock.sleep(bound) => Err(Ended::Timeout { after: bound }),
        }
    }

    /// The same words are not said again and again.
    fn say(&mut self, ended: &Ended, retry_in: Duration) {
        let words = ended.to_string();
        if words == self.said {
            debug!(error = words, ?retry_in, "controller still not there");
        } else {
            warn!(
                error = words,
                ?retry_in,
                "no controller, what is known stays in force"
            );
            self.said = words;
        }
    }
}

impl fmt::Debug for ControllerSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControllerSource")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// HTTP/2 on a connection that is made and authenticated already; it is handed over once, so that
/// the channel cannot make another one by itself.
async fn channel(stream: TlsStream<TcpStream>) -> Result<Channel, tonic::transport::Error> {
    let ready = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
    let connector = tower::service_fn(move |_: http::Uri| {
        let stream = ready.lock().unwrap_or_else(PoisonError::into_inner).take();
        std::future::ready(stream.ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe)))
    });
    Endpoint::from_static(AUTHORITY)
        .http2_keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
}

/// Twice as long after each failure, up to the longest, and anything from half of that on: the
/// sidecars of a cluster must not come back all at once.
fn pause(failures: u32) -> Duration {
    let longest = PAUSE.0.saturating_mul(1 << failures.min(16)).min(PAUSE.1);
    longest.mul_f64(0.5 + fastrand::f64() / 2.0)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words.push_str(": ");
        words.push_str(&error.to_string());
        source = error.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_differ() {
        for (failures, longest) in [(0, 100), (1, 200), (3, 800), (7, 10_000), (900, 10_000)] {
            let longest = Duration::from_millis(longest);
            let pauses: Vec<Duration> = (0..50).map(|_| pause(failures)).collect();
            for pause in &pauses {
                assert!(
                    *pause >= longest / 2 && *pause <= longest,
                    "{failures}: {pause:?}"
                );
            }
            assert!(pauses.iter().any(|pause| *pause != pauses[0]));
        }
    }
}
