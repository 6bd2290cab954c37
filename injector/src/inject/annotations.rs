//! What pods and namespaces choose by annotations.
//!
//! Invariants: each key of ours is known or refused, and each value is read strictly; a pod
//! changes what concerns its traffic only where its namespace lists that annotation.

use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;
use sidegate_mesh::Enforcement;
use sidegate_mesh::resource::{nearest, one_of};

use super::pod::Pod;
use super::{NamespaceFacts, Quantity, Refusal};
use crate::settings::{
    DRAIN_TIMEOUT_MAX, DRAIN_TIMEOUT_MIN, LogLevel, RESERVED_PORTS, Resources, Settings,
};

/// Label of a namespace (`enabled`) and of a pod (`disabled`).
pub const INJECT: &str = "sidegate.dev/inject";
/// Annotation of an injected pod: the version that injected it.
pub const INJECTED: &str = "sidegate.dev/injected";
/// Annotation of a pod that could not be injected: why.
pub const SKIPPED: &str = "sidegate.dev/skipped";
/// Annotation of an injected pod: what its probes and hooks were.
pub const PROBES: &str = "sidegate.dev/probes";
/// Annotation of a namespace: what its pods may choose.
pub const ALLOW_POD_OVERRIDES: &str = "sidegate.dev/allow-pod-overrides";

const PREFIX: &str = "sidegate.dev/";

/// How long the sidecar of a pod waits for open calls when it ends.
const DRAIN_TIMEOUT: &str = "drain-timeout";

/// What every pod may choose.
const ALWAYS: [&str; 6] = [
    "proxy-cpu-request",
    "proxy-cpu-limit",
    "proxy-memory-request",
    "proxy-memory-limit",
    "log-level",
    DRAIN_TIMEOUT,
];

/// What a pod may choose where its namespace says so.
pub const OVERRIDES: [&str; 7] = [
    "enforcement",
    "skip-inbound-ports",
    "skip-outbound-ports",
    "skip-outbound-cidrs",
    "opaque-ports",
    "plaintext-ports",
    "udp-ports",
];

/// What only a namespace may say.
const NAMESPACE_ONLY: [&str; 2] = ["egress", "allow-pod-overrides"];

/// What injection itself writes.
const MARKS: [&str; 3] = ["injected", "skipped", "probes"];

/// Most entries of a list.
const ENTRIES_MAX: usize = 128;

/// Whether the pod's label leaves it in the mesh.
pub(super) fn wants_injection(pod: &Pod<'_>) -> Result<bool, Refusal> {
    match pod.label(INJECT) {
        None => Ok(true),
        Some(Value::String(word)) if word == "enabled" => Ok(true),
        Some(Value::String(word)) if word == "disabled" => Ok(false),
        Some(other) => Err(Refusal::Annotation {
            key: format!("label {INJECT}"),
            holder: "the pod".to_owned(),
            problem: format!("{} is not possible", shown(&other.to_string())),
            help: "write `disabled` to leave the mesh, or remove the label".to_owned(),
        }),
    }
}

/// What one pod and its namespace chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) proxy_resources: Resources,
    pub(super) log_level: LogLevel,
    pub(super) drain_timeout: Duration,
    /// Only what the pod itself says; the namespace's word is followed live.
    pub(super) enforcement: Option<Enforcement>,
    pub(super) skip_inbound_ports: Vec<u16>,
    pub(super) skip_outbound_ports: Vec<u16>,
    pub(super) skip_outbound_cidrs: Vec<IpNet>,
    pub(super) opaque_ports: Vec<u16>,
    pub(super) plaintext_ports: Vec<u16>,
    pub(super) udp_ports: Vec<u16>,
}

