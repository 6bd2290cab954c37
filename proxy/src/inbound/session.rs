//! One HTTP/2 connection: of another sidecar, or of a caller in plaintext where its port takes such.
//!
//! Always true: the connection is told to go away before it ends, unless its peer is no longer
//! believed; from then on a new stream is answered with `REFUSED_STREAM`, which its caller may
//! retry elsewhere; at the certificate's end, and at the drain's, nothing goes on. A peer that
//! resets its calls, or sends frames of no call, faster than anybody has reason to loses its
//! connection.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::Request;
use tokio::sync::Notify;

use super::{Inbound, Target, handshake, request};
use crate::connections::{Ending, Link, LinkGuard};
use crate::socket::Carrier;
use crate::wire;
use crate::wire::flood::{Budget, Metered};
use crate::wire::keepalive;

/// How often a quiet peer is asked whether it is still there, and how long it may take to say so.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// Longest wait for the last frames of a connection that is being cut.
const FLUSH_MAX: Duration = Duration::from_millis(500);

/// The share of a certificate's remaining life that may be spent on going away.
const GOING_AWAY_SHARE: u32 = 4;

/// Calls that a peer may reset before their answer, at once and then in each second: far more than
/// callers give up, far less than a flood (CVE-2023-44487).
const RESETS: (u32, u32) = (1_000, 100);

/// SETTINGS, PINGs and other frames of no call, at once and then in each second: a sidecar sends a
/// few in a minute.
const IDLE_FRAMES: (u32, u32) = (200, 20);

/// One connection, as its calls see it.
pub(super) struct Session {
    pub(super) inbound: Arc<Inbound>,
    pub(super) link: Arc<Link>,
    /// Where its calls go, whatever they say; `None` where each names its port.
    pub(super) target: Option<Target>,
    resets: Mutex<Budget>,
    flood: Notify,
    frames: Arc<Notify>,
}

/// What may happen to a connection besides its calls.
enum Event {
    /// It ends now.
    End(End),
    /// It should take no new call.
    Leave,
    /// Its peer had better go.
    Farewell,
    /// Its peer does not answer any more.
    Silent,
}

/// What ends a connection at once.
#[derive(Clone, Copy)]
enum End {
    /// The earlier of the two certificates has ended.
    Expired,
    /// The peer is no longer believed.
    Cut,
    /// A drain has ended.
    Drained,
    /// The peer floods it; the code of the log.
    Flood(&'static str),
}

/// Boxed: its users hand it on, and an idle connection should hold it once.
type Http2 = Box<Connection<Metered<Carrier>, Bytes>>;

/// Serves the connection to its end.
pub(super) async fn run(
    inbound: &Arc<Inbound>,
    link: &LinkGuard,
    stream: Carrier,
    target: Option<Target>,
) {
    let clock = &inbound.shared.clock;
    let frames = Arc::new(Notify::new());
    let budget = Budget::new(IDLE_FRAMES, clock.now());
    let stream = Metered::new(stream, budget, Arc::clone(clock), Arc::clone(&frames));
    let Some(http2) = Box::pin(read_preface(inbound, link, stream)).await else {
        return;
    };
    let session = Arc::new(Session {
        inbound: Arc::clone(inbound),
        link: Arc::clone(link.link()),
        target,
        resets: Mutex::new(Budget::new(RESETS, clock.now())),
        flood: Notify::new(),
        frames,
    });
    session.serve(http2).await;
}

/// The connection behind its preface; nothing when there is none in time.
async fn read_preface(
    inbound: &Inbound,
    link: &LinkGuard,
    stream: Metered<Carrier>,
) -> Option<Http2> {
    let timeout = inbound.shared.config.limits.handshake_timeout;
    let handshake = tokio::select! {
        handshake = inbound.limits.server().handshake(stream) => handshake,
        () = inbound.shared.clock.sleep(timeout) => return None,
    };
    if handshake.is_err() {
        tracing::debug!(peer.addr = %link.link().address(), "inbound HTTP/2 preface refused");
    }
    handshake.ok().map(Box::new)
}

impl Session {
    async fn serve(self: &Arc<Self>, mut http2: Http2) {
        let mut events = self.events(&mut http2);
        let mut leaving = false;
        loop {
            tokio::select! {
                // What ends the connection comes before what it brings.
                biased;
                Some(event) = events.next() => match event {
                    // Told to go, and served until it has gone.
                    Event::Farewell if leaving => {}
                    Event::Farewell => http2.graceful_shutdown(),
                    Event::Leave => {
                        leaving = true;
                        http2.graceful_shutdown();
                    }
                    Event::End(end) => {
                        let reason = self.end(end);
                        return Box::pin(self.close(http2, reason)).await;
                    }
                    Event::Silent => return,
                },
                next = http2.accept() => match next {
                    Some(Ok((request, respond))) => self.begin(request, respond, leaving),
                    Some(Err(error)) => return self.broken(&error),
                    None => return,
                },
            }
        }
    }

