//! An API server for tests: it lists, watches, gives logs and forwards ports, as the real one does.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::{Stream, StreamExt, stream};
use k8s_openapi::jiff::Timestamp;
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Cluster;

type Place = (String, String);
type Parameters = BTreeMap<String, String>;

/// Everything that the cluster has.
#[derive(Default)]
struct World {
    version: u64,
    /// By plural, then by namespace and name.
    objects: BTreeMap<String, BTreeMap<Place, Value>>,
    events: Vec<Change>,
    logs: BTreeMap<Place, Vec<Instance>>,
    /// What administration ports answer, by pod and path.
    pages: BTreeMap<(Place, String), Value>,
    forbidden: Vec<String>,
    requests: Vec<String>,
    /// Counts how often all streams of logs were cut off.
    cuts: u64,
}

struct Change {
    version: u64,
    plural: String,
    object: Value,
    sort: &'static str,
}

/// The log of a container from one start to the next.
#[derive(Default)]
struct Instance {
    lines: Vec<(String, String)>,
    ended: bool,
}

/// The server; it ends when it is dropped.
pub(crate) struct Fake {
    world: watch::Sender<World>,
    address: SocketAddr,
    _server: JoinSet<()>,
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let world = watch::Sender::new(World::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let pod = "/api/v1/namespaces/{namespace}/pods/{pod}";
        let router = Router::new()
            .route(&format!("{pod}/log"), get(log))
            .route(&format!("{pod}/portforward"), get(forward))
            .fallback(objects)
            .with_state(world.clone());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            world,
            address,
            _server: server,
        }
    }

    /// The cluster, whose context names the namespace `shop`.
    pub(crate) fn cluster(&self) -> Cluster {
        let config = Config::new(format!("http://{}", self.address).parse().unwrap());
        Cluster::behind(Client::try_from(config).unwrap(), "shop")
    }

    fn change<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        let mut result = None;
        self.world.send_modify(|world| {
            world.version += 1;
            result = Some(change(world));
        });
        result.unwrap()
    }

    /// Makes or changes an object.
    pub(crate) fn put(&self, plural: &str, object: Value) {
        self.change(|world| {
            let mut object = object;
            object["metadata"]["resourceVersion"] = world.version.to_string().into();
            let text = |name: &str| {
                object["metadata"][name]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned()
            };
            let place = (text("namespace"), text("name"));
            let objects = world.objects.entry(plural.to_owned()).or_default();
            let before = objects.insert(place, object.clone());
            let sort = if before.is_some() {
                "MODIFIED"
            } else {
                "ADDED"
            };
            let (version, plural) = (world.version, plural.to_owned());
            world.events.push(Change {
                version,
                plural,
                object,
                sort,
            });
        });
    }

    pub(crate) fn remove(&self, plural: &str, namespace: &str, name: &str) {
        self.change(|world| {
            let place = (namespace.to_owned(), name.to_owned());
            let object = world
                .objects
                .get_mut(plural)
                .unwrap()
                .remove(&place)
                .unwrap();
            let (version, plural, sort) = (world.version, plural.to_owned(), "DELETED");
            world.events.push(Change {
                version,
                plural,
                object,
                sort,
            });
        });
    }

    /// A line of a sidecar's log, written at a second of 2026-11-24T07:00.
    pub(crate) fn say(&self, pod: (&str, &str), second: &str, text: &str) {
        self.change(|world| {
            let instance = instance(world, pod);
            let stamp = format!("2026-11-24T07:00:{second}Z");
            instance.lines.push((stamp, text.to_owned()));
        });
    }

    /// The sidecar ends; with `again` it starts anew.
    pub(crate) fn end(&self, pod: (&str, &str), again: bool) {
        self.change(|world| {
            instance(world, pod).ended = true;
            if again {
                let place = (pod.0.to_owned(), pod.1.to_owned());
                world
                    .logs
                    .entry(place)
                    .or_default()
                    .push(Instance::default());
            }
        });
    }

    /// Cuts every stream of a log off.
    pub(crate) fn cut(&self) {
        self.change(|world| world.cuts += 1);
    }

    /// What an administration port answers.
    pub(crate) fn page(&self, pod: (&str, &str), path: &str, page: Value) {
        let place = (pod.0.to_owned(), pod.1.to_owned());
        self.change(|world| world.pages.insert((place, path.to_owned()), page));
    }

    /// Refuses requests whose path has this in it.
    pub(crate) fn forbid(&self, part: &str) {
        self.change(|world| world.forbidden.push(part.to_owned()));
    }

    /// The requests that have this in them.
    pub(crate) fn requests(&self, part: &str) -> Vec<String> {
        let world = self.world.borrow();
        let requests = world
            .requests
            .iter()
            .filter(|request| request.contains(part));
        requests.cloned().collect()
    }

    /// Waits until a request with this in it has come.
    pub(crate) async fn asked(&self, part: &str) {
        let mut world = self.world.subscribe();
        let asked = |world: &World| world.requests.iter().any(|request| request.contains(part));
        world.wait_for(asked).await.unwrap();
    }
}

