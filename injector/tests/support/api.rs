//! An API server in the test's own process: lists, watches, reads and patches a few objects.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;

type Sender = mpsc::UnboundedSender<Result<Frame<Bytes>, Infallible>>;
type Answer = Response<StreamBody<UnboundedReceiverStream<Result<Frame<Bytes>, Infallible>>>>;

/// Shared by everybody who calls it.
#[derive(Clone, Default)]
pub struct FakeApi(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    version: u64,
    /// By resource and name.
    objects: BTreeMap<(String, String), Value>,
    watchers: Vec<(String, Option<String>, Sender)>,
    /// Everything that happened: version, resource, name, line of the watch.
    events: Vec<(u64, String, String, String)>,
    patches: Vec<(String, Value)>,
    reads: usize,
    is_down: bool,
}

impl FakeApi {
    pub fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { api.answer(request).await }
        });
        kube::Client::new(service, "default")
    }

    /// Stores an object and tells whoever watches.
    pub fn put(&self, resource: &str, name: &str, mut object: Value) {
        let mut state = self.0.lock().unwrap();
        state.version += 1;
        object["metadata"]["name"] = name.into();
        object["metadata"]["resourceVersion"] = state.version.to_string().into();
        let key = (resource.to_owned(), name.to_owned());
        let was_there = state.objects.insert(key, object.clone()).is_some();
        state.tell(
            resource,
            name,
            if was_there { "MODIFIED" } else { "ADDED" },
            &object,
        );
    }

    pub fn get(&self, resource: &str, name: &str) -> Value {
        self.0.lock().unwrap().objects[&(resource.to_owned(), name.to_owned())].clone()
    }

    pub fn remove(&self, resource: &str, name: &str) {
        let mut state = self.0.lock().unwrap();
        state.version += 1;
        let key = (resource.to_owned(), name.to_owned());
        let mut object = state.objects.remove(&key).unwrap();
        object["metadata"]["resourceVersion"] = state.version.to_string().into();
        state.tell(resource, name, "DELETED", &object);
    }

    /// Answers nothing but 503 from now on, or as usual again; watches end.
    pub fn set_down(&self, is_down: bool) {
        let mut state = self.0.lock().unwrap();
        state.is_down = is_down;
        state.watchers.clear();
    }

    /// The patches so far: name and body.
    pub fn patches(&self) -> Vec<(String, Value)> {
        self.0.lock().unwrap().patches.clone()
    }

    /// How often a single object was read.
    pub fn reads(&self) -> usize {
        self.0.lock().unwrap().reads
    }

    async fn answer(&self, request: Request<Body>) -> Result<Answer, Infallible> {
        let (head, body) = request.into_parts();
        let path = head.uri.path().to_owned();
        let (_, path) = path.split_once("/v1/").unwrap();
        let (resource, named) = match path.split_once('/') {
            Some((resource, name)) => (resource, Some(name.to_owned())),
            None => (path, None),
        };
        let query = head.uri.query().unwrap_or_default().replace("%3D", "=");
        let selected = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("fieldSelector=metadata.name="));
        let selected = selected.map(str::to_owned);
        let body = body.collect().await.unwrap().to_bytes();
        let mut state = self.0.lock().unwrap();
        if state.is_down {
            return Ok(status(
                StatusCode::SERVICE_UNAVAILABLE,
                "ServiceUnavailable",
            ));
        }
        Ok(match (head.method, named) {
            (Method::GET, None) if query.contains("watch=true") => {
                let (sender, answer) = open(StatusCode::OK);
                state.replay(resource, selected.as_deref(), &query, &sender);
                state.watchers.push((resource.to_owned(), selected, sender));
                answer
            }
            (Method::GET, None) => state.list(resource, selected.as_deref()),
            (Method::GET, Some(name)) => {
                state.reads += 1;
                match state.objects.get(&(resource.to_owned(), name)) {
                    Some(object) => whole(StatusCode::OK, object),
                    None => status(StatusCode::NOT_FOUND, "NotFound"),
                }
            }
            (Method::PATCH, Some(name)) => {
                let change: Value = serde_json::from_slice(&body).unwrap();
                state.patch(resource, &name, &change)
            }
            (method, _) => panic!("{method} {path}"),
        })
    }
}

impl State {
    fn list(&self, resource: &str, selected: Option<&str>) -> Answer {
        let items: Vec<&Value> = self
            .objects
            .iter()
            .filter(|((of, name), _)| {
                of == resource && selected.is_none_or(|selected| selected == name)
            })
            .map(|(_, object)| object)
            .collect();
        let list = json!({
            "apiVersion": "v1", "kind": "List", "items": items,
            "metadata": { "resourceVersion": self.version.to_string() },
        });
        whole(StatusCode::OK, &list)
    }

    fn patch(&mut self, resource: &str, name: &str, patch: &Value) -> Answer {
        self.patches.push((name.to_owned(), patch.clone()));
        let key = (resource.to_owned(), name.to_owned());
        let Some(mut object) = self.objects.get(&key).cloned() else {
            return status(StatusCode::NOT_FOUND, "NotFound");
        };
        // A strategic merge: lists of webhooks by name, the rest member by member.
        for entry in patch["webhooks"].as_array().unwrap() {
            let entries = object["webhooks"].as_array_mut().unwrap();
            let of_name = entries
                .iter_mut()
                .find(|of| of["name"] == entry["name"])
                .unwrap();
            of_name["clientConfig"]["caBundle"] = entry["clientConfig"]["caBundle"].clone();
        }
        for (key, value) in patch["metadata"]["annotations"].as_object().unwrap() {
            object["metadata"]["annotations"][key] = value.clone();
        }
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.objects.insert(key, object.clone());
        self.tell(resource, name, "MODIFIED", &object);
        whole(StatusCode::OK, &object)
    }

    /// What has happened since the version that the watch begins at.
    fn replay(&self, resource: &str, selected: Option<&str>, query: &str, sender: &Sender) {
        let since = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("resourceVersion="));
        let since: u64 = since.and_then(|since| since.parse().ok()).unwrap_or(0);
        for (version, of, name, line) in &self.events {
            if *version > since
                && of == resource
                && selected.is_none_or(|selected| selected == name)
            {
                sender
                    .send(Ok(Frame::data(Bytes::from(line.clone()))))
                    .unwrap();
            }
        }
    }

    fn tell(&mut self, resource: &str, name: &str, kind: &str, object: &Value) {
        let line = format!("{}\n", json!({ "type": kind, "object": object }));
        let event = (
            self.version,
            resource.to_owned(),
            name.to_owned(),
            line.clone(),
        );
        self.events.push(event);
        self.watchers.retain(|(of, selected, sender)| {
            let concerned =
                of == resource && selected.as_ref().is_none_or(|selected| selected == name);
            !concerned
                || sender
                    .send(Ok(Frame::data(Bytes::from(line.clone()))))
                    .is_ok()
        });
    }
}

fn open(status: StatusCode) -> (Sender, Answer) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut answer = Response::new(StreamBody::new(UnboundedReceiverStream::new(receiver)));
    *answer.status_mut() = status;
    (sender, answer)
}

fn whole(status: StatusCode, body: &Value) -> Answer {
    let (sender, answer) = open(status);
    sender
        .send(Ok(Frame::data(Bytes::from(body.to_string()))))
        .unwrap();
    answer
}

fn status(code: StatusCode, reason: &str) -> Answer {
    whole(
        code,
        &json!({
            "apiVersion": "v1", "kind": "Status", "status": "Failure", "message": reason,
            "reason": reason, "code": code.as_u16(),
        }),
    )
}
