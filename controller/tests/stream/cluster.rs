//! An API server in the test's own process: lists, watches, writes, with versions and conflicts.

use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::watch;

type Answer = Response<BoxBody<Bytes, Infallible>>;

/// Clones share one state.
#[derive(Clone)]
pub struct Cluster(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    version: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// By collection, namespace and name.
    objects: BTreeMap<(String, String, String), Value>,
    /// Version, collection, kind of change, object.
    log: Vec<(u64, String, &'static str, Value)>,
    /// Collections that answer 503.
    failing: HashSet<String>,
    /// Every write: method and path.
    writes: Vec<String>,
}

/// Which object or collection a path names.
struct Place {
    collection: String,
    namespace: String,
    name: Option<String>,
    is_status: bool,
}

impl Place {
    fn of(path: &str) -> Self {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let prefix = if parts[0] == "api" { 2 } else { 3 };
        let rest = &parts[prefix..];
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            rest => ("", rest),
        };
        Self {
            collection: format!("{}/{}", parts[..prefix].join("/"), rest[0]),
            namespace: namespace.to_owned(),
            name: rest.get(1).map(|name| (*name).to_owned()),
            is_status: rest.get(2) == Some(&"status"),
        }
    }
}

impl Cluster {
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            state: Mutex::default(),
            version: watch::Sender::new(0),
        }))
    }

    pub fn client(&self) -> kube::Client {
        kube::Client::new(self.clone(), "default")
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let output = change(&mut self.0.state.lock().unwrap());
        let version = self.0.state.lock().unwrap().version;
        self.0.version.send_replace(version);
        output
    }

    /// Puts an object there, such as `("api/v1/pods", …)`; its generation rises with its spec.
    pub fn put(&self, collection: &str, object: Value) {
        self.with(|state| state.put(collection, object));
    }

    pub fn delete(&self, collection: &str, namespace: &str, name: &str) {
        self.with(|state| {
            let key = (collection.to_owned(), namespace.to_owned(), name.to_owned());
            let object = state.objects.remove(&key).expect("an object to delete");
            state.record(collection, "DELETED", object);
        });
    }

    pub fn get(&self, collection: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = (collection.to_owned(), namespace.to_owned(), name.to_owned());
        self.with(|state| state.objects.get(&key).cloned())
    }

    pub fn list(&self, collection: &str) -> Vec<Value> {
        self.with(|state| state.of(collection).cloned().collect())
    }

    /// Makes a collection answer 503, or not any more.
    pub fn fail(&self, collection: &str, fails: bool) {
        self.with(|state| {
            if fails {
                state.failing.insert(collection.to_owned());
            } else {
                state.failing.remove(collection);
            }
        });
    }

    /// Writes whose path contains this.
    pub fn writes(&self, path: &str) -> usize {
        self.with(|state| {
            state
                .writes
                .iter()
                .filter(|write| write.contains(path))
                .count()
        })
    }

    /// Waits until something holds of the cluster.
    pub async fn wait_for<T>(&self, what: &str, look: impl Fn(&Self) -> Option<T>) -> T {
        let mut changed = self.0.version.subscribe();
        let waiting = async {
            loop {
                changed.mark_unchanged();
                if let Some(found) = look(self) {
                    return found;
                }
                // Some things are looked at that no write of the cluster announces.
                drop(
                    tokio::time::timeout(std::time::Duration::from_millis(50), changed.changed())
                        .await,
                );
            }
        };
        let waited = tokio::time::timeout(crate::PATIENCE, waiting).await;
        waited.unwrap_or_else(|_| panic!("never came: {what}"))
    }

    async fn answer(self, request: Request<Body>) -> Answer {
        let (parts, body) = request.into_parts();
        let place = Place::of(parts.uri.path());
        let body = body.collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let query = parts.uri.query().unwrap_or_default().to_owned();
        if self.with(|state| state.failing.contains(&place.collection)) {
            return failure(StatusCode::SERVICE_UNAVAILABLE, "failing");
        }
        match (&parts.method, &place.name) {
            (&Method::GET, None) if query.contains("watch=true") => self.watch(place.collection, &query),
            (&Method::GET, None) => self.with(|state| {
                let items: Vec<Value> = state.of(&place.collection).cloned().collect();
                let metadata = json!({ "resourceVersion": state.version.to_string() });
                success(&json!({ "kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items }))
            }),
            _ => self.with(|state| {
                if parts.method != Method::GET {
                    state.writes.push(format!("{} {}", parts.method, parts.uri.path()));
                }
                state.one(&parts.method, &place, body)
            }),
        }
    }

    fn watch(self, collection: String, query: &str) -> Answer {
        let from = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("resourceVersion="));
        let from: u64 = from
            .and_then(|version| version.parse().ok())
            .unwrap_or_default();
        let changed = self.0.version.subscribe();
        let start = (self, collection, from, changed);
        let stream = futures_util::stream::unfold(
            start,
            |(cluster, collection, mut from, mut changed)| async move {
                loop {
                    changed.mark_unchanged();
                    let lines = cluster
                        .0
                        .state
                        .lock()
                        .unwrap()
                        .since(&collection, &mut from);
                    if !lines.is_empty() {
                        let frame = Ok::<_, Infallible>(Frame::data(Bytes::from(lines)));
                        return Some((frame, (cluster, collection, from, changed)));
                    }
                    changed.changed().await.ok()?;
                }
            },
        );
        Response::new(BodyExt::boxed(StreamBody::new(SyncStream(Mutex::new(
            Box::pin(stream),
        )))))
    }
}

/// A stream that is only ever polled by one, and may be shared all the same.
struct SyncStream<S>(Mutex<std::pin::Pin<Box<S>>>);

impl<S: futures_util::Stream> futures_util::Stream for SyncStream<S> {
    type Item = S::Item;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<S::Item>> {
        self.0.lock().unwrap().as_mut().poll_next(context)
    }
}

impl State {
    fn of(&self, collection: &str) -> impl Iterator<Item = &Value> {
        let all = self.objects.iter();
        all.filter(move |((known, _, _), _)| *known == collection)
            .map(|(_, object)| object)
    }

    fn put(&mut self, collection: &str, mut object: Value) -> Value {
        let text = |object: &Value, field: &str| {
            object["metadata"][field]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        let key = (
            collection.to_owned(),
            text(&object, "namespace"),
            text(&object, "name"),
        );
        let before = self.objects.get(&key).cloned();
        let generation = before.as_ref().map_or(0, |before| {
            before["metadata"]["generation"]
                .as_i64()
                .unwrap_or_default()
        });
        let same_spec = before
            .as_ref()
            .is_some_and(|before| before["spec"] == object["spec"]);
        object["metadata"]["generation"] = json!(if same_spec {
            generation
        } else {
            generation + 1
        });
        object["metadata"]["resourceVersion"] = json!((self.version + 1).to_string());
        if text(&object, "uid").is_empty() {
            let known = before.as_ref().map(|before| text(before, "uid"));
            object["metadata"]["uid"] = json!(known.unwrap_or_else(|| format!("uid-{}", key.2)));
        }
        let change = if before.is_some() {
            "MODIFIED"
        } else {
            "ADDED"
        };
        self.objects.insert(key, object.clone());
        self.record(collection, change, object.clone());
        object
    }

    fn record(&mut self, collection: &str, change: &'static str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.log
            .push((self.version, collection.to_owned(), change, object));
    }

    fn since(&self, collection: &str, from: &mut u64) -> String {
        let new = self
            .log
            .iter()
            .filter(|(version, known, _, _)| *version > *from && known == collection);
        let lines = new.map(|(_, _, change, object)| {
            format!("{}\n", json!({ "type": change, "object": object }))
        });
        let lines: String = lines.collect();
        *from = self.version;
        lines
    }

    fn one(&mut self, method: &Method, place: &Place, body: Value) -> Answer {
        let name = place
            .name
            .clone()
            .or_else(|| body["metadata"]["name"].as_str().map(str::to_owned));
        let key = (
            place.collection.clone(),
            place.namespace.clone(),
            name.unwrap(),
        );
        let before = self.objects.get(&key).cloned();
        match (method, before) {
            (&Method::GET, Some(object)) => success(&object),
            (&Method::POST, Some(_)) => failure(StatusCode::CONFLICT, "AlreadyExists"),
            (&Method::POST, None) => {
                let mut object = body;
                object["metadata"]["namespace"] = json!(place.namespace);
                success(&self.put(&place.collection, object))
            }
            (_, None) => failure(StatusCode::NOT_FOUND, "NotFound"),
            (_, Some(before)) => {
                let said = &body["metadata"]["resourceVersion"];
                if said.is_string() && *said != before["metadata"]["resourceVersion"] {
                    return failure(StatusCode::CONFLICT, "Conflict");
                }
                let object = if place.is_status {
                    let mut object = before;
                    object["status"] = body["status"].clone();
                    object
                } else {
                    body
                };
                success(&self.put(&place.collection, object))
            }
        }
    }
}

impl tower::Service<Request<Body>> for Cluster {
    type Response = Answer;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Answer, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let cluster = self.clone();
        Box::pin(async move { Ok(cluster.answer(request).await) })
    }
}

fn success(object: &Value) -> Answer {
    Response::new(Full::new(Bytes::from(object.to_string())).boxed())
}

fn failure(code: StatusCode, reason: &str) -> Answer {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": reason, "reason": reason, "code": code.as_u16(),
    });
    let mut answer = success(&status);
    *answer.status_mut() = code;
    answer
}