    /// What may happen to the connection besides its calls. Only what was woken is polled: the
    /// connection itself is, for each of its calls.
    fn events<'a>(&'a self, http2: &mut Http2) -> FuturesUnordered<BoxFuture<'a, Event>> {
        let drain = &self.inbound.shared.drain;
        let alive = self.keepalive(http2);
        let events = FuturesUnordered::new();
        events.push(self.ended().map(Event::End).boxed());
        events.push(self.time_to_leave().map(|()| Event::Leave).boxed());
        events.push(alive.map(|()| Event::Silent).boxed());
        // Who connects to a workload that is known to end has no other to go to.
        if !drain.is_asked_to_leave() {
            events.push(drain.asked_to_leave().map(|()| Event::Farewell).boxed());
        }
        events
    }

    /// Waits for what ends the connection at once.
    async fn ended(&self) -> End {
        tokio::select! {
            biased;
            () = self.certificate_end() => End::Expired,
            _ = self.link.was_cut() => End::Cut,
            () = self.inbound.shared.drain.closed() => End::Drained,
            flood = self.flooded() => End::Flood(flood),
        }
    }

    /// Tells the calls why they end; the reason that the peer is told.
    fn end(&self, end: End) -> Reason {
        match end {
            End::Expired => {
                self.link.cut("expired");
                wire::certificate_ended()
            }
            End::Cut => wire::certificate_ended(),
            End::Drained => {
                self.link.end_calls(&Ending::Drained);
                Reason::NO_ERROR
            }
            End::Flood(flood) => {
                handshake::log_cut(&self.inbound.shared, &self.link, flood);
                self.link.end_calls(&Ending::Flood);
                Reason::ENHANCE_YOUR_CALM
            }
        }
    }

    /// Waits for a flood, and says which.
    async fn flooded(&self) -> &'static str {
        tokio::select! {
            () = self.flood.notified() => "reset_flood",
            () = self.frames.notified() => "frame_flood",
        }
    }

    /// A call was reset by the peer before its answer.
    pub(super) fn count_reset(&self) {
        let now = self.inbound.shared.clock.now();
        let mut resets = self.resets.lock().unwrap_or_else(PoisonError::into_inner);
        if !resets.spend(1, now) {
            self.flood.notify_one();
        }
    }

    /// The connection broke; when it was `h2` that would not take any more, that is on record.
    fn broken(&self, error: &h2::Error) {
        if error.reason() == Some(Reason::ENHANCE_YOUR_CALM) && error.is_library() {
            handshake::log_cut(&self.inbound.shared, &self.link, "frame_flood");
        }
    }

    /// Ends when the connection should take no new call: a drain, its certificate's coming end, or
    /// a long time without any call.
    async fn time_to_leave(&self) {
        let shared = &self.inbound.shared;
        tokio::select! {
            () = shared.drain.draining() => {}
            () = self.time_is_short() => {}
            () = self.unused() => {}
        }
    }

    /// Ends with the earlier of the two certificates; never where there is none.
    async fn certificate_end(&self) {
        match self.link.peer() {
            Some(peer) => self.inbound.shared.clock.sleep_until(peer.not_after).await,
            None => std::future::pending().await,
        }
    }

    /// Ends when the certificate's coming end is a reason to leave.
    async fn time_is_short(&self) {
        match self.link.peer() {
            Some(peer) => {
                let moment = self.going_away_at(peer.not_after);
                self.inbound.shared.clock.sleep_until(moment).await;
            }
            None => std::future::pending().await,
        }
    }

    /// `not_after` less the time that a drain takes, or less a share of what is left of a short
    /// life.
    fn going_away_at(&self, not_after: SystemTime) -> SystemTime {
        let shared = &self.inbound.shared;
        let left = not_after
            .duration_since(shared.clock.now())
            .unwrap_or_default();
        let lead = shared.config.drain_timeout.min(left / GOING_AWAY_SHARE);
        not_after.checked_sub(lead).unwrap_or(not_after)
    }

    /// Ends when no call was open and none began for the idle limit; at most twice as late.
    async fn unused(&self) {
        let limit = self.inbound.shared.config.limits.connection_idle_timeout;
        let mut begun = u64::MAX;
        loop {
            let now = self.link.begun();
            if begun == now && self.link.is_idle() {
                return;
            }
            begun = now;
            self.inbound.shared.clock.sleep(limit).await;
        }
    }

    /// Ends when the peer does not answer any more.
    fn keepalive(&self, http2: &mut Http2) -> impl Future<Output = ()> + use<> {
        let ping_pong = http2.ping_pong();
        let clock = Arc::clone(&self.inbound.shared.clock);
        async move {
            match ping_pong {
                Some(ping_pong) => {
                    keepalive::watch(ping_pong, clock, KEEPALIVE.0, KEEPALIVE.1).await;
                }
                None => std::future::pending().await,
            }
        }
    }

    fn begin(
        self: &Arc<Self>,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        leaving: bool,
    ) {
        if leaving {
            respond.send_reset(Reason::REFUSED_STREAM);
            return;
        }
        let session = Arc::clone(self);
        let tasks = self.inbound.shared.drain.tasks();
        // Boxed, since a task is moved several times before it runs, and this one is large.
        tasks.spawn(Box::pin(async move {
            request::serve(&session, request, respond).await;
        }));
    }

    /// Lets the calls, which have been told to end, say so, then says goodbye with `reason`.
    async fn close(&self, mut http2: Http2, reason: Reason) {
        let farewell = async {
            while !self.link.is_idle() {
                tokio::select! {
                    next = http2.accept() => match next {
                        Some(Ok((_, mut respond))) => respond.send_reset(Reason::REFUSED_STREAM),
                        Some(Err(_)) | None => return,
                    },
                    () = self.link.call_ended() => {}
                }
            }
            http2.graceful_shutdown();
            flush(&mut http2).await;
            http2.abrupt_shutdown(reason);
            while let Some(Ok(_)) = http2.accept().await {}
        };
        tokio::select! {
            () = farewell => {}
            () = self.inbound.shared.clock.sleep(FLUSH_MAX) => {}
        }
    }
}

/// Writes what is queued, as far as the socket takes it at once.
async fn flush(http2: &mut Http2) {
    std::future::poll_fn(|context| {
        // Pending or not: polling is what writes.
        drop(http2.poll_closed(context));
        std::task::Poll::Ready(())
    })
    .await;
}
