//! The logs of many sidecars: what there is, and what comes.
//!
//! Always true: a line is given once, whatever breaks off and is taken up again; streams, waiting
//! lines and the length of a line are bounded; what ends with its pod ends quietly.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use http_body_util::BodyExt;
use hyper::http::response::Response;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::LogParams;
use kube::client::Body;
use kube::runtime::watcher;
use kube::{Api, Resource, ResourceExt};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::sidecars::{CONTAINER, Selection, Sidecar};
use super::{Cluster, is_missing, is_refused};
use crate::logs::source::{LINE_BYTES_MAX, Raw};

/// Logs that are read at once when they are read to their ends.
const READ_MAX: usize = 16;

/// Logs that are followed at once.
pub(crate) const FOLLOWED_MAX: usize = 256;

/// Lines that wait to be taken.
const WAITING_MAX: usize = 1024;

/// The kubelet counts `since` by its own clock.
const CLOCKS_DIFFER: Duration = Duration::from_secs(5);

const BACKOFF_MIN: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Largest refusal that is read.
const REFUSAL_BYTES_MAX: usize = 64 * 1024;

/// What comes of following logs.
#[derive(Debug)]
pub(crate) enum Event {
    Line(Line),
    /// Something that whoever reads should know.
    Note(String),
}

/// A line of a sidecar's log.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    /// The line; its file is `namespace/pod`.
    pub(crate) raw: Raw,
    /// Whose sidecar it is: `namespace/service-account`.
    pub(crate) workload: Arc<str>,
    /// When it was written, by the node's clock.
    pub(crate) written: Option<OffsetDateTime>,
}

/// How far a log was read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Place {
    last: Option<OffsetDateTime>,
    number: u64,
    restarts: i32,
}

/// Which logs are read, and from when on.
#[derive(Clone)]
pub(crate) struct Logs {
    pub(crate) cluster: Cluster,
    pub(crate) selection: Selection,
    pub(crate) since: Option<Duration>,
}

/// Why a log could not be read.
enum Failure {
    Api(kube::Error),
    /// Nobody takes the lines any more.
    Unwanted,
}

type Lines = mpsc::Sender<Event>;

impl Logs {
    /// Reads what these sidecars have written, those of a container before the last restart
    /// included, and gives `each` every line. Returns how far each was read, by the pods' UIDs.
    ///
    /// # Errors
    ///
    /// When the cluster refuses. A log that cannot be read for another reason is a note.
    pub(crate) async fn gather(
        &self,
        sidecars: &[Sidecar],
        mut each: impl FnMut(Event),
    ) -> anyhow::Result<HashMap<String, Place>> {
        let (lines, mut events) = mpsc::channel(WAITING_MAX);
        let room = Arc::new(Semaphore::new(READ_MAX));
        let mut readers = JoinSet::new();
        for sidecar in sidecars {
            let (logs, sidecar, lines) = (self.clone(), sidecar.clone(), lines.clone());
            let room = Arc::clone(&room);
            readers.spawn(async move {
                let _place = room.acquire_owned().await;
                let read = logs.read_all(&sidecar, &lines).await;
                read.map(|place| (sidecar.uid, place))
            });
        }
        drop(lines);
        while let Some(event) = events.recv().await {
            each(event);
        }
        let mut places = HashMap::new();
        while let Some(read) = readers.join_next().await {
            let (uid, place) = read??;
            places.insert(uid, place);
        }
        Ok(places)
    }

    async fn read_all(&self, sidecar: &Sidecar, lines: &Lines) -> anyhow::Result<Place> {
        let mut place = Place {
            restarts: sidecar.restarts,
            ..Place::default()
        };
        let previous = (sidecar.restarts > 0).then_some(true);
        for previous in previous.into_iter().chain([false]) {
            let parameters = LogParams {
                previous,
                ..self.parameters(&place)
            };
            match self.read(sidecar, &parameters, &mut place, lines).await {
                Ok(()) | Err(Failure::Unwanted) => {}
                Err(Failure::Api(error)) if is_refused(&error) => {
                    return Err(self.cluster.explain(error, "reading logs"));
                }
                Err(Failure::Api(error)) => self.note(sidecar, error, lines).await,
            }
        }
        Ok(place)
    }

