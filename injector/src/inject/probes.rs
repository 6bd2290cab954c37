//! Probes and lifecycle hooks, which the sidecar carries out in the kubelet's stead.
//!
//! Every kind becomes a GET of the sidecar's health port with the pod's secret; what to ask the
//! application stands in the sidecar's own configuration. Commands are left alone, and so is what
//! names a host of its own, because it does not ask this pod.
//!
//! Invariants: what is asked is exactly what the kubelet would have asked; a redirected probe is
//! known by the pod's secret, and what it was stands in an annotation, so that injecting again
//! starts from the same probes.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::annotations::{self, shown};
use super::edit::{Edits, Step};
use super::existing::Existing;
use super::pod::{Container, Object, Pod, object};
use super::{Refusal, reserved};
use crate::settings::{HEALTH_PORT, RESERVED_PORTS};

/// The header that shows the kubelet's requests to be the kubelet's.
const SECRET_HEADER: &str = "sidegate-probe-secret";
/// Most probes and hooks of one pod.
const PROBES_MAX: usize = 1_024;
/// The ways of asking that are redirected.
const WAYS: [&str; 3] = ["httpGet", "tcpSocket", "grpc"];

/// What a probe or hook is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Liveness,
    Readiness,
    Startup,
    PostStart,
    PreStop,
}

impl Purpose {
    const ALL: [Self; 5] = [
        Self::Liveness,
        Self::Readiness,
        Self::Startup,
        Self::PostStart,
        Self::PreStop,
    ];

    /// The word in the URL.
    fn word(self) -> &'static str {
        match self {
            Self::Liveness => "liveness",
            Self::Readiness => "readiness",
            Self::Startup => "startup",
            Self::PostStart => "post-start",
            Self::PreStop => "pre-stop",
        }
    }

    /// The field of the container, and of its lifecycle.
    fn field(self) -> &'static str {
        match self {
            Self::Liveness => "livenessProbe",
            Self::Readiness => "readinessProbe",
            Self::Startup => "startupProbe",
            Self::PostStart => "postStart",
            Self::PreStop => "preStop",
        }
    }

    fn is_hook(self) -> bool {
        matches!(self, Self::PostStart | Self::PreStop)
    }
}

/// One way of asking the application.
struct Handler<'a> {
    way: &'static str,
    fields: &'a Object,
}

/// One probe or hook of a container that asks this pod.
pub(super) struct Probe<'a> {
    container: Container<'a>,
    purpose: Purpose,
    holder: &'a Object,
    /// As it stands in the pod now.
    now: Handler<'a>,
}

impl<'a> Probe<'a> {
    /// Every probe and hook of the pod's own containers.
    pub(super) fn all(pod: &Pod<'a>) -> Result<Vec<Self>, Refusal> {
        let mut probes = Vec::new();
        for container in &pod.containers {
            if !reserved::is_our_container(container.name) {
                for purpose in Purpose::ALL {
                    probes.extend(Self::of(container, purpose)?);
                }
            }
        }
        Ok(probes)
    }

    fn of(container: &Container<'a>, purpose: Purpose) -> Result<Option<Self>, Refusal> {
        let holder = if purpose.is_hook() {
            match container.object("lifecycle")? {
                Some(lifecycle) => object(lifecycle, purpose.field(), || {
                    format!(
                        "lifecycle.{} of container {}",
                        purpose.field(),
                        container.name
                    )
                })?,
                None => None,
            }
        } else {
            container.object(purpose.field())?
        };
        let Some(holder) = holder else {
            return Ok(None);
        };
        let path = || format!("{} of container {}", purpose.field(), container.name);
        let mut ways = Vec::new();
        for way in WAYS {
            let fields = object(holder, way, || format!("{way} in {}", path()))?;
            ways.extend(fields.map(|fields| Handler { way, fields }));
        }
        let Some(now) = ways.pop() else {
            return Ok(None);
        };
        let probe = Self {
            container: *container,
            purpose,
            holder,
            now,
        };
        let command = holder.get("exec").is_some_and(|exec| !exec.is_null());
        if !ways.is_empty() || command {
            return Err(probe.refusal("it asks in more than one way", "keep one"));
        }
        let host = probe.now.fields.get("host").and_then(Value::as_str);
        Ok(host.unwrap_or_default().is_empty().then_some(probe))
    }