impl Options {
    pub(super) fn read(
        pod: &Pod<'_>,
        namespace: &NamespaceFacts,
        settings: &Settings,
    ) -> Result<Self, Refusal> {
        let said = Said::read(pod, namespace)?;
        let log_level = settings.log_level;
        // Nobody asked for longer than the pod lasts.
        let drain_timeout = settings.drain_timeout.min(pod.grace_period());
        let (enforcement, holder) = said.value("enforcement", read_enforcement)?.unzip();
        said.value("egress", read_egress)?;
        Ok(Self {
            proxy_resources: said.resources(&settings.proxy_resources)?,
            log_level: said
                .value("log-level", read_level)?
                .map_or(log_level, |(level, _)| level),
            drain_timeout: said
                .value(DRAIN_TIMEOUT, read_drain_timeout)?
                .map_or(drain_timeout.max(DRAIN_TIMEOUT_MIN), |(timeout, _)| timeout),
            enforcement: enforcement.filter(|_| holder == Some(Holder::Pod)),
            skip_inbound_ports: said.list("skip-inbound-ports", read_port)?,
            skip_outbound_ports: said.list("skip-outbound-ports", read_port)?,
            skip_outbound_cidrs: said.list("skip-outbound-cidrs", read_cidr)?,
            opaque_ports: said.list("opaque-ports", read_port)?,
            plaintext_ports: said.list("plaintext-ports", read_port)?,
            udp_ports: said.list("udp-ports", read_port)?,
        })
    }
}

/// What a pod that has less time to end than was asked for its sidecar should know; nothing where
/// nobody asked.
pub(crate) fn drain_warning(pod: &Value, namespace: &NamespaceFacts) -> Option<String> {
    let pod = Pod::read(pod).ok()?;
    let said = Said::read(&pod, namespace).ok()?;
    let (drain, _) = said.value(DRAIN_TIMEOUT, read_drain_timeout).ok()??;
    let grace = pod.grace_period();
    (drain > grace).then(|| {
        let (drain, grace) = (
            humantime::format_duration(drain),
            humantime::format_duration(grace),
        );
        format!(
            "the sidecar waits {drain} for open calls, but the pod has only {grace} to end; lower \
             {PREFIX}{DRAIN_TIMEOUT}, or raise terminationGracePeriodSeconds"
        )
    })
}

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Pod,
    Namespace,
}

/// The annotations of ours, each known and allowed.
struct Said<'a> {
    /// Key without prefix, value, and who says so. The pod comes before its namespace.
    entries: Vec<(&'static str, &'a str, Holder)>,
    namespace: &'a str,
}

/// A value cannot be read.
struct Wrong {
    problem: String,
    help: String,
}

impl Wrong {
    fn new(value: &str, what: &str, help: &str) -> Self {
        Self {
            problem: format!("`{}` is not {what}", shown(value)),
            help: help.to_owned(),
        }
    }
}

impl<'a> Said<'a> {
    fn read(pod: &Pod<'a>, namespace: &'a NamespaceFacts) -> Result<Self, Refusal> {
        let mut said = Self {
            entries: Vec::new(),
            namespace: &namespace.name,
        };
        for (key, value) in &namespace.annotations {
            if let Some(name) = key.strip_prefix(PREFIX) {
                let known = [&ALWAYS[..], &OVERRIDES, &NAMESPACE_ONLY].concat();
                let name = said.known(name, &known, Holder::Namespace)?;
                said.entries.push((name, value, Holder::Namespace));
            }
        }
        let allowed = said.list("allow-pod-overrides", read_override)?;
        for (key, value) in pod.annotations() {
            let Some(name) = key.strip_prefix(PREFIX) else {
                continue;
            };
            let known = [&ALWAYS[..], &OVERRIDES, &MARKS].concat();
            let name = said.known(name, &known, Holder::Pod)?;
            if MARKS.contains(&name) {
                continue;
            }
            if OVERRIDES.contains(&name) && !allowed.contains(&name) {
                return Err(Refusal::NotAllowed {
                    key: key.to_owned(),
                    name,
                    namespace: namespace.name.clone(),
                });
            }
            let Some(value) = value.as_str() else {
                let wrong = Wrong::new(&value.to_string(), "a text", "put it between quotes");
                return Err(said.refusal(name, Holder::Pod, wrong));
            };
            said.entries.insert(0, (name, value, Holder::Pod));
        }
        Ok(said)
    }