    /// Says of a log that it cannot be read, unless there is none (yet, or any more).
    async fn note(&self, sidecar: &Sidecar, error: kube::Error, lines: &Lines) {
        if matches!(&error, kube::Error::Api(status) if matches!(status.code, 400 | 404)) {
            tracing::debug!(pod = sidecar.name(), %error, "there is no log");
            return;
        }
        let doing = format!("reading the log of {}", sidecar.name());
        let note = format!("{:#}", self.cluster.explain(error, &doing));
        lines.send(Event::Note(note)).await.ok();
    }

    /// Follows the logs of every sidecar that is meant, those of new pods too, each from its place
    /// on, until nobody takes the lines any more.
    ///
    /// # Errors
    ///
    /// When the cluster refuses.
    pub(crate) async fn follow(
        self,
        mut places: HashMap<String, Place>,
        lines: Lines,
    ) -> anyhow::Result<()> {
        let api = self.cluster.api::<Pod>(&self.selection.scope);
        let mut pods = std::pin::pin!(watcher(api, watcher::Config::default()));
        let wanted = lines.clone();
        let mut followers = Followers::new(self, lines);
        let mut backoff = BACKOFF_MIN;
        loop {
            let event = tokio::select! {
                event = pods.next() => event,
                ended = followers.next_end() => { ended?; continue; }
                () = wanted.closed() => return Ok(()),
            };
            match event {
                Some(Ok(event)) => {
                    backoff = BACKOFF_MIN;
                    followers.take(event, &mut places);
                }
                Some(Err(error)) => {
                    if let Some(error) = refusal(error) {
                        return Err(followers.logs.cluster.explain(error, "watching pods"));
                    }
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                }
                None => return Ok(()),
            }
        }
    }

