//! A Kubernetes API server in this process: as much of one as a CA talks to.
//!
//! It keeps objects as JSON under their paths, gives each change a number, refuses a change of an
//! older version, and streams what has changed to who watches.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::StreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::sync::watch;

type Answer = Response<BoxBody<Bytes, Infallible>>;

#[derive(Clone)]
pub(crate) struct ApiServer {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
    /// Answers nobody while it says so.
    stalled: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<String, Value>,
    history: Vec<Change>,
    reviews: HashMap<String, Value>,
    requests: Vec<String>,
    down: bool,
}

/// Version, path, object before, object after.
type Change = (u64, String, Option<Value>, Option<Value>);

impl ApiServer {
    pub(crate) fn new() -> Self {
        Self {
            state: Arc::default(),
            changed: watch::Sender::new(0),
            stalled: watch::Sender::new(false),
        }
    }

    pub(crate) fn client(&self) -> kube::Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let server = server.clone();
            async move { server.answer(request).await }
        });
        kube::Client::new(service, "default")
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    // ---- What a test does --------------------------------------------------------------------

    pub(crate) fn get(&self, path: &str) -> Option<Value> {
        self.state().objects.get(path).cloned()
    }

    pub(crate) fn put(&self, path: &str, object: Value) {
        self.store(path, Some(object));
    }

    pub(crate) fn delete(&self, path: &str) -> Value {
        let object = self.get(path).expect("it was there");
        self.store(path, None);
        object
    }

    /// What the server says of a token.
    pub(crate) fn review(&self, token: &str, status: Value) {
        self.state().reviews.insert(token.to_owned(), status);
    }

    /// Whether anybody gets an answer.
    pub(crate) fn set_down(&self, down: bool) {
        self.state().down = down;
    }

    /// Whether every question waits for its answer.
    pub(crate) fn set_stalled(&self, stalled: bool) {
        self.stalled.send_replace(stalled);
    }

    /// Requests so far whose method and path begin like this.
    pub(crate) fn requests(&self, prefix: &str) -> usize {
        let state = self.state();
        let matching = state.requests.iter();
        matching
            .filter(|request| request.starts_with(prefix))
            .count()
    }

    // ---- What a client sees ------------------------------------------------------------------

    async fn answer(&self, request: Request<kube::client::Body>) -> Result<Answer, std::io::Error> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(std::io::Error::other)?;
        let body = body.to_bytes();
        let path = head.uri.path().to_owned();
        let query = head.uri.query().unwrap_or_default().to_owned();
        {
            let mut state = self.state();
            state.requests.push(format!("{} {path}", head.method));
            if state.down {
                return Err(std::io::Error::other("down"));
            }
        }
        let mut stalled = self.stalled.subscribe();
        let goes_on = stalled.wait_for(|stalled| !stalled).await;
        goes_on.map_err(std::io::Error::other)?;
        let accept = head.headers.get(http::header::ACCEPT);
        let only_metadata =
            accept.is_some_and(|accept| accept.to_str().unwrap().contains("PartialObjectMetadata"));
        if head.method == Method::GET && query.contains("watch=true") {
            return Ok(self.watch(&path, &query, only_metadata));
        }
        let object = || serde_json::from_slice::<Value>(&body).unwrap();
        let answered = match head.method {
            Method::GET => self.read(&path, &query, only_metadata),
            Method::POST if path.ends_with("/tokenreviews") => Ok(self.reviewed(&object())),
            Method::POST => {
                let object = object();
                let name = object["metadata"]["name"].as_str().unwrap();
                self.create(&format!("{path}/{name}"), object.clone())
            }
            Method::PUT => self.replace(&path, object()),
            Method::PATCH => Ok(self.apply(&path, object())),
            _ => Err((StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed")),
        };
        Ok(answered.map_or_else(
            |(code, reason)| failure(code, reason),
            |object| answer(StatusCode::OK, &object),
        ))
    }

    fn read(
        &self,
        path: &str,
        query: &str,
        only_metadata: bool,
    ) -> Result<Value, (StatusCode, &'static str)> {
        let state = self.state();
        if let Some(object) = state.objects.get(path) {
            return Ok(shown(object, only_metadata));
        }
        let is_list = ["/namespaces", "/configmaps"]
            .iter()
            .any(|kind| path.ends_with(kind));
        if !is_list {
            return Err((StatusCode::NOT_FOUND, "NotFound"));
        }
        let all = state.objects.iter();
        let items: Vec<Value> = all
            .filter(|(place, object)| is_in(path, place) && matches(query, Some(object)))
            .map(|(_, object)| shown(object, only_metadata))
            .collect();
        Ok(json!({
            "kind": "List",
            "apiVersion": "v1",
            "metadata": { "resourceVersion": state.version.to_string() },
            "items": items,
        }))
    }

    fn create(&self, path: &str, object: Value) -> Result<Value, (StatusCode, &'static str)> {
        if self.state().objects.contains_key(path) {
            return Err((StatusCode::CONFLICT, "AlreadyExists"));
        }
        self.store(path, Some(object));
        Ok(self.get(path).unwrap())
    }

    fn replace(&self, path: &str, object: Value) -> Result<Value, (StatusCode, &'static str)> {
        let present = self.get(path).ok_or((StatusCode::NOT_FOUND, "NotFound"))?;
        let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
        if version(&present) != version(&object) {
            return Err((StatusCode::CONFLICT, "Conflict"));
        }
        self.store(path, Some(object));
        Ok(self.get(path).unwrap())
    }

    /// Server-side apply by one manager, with force.
    fn apply(&self, path: &str, wanted: Value) -> Value {
        let mut object = self.get(path).unwrap_or_else(|| json!({}));
        let before = object.clone();
        merge(&mut object, wanted);
        if object != before {
            self.store(path, Some(object));
        }
        self.get(path).unwrap()
    }

    fn reviewed(&self, review: &Value) -> Value {
        let token = review["spec"]["token"].as_str().unwrap();
        assert_eq!(review["spec"]["audiences"], json!(["sidegate-ca"]));
        let rejected = json!({ "authenticated": false, "error": "not ours" });
        let status = self.state().reviews.get(token).cloned();
        json!({
            "kind": "TokenReview",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {},
            "spec": {},
            "status": status.unwrap_or(rejected),
        })
    }

    fn store(&self, path: &str, object: Option<Value>) {
        let version = {
            let mut state = self.state();
            state.version += 1;
            let version = state.version;
            let object = object.map(|mut object| {
                object["metadata"]["resourceVersion"] = json!(version.to_string());
                object
            });
            let before = match &object {
                Some(object) => state.objects.insert(path.to_owned(), object.clone()),
                None => state.objects.remove(path),
            };
            state
                .history
                .push((version, path.to_owned(), before, object));
            version
        };
        self.changed.send_replace(version);
    }

    fn watch(&self, path: &str, query: &str, only_metadata: bool) -> Answer {
        let from = parameter(query, "resourceVersion").unwrap_or_default();
        let from: u64 = from.parse().unwrap_or(0);
        let (server, path, query) = (self.clone(), path.to_owned(), query.to_owned());
        let follow = (from, self.changed.subscribe());
        let lines = futures_util::stream::unfold(follow, move |(seen, mut changed)| {
            let (server, path, query) = (server.clone(), path.clone(), query.clone());
            async move {
                changed.wait_for(|version| *version > seen).await.ok()?;
                let state = server.state();
                let news = state
                    .history
                    .iter()
                    .filter(|(version, place, ..)| *version > seen && is_in(&path, place));
                let mut text = String::new();
                for (version, _, before, after) in news {
                    let was = before.is_some() && matches(&query, before.as_ref());
                    let is = after.is_some() && matches(&query, after.as_ref());
                    let (kind, object) = match (was, is) {
                        (false, false) => continue,
                        (true, false) => ("DELETED", before),
                        (false, true) => ("ADDED", after),
                        (true, true) => ("MODIFIED", after),
                    };
                    let mut object = shown(object.as_ref().unwrap(), only_metadata);
                    object["metadata"]["resourceVersion"] = json!(version.to_string());
                    let event = json!({ "type": kind, "object": object });
                    text.push_str(&event.to_string());
                    text.push('\n');
                }
                let frame = Ok::<_, Infallible>(Frame::data(Bytes::from(text)));
                Some((frame, (state.version, changed.clone())))
            }
        });
        Response::new(BodyExt::boxed(StreamBody::new(Box::pin(lines).map(|f| f))))
    }
}