    /// The key of exactly that name.
    fn known(
        &self,
        name: &str,
        known: &[&'static str],
        holder: Holder,
    ) -> Result<&'static str, Refusal> {
        if let Some(known) = known.iter().find(|known| **known == name) {
            return Ok(known);
        }
        let help = if holder == Holder::Pod && NAMESPACE_ONLY.contains(&name) {
            "it belongs on the namespace".to_owned()
        } else {
            match nearest(name, known) {
                Some(near) => format!("did you mean `{PREFIX}{near}`?"),
                None => format!("possible after `{PREFIX}`: {}", one_of(known)),
            }
        };
        Err(Refusal::Annotation {
            key: format!("{PREFIX}{}", shown(name)),
            holder: self.holder(holder),
            problem: "there is no such annotation".to_owned(),
            help,
        })
    }

    /// What is said under a key, by the pod or else by the namespace. Both are read, so that a
    /// wrong word is never hidden behind a right one.
    fn value<T>(
        &self,
        key: &'static str,
        read: impl Fn(&str) -> Result<T, Wrong>,
    ) -> Result<Option<(T, Holder)>, Refusal> {
        let mut first = None;
        for (name, text, holder) in &self.entries {
            if *name == key {
                let value = read(text).map_err(|wrong| self.refusal(key, *holder, wrong))?;
                first.get_or_insert((value, *holder));
            }
        }
        Ok(first)
    }

    /// A list with commas between its entries, sorted. An empty text is an empty list.
    fn list<T: Ord>(
        &self,
        key: &'static str,
        read: impl Fn(&str) -> Result<T, Wrong>,
    ) -> Result<Vec<T>, Refusal> {
        let entries = |text: &str| {
            let mut list = Vec::new();
            let parts = text.split(',').map(str::trim);
            for part in parts.filter(|_| !text.trim().is_empty()) {
                let entry = read(part)?;
                if list.contains(&entry) {
                    let what = "in the list once";
                    return Err(Wrong::new(part, what, "name each entry once"));
                }
                list.push(entry);
            }
            if list.len() > ENTRIES_MAX {
                let problem = format!("there are more than {ENTRIES_MAX} entries");
                let help = "write fewer".to_owned();
                return Err(Wrong { problem, help });
            }
            list.sort();
            Ok(list)
        };
        let list = self.value(key, entries)?;
        Ok(list.map(|(list, _)| list).unwrap_or_default())
    }

    fn resources(&self, default: &Resources) -> Result<Resources, Refusal> {
        let quantity = |key, default: &Quantity| {
            let read = |text: &str| {
                text.parse::<Quantity>().map_err(|_error| {
                    let help = "write a positive number with a unit of Kubernetes, such as `100m`, \
                                `0.5` or `64Mi`";
                    Wrong::new(text, "an amount", help)
                })
            };
            let said = self.value(key, read)?;
            Ok(said.map_or_else(|| (default.clone(), None), |(q, holder)| (q, Some(holder))))
        };
        let pair = |request_key, limit_key, request, limit| {
            let (request, asked) = quantity(request_key, request)?;
            let (limit, limited) = quantity(limit_key, limit)?;
            if request <= limit {
                return Ok((request, limit));
            }
            // Blame what was written, not the default.
            let (key, holder) = match (asked, limited) {
                (None, Some(holder)) => (limit_key, holder),
                (asked, _) => (request_key, asked.unwrap_or(Holder::Pod)),
            };
            let problem = format!("the request {request} is above the limit {limit}");
            let help = format!("set {PREFIX}{request_key} and {PREFIX}{limit_key} together");
            Err(self.refusal(key, holder, Wrong { problem, help }))
        };
        let (cpu_request, cpu_limit) = pair(
            "proxy-cpu-request",
            "proxy-cpu-limit",
            &default.cpu_request,
            &default.cpu_limit,
        )?;
        let (memory_request, memory_limit) = pair(
            "proxy-memory-request",
            "proxy-memory-limit",
            &default.memory_request,
            &default.memory_limit,
        )?;
        Ok(Resources {
            cpu_request,
            cpu_limit,
            memory_request,
            memory_limit,
        })
    }