    async fn follow_one(
        &self,
        sidecar: &Sidecar,
        mut place: Place,
        lines: &Lines,
    ) -> anyhow::Result<()> {
        let mut backoff = BACKOFF_MIN;
        loop {
            let before = place.last;
            let parameters = LogParams {
                follow: true,
                ..self.parameters(&place)
            };
            let broke = match self.read(sidecar, &parameters, &mut place, lines).await {
                Ok(()) => false,
                Err(Failure::Unwanted) => return Ok(()),
                Err(Failure::Api(error)) if is_refused(&error) => {
                    return Err(self.cluster.explain(error, "reading logs"));
                }
                Err(Failure::Api(error)) => {
                    tracing::debug!(pod = sidecar.name(), %error, "the log broke off");
                    true
                }
            };
            if !self.goes_on(sidecar, &mut place, (broke, lines)).await {
                return Ok(());
            }
            if place.last != before {
                backoff = BACKOFF_MIN;
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Whether more may come of a log whose stream ended; reads what a restart or the end of the
    /// pod has left behind.
    async fn goes_on(
        &self,
        sidecar: &Sidecar,
        place: &mut Place,
        (broke, lines): (bool, &Lines),
    ) -> bool {
        let pods = Api::<Pod>::namespaced(self.cluster.client(), &sidecar.namespace);
        let pod = match pods.get(&sidecar.pod).await {
            Ok(pod) if pod.uid().as_deref() != Some(&sidecar.uid) => return false,
            Ok(pod) => Sidecar::of(&pod),
            Err(error) => return !is_missing(&error),
        };
        let Some(now) = pod else {
            return false;
        };
        let restarted = now.restarts > place.restarts;
        place.restarts = now.restarts;
        if restarted || (now.ended && broke) {
            let parameters = LogParams {
                previous: restarted,
                ..self.parameters(place)
            };
            // What the last stream did not give; it may be gone, too.
            self.read(sidecar, &parameters, place, lines).await.ok();
        }
        !now.ended
    }

    fn parameters(&self, place: &Place) -> LogParams {
        let seconds = |since: Duration| (since + CLOCKS_DIFFER).as_secs().max(1);
        let since_time = place
            .last
            .and_then(|last| Timestamp::from_second(last.unix_timestamp()).ok());
        LogParams {
            container: Some(CONTAINER.to_owned()),
            timestamps: true,
            since_seconds: match since_time {
                Some(_) => None,
                None => self.since.and_then(|since| seconds(since).try_into().ok()),
            },
            since_time,
            ..LogParams::default()
        }
    }

    /// Reads one stream to its end; passes over what was given before.
    async fn read(
        &self,
        sidecar: &Sidecar,
        parameters: &LogParams,
        place: &mut Place,
        lines: &Lines,
    ) -> Result<(), Failure> {
        let mut body = self.open(sidecar, parameters).await.map_err(Failure::Api)?;
        let name: Arc<str> = sidecar.name().into();
        let workload: Arc<str> = sidecar.workload().into();
        let mut splitter = Splitter::default();
        let given = place.last;
        loop {
            let texts = match body.frame().await {
                Some(Ok(frame)) => splitter.push(frame.data_ref().map_or(&[][..], |data| data)),
                Some(Err(error)) => return Err(Failure::Api(error)),
                None => splitter.finish(),
            };
            for text in texts {
                let Some((written, text)) = place.take(&text, given) else {
                    continue;
                };
                let raw = Raw {
                    file: Arc::clone(&name),
                    number: place.number,
                    text,
                };
                let sent = lines
                    .send(Event::Line(Line {
                        raw,
                        workload: Arc::clone(&workload),
                        written,
                    }))
                    .await;
                sent.map_err(|_nobody| Failure::Unwanted)?;
            }
            if splitter.finished {
                return Ok(());
            }
        }
    }

    async fn open(&self, sidecar: &Sidecar, parameters: &LogParams) -> kube::Result<Body> {
        let path = Pod::url_path(&(), Some(&sidecar.namespace));
        let request = kube::core::Request::new(path).logs(&sidecar.pod, parameters);
        let request = request.map_err(kube::Error::BuildRequest)?;
        let response = self.cluster.client.send(request.map(Body::from)).await?;
        if response.status().is_success() {
            return Ok(response.into_body());
        }
        Err(refused(response).await)
    }
}

async fn refused(response: Response<Body>) -> kube::Error {
    let code = response.status().as_u16();
    let body = http_body_util::Limited::new(response.into_body(), REFUSAL_BYTES_MAX);
    let text = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return kube::Error::Service(error),
    };
    let status = serde_json::from_slice(&text).unwrap_or_else(|_plain| {
        let text = String::from_utf8_lossy(&text);
        kube::core::Status::failure(text.trim(), "").with_code(code)
    });
    kube::Error::Api(status.boxed())
}

/// The refusal in an error of a watch, if it is one.
fn refusal(error: watcher::Error) -> Option<kube::Error> {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => is_refused(&error).then_some(error),
        watcher::Error::WatchError(status) => {
            let error = kube::Error::Api(status);
            is_refused(&error).then_some(error)
        }
        watcher::Error::NoResourceVersion => None,
    }
}

impl Place {
    /// The time and the text of a line as the kubelet gives it, unless it is of those that were
    /// `given` by an earlier stream. Within a stream the times may be a little out of order.
    fn take(
        &mut self,
        line: &str,
        given: Option<OffsetDateTime>,
    ) -> Option<(Option<OffsetDateTime>, String)> {
        let stamped = line.split_once(' ').and_then(|(stamp, text)| {
            let written = OffsetDateTime::parse(stamp, &Rfc3339).ok()?;
            Some((written, text))
        });
        // The kubelet's own words, and the rest of a line that is too long, have no time.
        let Some((written, text)) = stamped else {
            self.number += 1;
            return Some((self.last, line.to_owned()));
        };
        if given.is_some_and(|given| written <= given) {
            return None;
        }
        self.last = self.last.max(Some(written));
        self.number += 1;
        (!text.trim().is_empty()).then(|| (Some(written), text.to_owned()))
    }
}

/// Cuts a stream of bytes into lines.
#[derive(Default)]
struct Splitter {
    partial: Vec<u8>,
    finished: bool,
}

impl Splitter {
    fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(part);
            let full = self.partial.len() as u64 >= LINE_BYTES_MAX;
            if full || self.partial.last() == Some(&b'\n') {
                lines.extend(self.line());
            }
        }
        lines
    }

    fn finish(&mut self) -> Vec<String> {
        self.finished = true;
        self.line().into_iter().collect()
    }

    fn line(&mut self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.partial);
        let text = text.trim_end_matches(['\n', '\r']).to_owned();
        self.partial.clear();
        (!text.is_empty()).then_some(text)
    }
}