fn instance<'a>(world: &'a mut World, (namespace, pod): (&str, &str)) -> &'a mut Instance {
    let place = (namespace.to_owned(), pod.to_owned());
    let instances = world.logs.entry(place).or_default();
    if instances.is_empty() {
        instances.push(Instance::default());
    }
    instances.last_mut().unwrap()
}

/// A pod with a sidecar that runs.
pub(crate) fn pod(namespace: &str, name: &str, account: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": namespace,
            "name": name,
            "uid": format!("uid-of-{name}"),
            "labels": { "app": account },
            "annotations": { "sidegate.dev/injected": "0.1.0" },
        },
        "spec": {
            "serviceAccountName": account,
            "initContainers": [{ "name": "sidegate-proxy", "restartPolicy": "Always" }],
            "containers": [{ "name": "app" }],
        },
        "status": {
            "phase": "Running",
            "conditions": [{ "type": "Ready", "status": "True" }],
            "initContainerStatuses": [{
                "name": "sidegate-proxy", "image": "x", "imageID": "x", "ready": true,
                "restartCount": 0, "state": { "running": {} },
            }],
        },
    })
}

fn refuse(code: StatusCode, message: &str) -> Response {
    let reason = if code == StatusCode::FORBIDDEN {
        "Forbidden"
    } else {
        "NotFound"
    };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure",
        "message": message, "reason": reason, "code": code.as_u16(),
    });
    (code, status.to_string()).into_response()
}

/// Remembers a request; the answer when it is refused.
fn note(world: &watch::Sender<World>, uri: &Uri) -> Option<Response> {
    let path = uri.to_string();
    world.send_modify(|world| world.requests.push(path.clone()));
    let forbidden = world
        .borrow()
        .forbidden
        .iter()
        .any(|part| path.contains(part));
    forbidden.then(|| {
        refuse(
            StatusCode::FORBIDDEN,
            &format!("user \"u\" cannot get \"{path}\""),
        )
    })
}

async fn objects(
    State(world): State<watch::Sender<World>>,
    Query(parameters): Query<Parameters>,
    uri: Uri,
) -> Response {
    if let Some(refused) = note(&world, &uri) {
        return refused;
    }
    let mut parts: Vec<&str> = uri
        .path()
        .split('/')
        .filter(|part| !part.is_empty())
        .collect();
    // `api/v1`, or `apis/GROUP/VERSION`.
    parts.drain(..if parts.first() == Some(&"apis") { 3 } else { 2 });
    let (namespace, rest) = match parts.as_slice() {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
        rest => ("", rest),
    };
    match rest {
        [plural] if parameters.contains_key("watch") => {
            let from = parameters["resourceVersion"].parse().unwrap();
            let events = changes(
                world.subscribe(),
                from,
                (plural.to_string(), namespace.to_owned()),
            );
            Body::from_stream(events).into_response()
        }
        [plural] => {
            let world = world.borrow();
            if plural.contains("polic") && !world.objects.contains_key(*plural) {
                return (StatusCode::NOT_FOUND, "404 page not found\n").into_response();
            }
            let objects = world.objects.get(*plural).into_iter().flatten();
            let here = objects.filter(|((of, _), _)| namespace.is_empty() || of == namespace);
            let items: Vec<_> = here.map(|(_, object)| object).collect();
            let version = world.version.to_string();
            let list = json!({
                "kind": "List", "apiVersion": "v1",
                "metadata": { "resourceVersion": version }, "items": items,
            });
            list.to_string().into_response()
        }
        [plural, name] => {
            let place = (namespace.to_owned(), (*name).to_owned());
            let world = world.borrow();
            let found = world
                .objects
                .get(*plural)
                .and_then(|objects| objects.get(&place));
            match found {
                Some(object) => object.to_string().into_response(),
                None => refuse(
                    StatusCode::NOT_FOUND,
                    &format!("{plural} \"{name}\" not found"),
                ),
            }
        }
        _ => refuse(StatusCode::NOT_FOUND, "\"?\""),
    }
}