    fn refusal(&self, name: &str, holder: Holder, wrong: Wrong) -> Refusal {
        Refusal::Annotation {
            key: format!("{PREFIX}{name}"),
            holder: self.holder(holder),
            problem: wrong.problem,
            help: wrong.help,
        }
    }

    fn holder(&self, holder: Holder) -> String {
        match holder {
            Holder::Pod => "the pod".to_owned(),
            Holder::Namespace => format!("namespace {}", self.namespace),
        }
    }
}

fn read_enforcement(text: &str) -> Result<Enforcement, Wrong> {
    match text {
        "enforce" => Ok(Enforcement::Enforce),
        "audit" => Ok(Enforcement::Audit),
        _ => Err(Wrong::new(text, "possible", "write `enforce` or `audit`")),
    }
}

fn read_egress(text: &str) -> Result<(), Wrong> {
    match text {
        "allow" | "deny" => Ok(()),
        _ => Err(Wrong::new(text, "possible", "write `allow` or `deny`")),
    }
}

fn read_level(text: &str) -> Result<LogLevel, Wrong> {
    let words = LogLevel::ALL.map(LogLevel::as_str);
    let help = format!("write {}", one_of(&words));
    LogLevel::from_word(text).ok_or_else(|| Wrong::new(text, "a level", &help))
}

fn read_drain_timeout(text: &str) -> Result<Duration, Wrong> {
    let range = DRAIN_TIMEOUT_MIN..=DRAIN_TIMEOUT_MAX;
    let timeout = humantime::parse_duration(text).ok();
    let timeout = timeout.filter(|timeout| range.contains(timeout));
    timeout.ok_or_else(|| Wrong::new(text, "a time between 1s and 1h", "write for example `25s`"))
}

fn read_port(text: &str) -> Result<u16, Wrong> {
    let help = "write ports from 1 to 65535 with commas between them, such as `3306,9090`";
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let port = if digits {
        text.parse::<u16>().ok()
    } else {
        None
    };
    match port.filter(|port| *port > 0) {
        Some(port) if RESERVED_PORTS.contains(&port) => Err(Wrong::new(
            text,
            "a port of the application: it is the sidecar's",
            "remove it",
        )),
        Some(port) => Ok(port),
        None => Err(Wrong::new(text, "a port", help)),
    }
}

fn read_cidr(text: &str) -> Result<IpNet, Wrong> {
    let help = "write networks with commas between them, such as `10.0.0.0/8,fd00::/8`";
    let network: IpNet = text
        .parse()
        .map_err(|_error| Wrong::new(text, "a network", help))?;
    if network.trunc() != network {
        let help = format!("write `{}`", network.trunc());
        return Err(Wrong::new(text, "the start of its network", &help));
    }
    Ok(network)
}

fn read_override(text: &str) -> Result<&'static str, Wrong> {
    let name = text.strip_prefix(PREFIX).unwrap_or(text);
    let known = OVERRIDES.into_iter().find(|known| *known == name);
    known.ok_or_else(|| {
        let help = match nearest(name, &OVERRIDES) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("possible, with commas between them: {}", one_of(&OVERRIDES)),
        };
        Wrong::new(text, "an annotation that can be allowed", &help)
    })
}

/// What was written, cut to what fits into a message, and without what could change a terminal.
pub(super) fn shown(text: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 60;
    let mut chars = text.chars();
    let mut cut: String = chars
        .by_ref()
        .take(SHOWN_CHARS_MAX)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if chars.next().is_some() {
        cut.push('…');
    }
    cut
}