    /// Its name: `<container>/<kind>`.
    fn key(&self) -> String {
        format!("{}/{}", self.container.name, self.purpose.word())
    }

    fn path(&self) -> String {
        format!("/probe/{}", self.key())
    }

    /// What the kubelet asks instead.
    fn redirected(&self, secret: &str) -> Value {
        json!({
            "path": self.path(),
            "port": HEALTH_PORT,
            "scheme": "HTTP",
            "httpHeaders": [{ "name": SECRET_HEADER, "value": secret }],
        })
    }

    /// Whether it asks the sidecar already, with this secret.
    fn is_redirected(&self, secret: Option<&str>) -> bool {
        let redirected = secret.map(|secret| self.redirected(secret));
        self.now.way == "httpGet"
            && redirected.as_ref().and_then(Value::as_object) == Some(self.now.fields)
    }

    /// Whether it looks as if it asked the sidecar, with whatever secret.
    fn seems_redirected(&self) -> bool {
        let field = |name: &str| self.now.fields.get(name);
        self.now.way == "httpGet"
            && field("port").and_then(Value::as_u64) == Some(u64::from(HEALTH_PORT))
            && field("path").and_then(Value::as_str) == Some(self.path().as_str())
    }

    fn steps<'s>(&'s self, way: &'s str) -> Vec<Step<'s>> {
        let mut steps = vec![
            "spec".into(),
            self.container.list.field().into(),
            self.container.index.into(),
        ];
        if self.purpose.is_hook() {
            steps.push("lifecycle".into());
        }
        steps.extend([self.purpose.field().into(), way.into()]);
        steps
    }

    /// Replaces the way in which it asks.
    fn ask(&self, way: &str, fields: Value, edits: &mut Edits) {
        if way == self.now.way {
            edits.replace(&self.steps(way), fields);
        } else {
            edits.remove(&self.steps(self.now.way));
            edits.add(&self.steps(way), fields);
        }
    }

    fn refusal(&self, problem: impl Into<String>, help: &'static str) -> Refusal {
        Refusal::Probe {
            container: shown(self.container.name),
            probe: self.purpose.field(),
            problem: problem.into(),
            help,
        }
    }

    /// What the sidecar asks the application: an entry of its configuration.
    fn entry(&self, way: &str, asked: &Object) -> Result<Value, Refusal> {
        let port = self.port(way, asked)?;
        let question = match way {
            "tcpSocket" => json!({ "tcp": { "port": port } }),
            "grpc" => {
                let service = asked
                    .get("service")
                    .and_then(Value::as_str)
                    .unwrap_or_default();
                json!({ "grpc": { "port": port, "service": service } })
            }
            _ => json!({ "http": self.http(port, asked)? }),
        };
        let mut entry = match question {
            Value::Object(entry) => entry,
            _ => Map::new(),
        };
        if !self.purpose.is_hook() {
            entry.insert("timeout".to_owned(), self.timeout()?.into());
        }
        Ok(Value::Object(entry))
    }

    fn http(&self, port: u16, asked: &Object) -> Result<Value, Refusal> {
        let scheme = match asked.get("scheme") {
            None | Some(Value::Null) => "http",
            Some(Value::String(scheme)) if scheme.is_empty() || scheme == "HTTP" => "http",
            Some(Value::String(scheme)) if scheme == "HTTPS" => "https",
            Some(_) => return Err(self.refusal("its scheme is unknown", "write HTTP or HTTPS")),
        };
        let path = asked.get("path").and_then(Value::as_str);
        let path = path.filter(|path| !path.is_empty()).unwrap_or("/");
        let headers = self.headers(asked)?;
        let mut http = json!({ "scheme": scheme, "port": port, "path": path });
        if let (Some(http), false) = (http.as_object_mut(), headers.is_empty()) {
            http.insert("headers".to_owned(), headers.into());
        }
        Ok(http)
    }