/// Those who follow, one for each pod.
struct Followers {
    logs: Logs,
    lines: Lines,
    room: Arc<Semaphore>,
    /// UIDs of the pods that are followed, or were to their ends.
    known: HashSet<String>,
    /// UIDs that a new listing has named so far.
    listed: HashSet<String>,
    tasks: JoinSet<anyhow::Result<()>>,
    is_full: bool,
}

impl Followers {
    fn new(logs: Logs, lines: Lines) -> Self {
        Self {
            logs,
            lines,
            room: Arc::new(Semaphore::new(FOLLOWED_MAX)),
            known: HashSet::new(),
            listed: HashSet::new(),
            tasks: JoinSet::new(),
            is_full: false,
        }
    }

    /// The next end of a follower; never when there is none.
    async fn next_end(&mut self) -> anyhow::Result<()> {
        match self.tasks.join_next().await {
            Some(ended) => ended?,
            None => std::future::pending().await,
        }
    }

    fn take(&mut self, event: watcher::Event<Pod>, places: &mut HashMap<String, Place>) {
        match event {
            watcher::Event::Init => self.listed.clear(),
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                self.known.retain(|uid| listed.contains(uid));
                // A place is only for a pod that was there when the logs were gathered.
                places.clear();
            }
            watcher::Event::Delete(pod) => {
                self.known.remove(pod.uid().as_deref().unwrap_or_default());
            }
            watcher::Event::InitApply(pod) => {
                self.listed.extend(pod.uid());
                self.see(&pod, places);
            }
            watcher::Event::Apply(pod) => self.see(&pod, places),
        }
    }

    /// Follows a pod whose sidecar has begun to run, unless it is followed already.
    fn see(&mut self, pod: &Pod, places: &mut HashMap<String, Place>) {
        let sidecar = Sidecar::of(pod).filter(|sidecar| self.logs.selection.wanted.is(sidecar));
        let begun = |sidecar: &Sidecar| sidecar.running || sidecar.restarts > 0 || sidecar.ended;
        let Some(sidecar) = sidecar.filter(begun) else {
            return;
        };
        if !self.known.insert(sidecar.uid.clone()) {
            return;
        }
        if self.room.available_permits() == 0 && !std::mem::replace(&mut self.is_full, true) {
            let note = format!(
                "{FOLLOWED_MAX} sidecars are followed; others wait for their turn: name a WORKLOAD"
            );
            self.lines.try_send(Event::Note(note)).ok();
        }
        let place = places.remove(&sidecar.uid).unwrap_or_else(|| Place {
            restarts: sidecar.restarts,
            ..Place::default()
        });
        let (logs, lines, room) = (
            self.logs.clone(),
            self.lines.clone(),
            Arc::clone(&self.room),
        );
        self.tasks.spawn(async move {
            let _place = room.acquire_owned().await;
            logs.follow_one(&sidecar, place, &lines).await
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_given_is_not_given_again() {
        let mut place = Place::default();
        let mut take = |line: &str, given| place.take(line, given).map(|(_, text)| text);
        let one = "2026-11-24T07:00:00.1Z one";
        assert_eq!(take(one, None).as_deref(), Some("one"));
        let late = take("2026-11-24T07:00:00.09Z late", None);
        assert_eq!(late.as_deref(), Some("late"), "out of order in one stream");
        let given = place.last;
        let mut take = |line: &str| place.take(line, given).map(|(_, text)| text);
        assert_eq!(take(one), None);
        assert_eq!(take("2026-11-24T07:00:00.09Z late"), None);
        let two = take("2026-11-24T08:00:00.100000001+01:00 two");
        assert_eq!(two.as_deref(), Some("two"));
        assert_eq!(
            take("unable to retrieve").as_deref(),
            Some("unable to retrieve")
        );
    }

    #[test]
    fn lines_are_cut_where_they_end_and_where_they_are_too_long() {
        let mut splitter = Splitter::default();
        assert!(splitter.push(b"on").is_empty());
        assert_eq!(splitter.push(b"e\r\n\ntwo\nth"), ["one", "two"]);
        assert_eq!(splitter.finish(), ["th"]);
        let long = vec![b'x'; usize::try_from(LINE_BYTES_MAX).unwrap() + 1];
        let lines: usize = long
            .chunks(7000)
            .map(|part| splitter.push(part).len())
            .sum();
        assert_eq!(lines, 1);
    }
}