/// Whether an object's path is in a collection: of one namespace, or of all.
fn is_in(collection: &str, path: &str) -> bool {
    let Some((place, _name)) = path.rsplit_once('/') else {
        return false;
    };
    let kind = collection.rsplit('/').next().unwrap();
    place == collection
        || (place.ends_with(&format!("/{kind}"))
            && place.starts_with("/api/v1/namespaces/")
            && collection == format!("/api/v1/{kind}"))
}

fn parameter(query: &str, name: &str) -> Option<String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let mut found = pairs.filter(|(key, _)| *key == name);
    let value = found.next()?.1;
    Some(
        value
            .replace("%3D", "=")
            .replace("%2F", "/")
            .replace("%2C", ","),
    )
}

/// Whether an object is selected by name, or by one label.
fn matches(query: &str, object: Option<&Value>) -> bool {
    let Some(object) = object else {
        return false;
    };
    let field = parameter(query, "fieldSelector");
    let name = field
        .as_deref()
        .and_then(|field| field.strip_prefix("metadata.name="));
    if name.is_some_and(|name| object["metadata"]["name"] != name) {
        return false;
    }
    let label = parameter(query, "labelSelector");
    let label = label.as_deref().and_then(|label| label.split_once('='));
    label.is_none_or(|(key, value)| object["metadata"]["labels"][key] == value)
}

fn shown(object: &Value, only_metadata: bool) -> Value {
    if !only_metadata {
        return object.clone();
    }
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object["metadata"],
    })
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

fn answer(code: StatusCode, object: &Value) -> Answer {
    let body = Full::new(Bytes::from(object.to_string()));
    let mut response = Response::new(BodyExt::boxed(body));
    *response.status_mut() = code;
    response
}

fn failure(code: StatusCode, reason: &str) -> Answer {
    let status = json!({
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": reason,
        "code": code.as_u16(),
    });
    answer(code, &status)
}