    fn headers(&self, asked: &Object) -> Result<Vec<Value>, Refusal> {
        let path = || format!("httpHeaders in {}", self.purpose.field());
        let list = super::pod::objects(asked, "httpHeaders", path)?.unwrap_or_default();
        let header = |header: &Object| {
            let text = |field: &str| {
                header
                    .get(field)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
            };
            let (name, value) = (text("name"), text("value"));
            let is_name = http::HeaderName::from_bytes(name.as_bytes()).is_ok();
            if !is_name || http::HeaderValue::from_str(value).is_err() {
                let problem = format!("`{}` cannot be sent as a header", shown(name));
                return Err(self.refusal(problem, "write a name and a value of HTTP in ASCII"));
            }
            Ok(json!({ "name": name, "value": value }))
        };
        list.into_iter().map(header).collect()
    }

    /// The number of the port, which may have been given by its name in the same container.
    fn port(&self, way: &str, asked: &Object) -> Result<u16, Refusal> {
        let number = match asked.get("port") {
            Some(Value::Number(number)) => number.as_u64(),
            // gRPC probes have numbers only.
            Some(Value::String(name)) if way != "grpc" => self.port_of_name(name)?,
            _ => None,
        };
        let port = number
            .and_then(|number| u16::try_from(number).ok())
            .filter(|port| *port > 0);
        let port = port.ok_or_else(|| {
            let help = "write a number from 1 to 65535, or the name of a port of the container";
            self.refusal("its port is none of this container's", help)
        })?;
        if RESERVED_PORTS.contains(&port) {
            let problem = format!("port {port} is the sidecar's own");
            return Err(self.refusal(problem, "ask a port of the application"));
        }
        Ok(port)
    }

    fn port_of_name(&self, name: &str) -> Result<Option<u64>, Refusal> {
        let ports = self.container.objects("ports")?;
        let named = |port: &&&Object| port.get("name").and_then(Value::as_str) == Some(name);
        let number = ports
            .iter()
            .find(named)
            .and_then(|port| port.get("containerPort")?.as_u64());
        // As the kubelet has it: what is no port's name may be a number.
        Ok(number.or_else(|| name.parse().ok()))
    }

    fn timeout(&self) -> Result<String, Refusal> {
        let seconds = match self.holder.get("timeoutSeconds") {
            None | Some(Value::Null) => Some(1),
            Some(seconds) => seconds.as_u64(),
        };
        // Kubernetes takes 0 for its default.
        match seconds.filter(|seconds| *seconds <= u64::from(i32::MAX.unsigned_abs())) {
            Some(seconds) => Ok(format!("{}s", seconds.max(1))),
            None => Err(self.refusal("timeoutSeconds is no time", "write a number of seconds")),
        }
    }
}

/// What a probe was before it was redirected.
struct Original {
    way: &'static str,
    fields: Value,
}

/// What the annotation of an earlier injection says that the probes were.
struct Originals(BTreeMap<String, Original>);

impl Originals {
    fn read(pod: &Pod<'_>) -> Self {
        let text = pod.annotation(annotations::PROBES).unwrap_or("{}");
        let parsed: BTreeMap<String, Object> = serde_json::from_str(text).unwrap_or_default();
        let original = |(key, handler): (String, Object)| {
            let (way, fields) = handler.into_iter().next()?;
            let way = WAYS.into_iter().find(|known| *known == way)?;
            Some((key, Original { way, fields }))
        };
        Self(parsed.into_iter().filter_map(original).collect())
    }