fn changes(
    world: watch::Receiver<World>,
    from: u64,
    (plural, namespace): (String, String),
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    stream::unfold((world, from), move |(mut world, from)| {
        let (plural, namespace) = (plural.clone(), namespace.clone());
        async move {
            let is_next = |change: &&Change| {
                let of = change.object["metadata"]["namespace"]
                    .as_str()
                    .unwrap_or_default();
                change.version > from
                    && change.plural == plural
                    && (namespace.is_empty() || of == namespace)
            };
            let next = |world: &World| world.events.iter().any(|change| is_next(&change));
            let seen = world.wait_for(next).await.ok()?;
            let change = seen.events.iter().find(is_next)?;
            let event = json!({ "type": change.sort, "object": change.object });
            let version = change.version;
            drop(seen);
            Some((Ok(Bytes::from(format!("{event}\n"))), (world, version)))
        }
    })
}

async fn log(
    State(world): State<watch::Sender<World>>,
    Path(place): Path<Place>,
    Query(parameters): Query<Parameters>,
    uri: Uri,
) -> Response {
    if let Some(refused) = note(&world, &uri) {
        return refused;
    }
    let is = |name: &str| parameters.get(name).is_some_and(|value| value == "true");
    let follow = is("follow");
    let since: Option<Timestamp> = parameters
        .get("sinceTime")
        .map(|time| time.parse().unwrap());
    let (known, cuts) = {
        let world = world.borrow();
        (world.logs.get(&place).map_or(0, Vec::len), world.cuts)
    };
    let Some(instance) = known.checked_sub(if is("previous") { 2 } else { 1 }) else {
        return refuse(
            StatusCode::BAD_REQUEST,
            "previous terminated container not found",
        );
    };
    let lines = stream::unfold((world.subscribe(), 0), move |(mut world, at)| {
        let place = place.clone();
        async move {
            let ready = |world: &World| {
                let log = &world.logs[&place][instance];
                at < log.lines.len() || log.ended || !follow || world.cuts != cuts
            };
            let seen = world.wait_for(ready).await.ok()?;
            let log = &seen.logs[&place][instance];
            let Some((stamp, text)) = log.lines.get(at) else {
                let cut = follow && !log.ended;
                drop(seen);
                let broken = std::io::Error::other("cut off");
                return cut.then(|| (Err(broken), (world, at)));
            };
            let time: Timestamp = stamp.parse().unwrap();
            let given = since.is_none_or(|since| time >= since);
            let line = if given {
                format!("{stamp} {text}\n")
            } else {
                String::new()
            };
            drop(seen);
            Some((Ok(Bytes::from(line)), (world, at + 1)))
        }
    });
    Body::from_stream(lines).into_response()
}

async fn forward(
    State(world): State<watch::Sender<World>>,
    Path(place): Path<Place>,
    uri: Uri,
    upgrade: WebSocketUpgrade,
) -> Response {
    if let Some(refused) = note(&world, &uri) {
        return refused;
    }
    let upgrade = upgrade.protocols(["v5.channel.k8s.io"]);
    upgrade.on_upgrade(|socket| administer(socket, world, place))
}

/// Answers one request as a sidecar's administration port does.
async fn administer(mut socket: WebSocket, world: watch::Sender<World>, place: Place) {
    for channel in [0, 1] {
        let [low, high] = 19000_u16.to_le_bytes();
        let port = Message::binary(vec![channel, low, high]);
        socket.send(port).await.unwrap();
    }
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        match socket.next().await {
            Some(Ok(Message::Binary(bytes))) if bytes.first() == Some(&0) => {
                request.extend(&bytes[1..]);
            }
            Some(Ok(_)) => {}
            _ => return,
        }
    }
    let request = String::from_utf8(request).unwrap();
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let page = world.borrow().pages.get(&(place, path)).cloned();
    let Some(page) = page else {
        let refused = b"\x01error forwarding port 19000: connection refused".to_vec();
        socket.send(Message::binary(refused)).await.unwrap();
        return;
    };
    let host = request.contains("host: 127.0.0.1:19000\r\n");
    let (status, body) = if host {
        ("200 OK", page.to_string())
    } else {
        ("403 Forbidden", String::new())
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    // In parts, as they may come.
    for part in [head, body] {
        let part = [b"\0", part.as_bytes()].concat();
        socket.send(Message::binary(part)).await.unwrap();
    }
    // Until the other side has had enough.
    while let Some(Ok(_)) = socket.next().await {}
}