    fn take(&mut self, probe: &Probe<'_>) -> Result<Original, Refusal> {
        self.0
            .remove(&probe.key())
            .filter(|original| original.fields.is_object())
            .ok_or_else(|| {
                let problem = format!(
                    "it asks the sidecar, and annotation {} does not say what it was",
                    annotations::PROBES
                );
                probe.refusal(problem, "start from the manifest before injection")
            })
    }
}

/// Every probe and hook of a pod: what it was, and what the sidecar asks for it.
pub(super) struct Probes<'a> {
    all: Vec<(Probe<'a>, Original)>,
    entries: Map<String, Value>,
    secret: Option<String>,
}

impl<'a> Probes<'a> {
    /// Reads them, with the secret that the pod has already, or else a new one.
    pub(super) fn read(
        pod: &Pod<'a>,
        existing: &Existing<'_>,
        random: &dyn Fn() -> Option<[u8; 32]>,
    ) -> Result<Self, Refusal> {
        let mut originals = Originals::read(pod);
        let (mut all, mut entries) = (Vec::new(), Map::new());
        for probe in Probe::all(pod)? {
            if !is_name(probe.container.name) {
                let problem = "the container has no name that a path could hold";
                return Err(probe.refusal(problem, "name it with a-z, 0-9 and `-`"));
            }
            let original = if probe.is_redirected(existing.secret()) {
                originals.take(&probe)?
            } else {
                let fields = Value::Object(probe.now.fields.clone());
                Original {
                    way: probe.now.way,
                    fields,
                }
            };
            let fields = original.fields.as_object();
            let entry = probe.entry(original.way, fields.unwrap_or(&Map::new()))?;
            entries.insert(probe.key(), entry);
            all.push((probe, original));
        }
        if all.len() > PROBES_MAX {
            return Err(Refusal::shape(
                "the pod",
                "it has more than 1024 probes and hooks",
            ));
        }
        let secret = match (existing.secret(), all.is_empty()) {
            (Some(secret), _) => Some(secret.to_owned()),
            (None, true) => None,
            (None, false) => Some(hex(&random().ok_or(Refusal::NoRandom)?)),
        };
        Ok(Self {
            all,
            entries,
            secret,
        })
    }

    /// Makes each of them ask the sidecar.
    pub(super) fn redirect(&self, edits: &mut Edits) {
        let Some(secret) = &self.secret else { return };
        for (probe, _) in &self.all {
            if !probe.is_redirected(Some(secret)) {
                probe.ask("httpGet", probe.redirected(secret), edits);
            }
        }
    }

    /// `probes` of the sidecar's configuration; `None` when there is nothing to ask.
    pub(super) fn config(&self) -> Option<Value> {
        let secret = self.secret.as_ref()?;
        Some(json!({ "secret": secret, "entries": self.entries }))
    }

    /// What they were, for the annotation; `None` when there are none.
    pub(super) fn originals(&self) -> Option<String> {
        if self.all.is_empty() {
            return None;
        }
        let original = |(probe, original): &(Probe<'_>, Original)| {
            (probe.key(), json!({ original.way: original.fields }))
        };
        let originals: Map<String, Value> = self.all.iter().map(original).collect();
        Some(Value::Object(originals).to_string())
    }
}

/// Makes each redirected probe what it was.
pub(super) fn restore(pod: &Pod<'_>, edits: &mut Edits) -> Result<(), Refusal> {
    let mut originals = Originals::read(pod);
    for probe in Probe::all(pod)? {
        if probe.seems_redirected() {
            let original = originals.take(&probe)?;
            probe.ask(original.way, original.fields, edits);
        }
    }
    Ok(())
}

/// Whether a container's name can stand in a path: a DNS label, as Kubernetes has it.
fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(allowed)
}

fn hex(bytes: &[u8; 32]) -> String {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
    ];
    let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().unwrap_or_default();
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)])
        .collect()
}
