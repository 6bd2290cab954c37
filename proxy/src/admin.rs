//! The administration port: what this sidecar is told, knows, shows and does, as JSON.
//!
//! Invariants: it listens on loopback and only reads; it never shows a key or a secret; a request
//! from a browser (an `Origin`, or a `Host` that is not this port on loopback) is refused, since
//! any page that the user opens could send it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::{StatusCode, Uri};
use serde::Serialize;
use serde_json::{Value, json};
use sidegate_mesh::resource::Metadata;
use sidegate_mesh::store::{BrokenResource, ResourceSet};
use sidegate_mesh::{Route, Snapshot, Workload, policy};
use sidegate_mtls::IdentityStatus;

use crate::call::rfc3339;
use crate::destinations;
use crate::health;
use crate::responder::{Answer, Reply, Respond, answer, refuse_writing, words};
use crate::shared::Shared;
use crate::source::Report;
use crate::worker::Addresses;

/// Answers on the administration port.
pub(crate) struct Admin {
    pub(crate) shared: Arc<Shared>,
    pub(crate) addresses: Addresses,
    pub(crate) report: Report,
    pub(crate) identity: Arc<IdentityStatus>,
}

const PAGES: [(&str, &str); 6] = [
    ("/config", "the configuration in force, secrets redacted"),
    (
        "/snapshot",
        "the resources in force, what is wrong with them, policies and routes",
    ),
    (
        "/certs",
        "the certificate, its renewals, the roots that are trusted",
    ),
    (
        "/connections",
        "open inbound connections and the calls on them",
    ),
    (
        "/destinations",
        "in a cluster: the addresses that the application calls, and whose they are",
    ),
    ("/denials", "the latest refusals, newest last"),
];

impl Respond for Admin {
    fn respond(&self, request: &Parts) -> Reply {
        let refusal = refuse_strangers(request, self.addresses.admin);
        let refusal = refusal.or_else(|| refuse_writing(request));
        refusal.unwrap_or_else(|| self.answer(request)).into()
    }
}

impl Admin {
    fn answer(&self, request: &Parts) -> Answer {
        match request.uri.path() {
            "/" => page(&PAGES.into_iter().collect::<BTreeMap<_, _>>()),
            "/config" => page(&self.config()),
            "/snapshot" => page(&self.snapshot()),
            "/certs" | "/certificates" => page(&self.certificates()),
            "/connections" => page(&self.shared.connections.list()),
            "/destinations" => page(&self.destinations()),
            "/denials" => page(&self.denials()),
            _ => words(StatusCode::NOT_FOUND, "see / for what there is"),
        }
    }

    fn config(&self) -> Value {
        let upstreams = self.addresses.upstreams.iter();
        let upstreams: BTreeMap<String, SocketAddr> = upstreams
            .map(|(service, address)| (service.to_string(), *address))
            .collect();
        json!({
            "workload": self.shared.workload.id,
            "config": &*self.shared.config,
            "listening": {
                "outbound": self.addresses.outbound,
                "inbound": self.addresses.inbound,
                "admin": self.addresses.admin,
                "health": self.addresses.health,
                "upstreams": upstreams,
            },
        })
    }

    fn snapshot(&self) -> Value {
        let reading = self.report.current();
        let missing = health::missing(&self.shared).into_iter();
        let snapshot = self.shared.state.current();
        // Its labels and its enforcement may have changed since the start.
        let workload = reading.workload.as_ref().unwrap_or(&self.shared.workload);
        json!({
            "number": snapshot.as_ref().map(|snapshot| snapshot.number),
            "missing": missing.map(health::Missing::as_str).collect::<Vec<_>>(),
            "folder": self.shared.config.resources,
            "controller": self.shared.config.controller,
            "readAt": reading.read_at.map(rfc3339),
            "lost": reading.lost,
            "problems": reading.problems,
            "resources": resources(&reading.resources),
            "labels": workload.labels,
            "enforcement": workload.enforcement,
            "policies": policies(&reading.resources, workload),
            "routes": snapshot.as_deref().map(routes),
        })
    }

    fn certificates(&self) -> Value {
        let credentials = self.shared.credentials.current();
        let certificate = credentials.as_ref().map(|credentials| {
            let svid = credentials.svid();
            json!({
                "id": svid.id,
                "serial": svid.serial.to_string(),
                "notBefore": rfc3339(svid.not_before),
                "notAfter": rfc3339(svid.not_after),
                "issuerKeyId": hex(&svid.authority_key_id),
                "chainLength": svid.chain.len(),
                "epoch": credentials.epoch(),
                "pem": svid.chain_pem(),
            })
        });
        let bundle = credentials.as_ref().map(|credentials| {
            let bundles = &credentials.trust().bundles;
            let domains = bundles.trust_domains().map(|domain| {
                let roots = bundles.roots(domain).unwrap_or_default().iter();
                let roots = roots.map(|root| {
                    json!({
                        "sha256": hex(root.sha256()),
                        "notAfter": rfc3339(root.not_after()),
                    })
                });
                (domain.to_owned(), roots.collect::<Vec<_>>())
            });
            json!({
                "sequence": bundles.sequence(),
                "roots": domains.collect::<BTreeMap<_, _>>(),
                "revocations": credentials.trust().revocations.len(),
            })
        });
        json!({
            "certificate": certificate,
            "bundle": bundle,
            "renewals": self.renewals(),
        })
    }

    fn destinations(&self) -> Value {
        let Some(destinations) = &self.shared.destinations else {
            return Value::Null;
        };
        let list = destinations.list().into_iter().map(|(at, answer)| {
            let mut entry = destination(answer.as_ref());
            if let Some(entry) = entry.as_object_mut() {
                entry.insert("destination".to_owned(), json!(at));
            }
            entry
        });
        json!({
            "connected": destinations.is_connected(),
            "zone": destinations.zone(),
            "destinations": list.collect::<Vec<_>>(),
        })
    }

    fn denials(&self) -> Vec<Value> {
        let lines = self.shared.log.denials().into_iter();
        // A line is JSON; were one not, it is shown as the text that it is.
        lines
            .map(|line| serde_json::from_str(&line).unwrap_or(Value::String(line)))
            .collect()
    }

    fn renewals(&self) -> Value {
        let status = self.identity.snapshot();
        json!({
            "ok": status.renewals_ok,
            "failed": status.renewals_failed,
            "lastError": status.last_error,
            "next": status.next_renewal.map(rfc3339),
            "bundlesApplied": status.bundles_applied,
            "bundlesRefused": status.bundles_refused,
            "lastBundleRefusal": status.last_bundle_refusal,
            "stateErrors": status.state_errors,
        })
    }
}

/// What a browser would send, or whoever reached this port by another name than loopback.
fn refuse_strangers(request: &Parts, own: SocketAddr) -> Option<Answer> {
    let refuse = |why: &str| Some(words(StatusCode::FORBIDDEN, why));
    if request.headers.contains_key(ORIGIN) {
        return refuse("requests of web pages are refused");
    }
    let mut hosts = request.headers.get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return refuse("exactly one Host is needed");
    };
    if !host.to_str().is_ok_and(|host| names_us(host, own)) {
        return refuse("the Host must be this port on loopback");
    }
    let absolute = request.uri.authority();
    if !absolute.is_none_or(|authority| names_us(authority.as_str(), own)) {
        return refuse("the authority must be this port on loopback");
    }
    None
}

fn names_us(host: &str, own: SocketAddr) -> bool {
    let Ok(uri) = Uri::builder()
        .authority(host)
        .scheme("http")
        .path_and_query("/")
        .build()
    else {
        return false;
    };
    let Some(authority) = uri
        .authority()
        .filter(|authority| !authority.as_str().contains('@'))
    else {
        return false;
    };
    let name = authority.host();
    let address = name
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>();
    let loopback = name == "localhost" || address.is_ok_and(|address| address.is_loopback());
    loopback && authority.port_u16().unwrap_or(80) == own.port()
}

fn resources(set: &ResourceSet) -> Value {
    let policies = set.policies.iter().map(|policy| label(&policy.metadata));
    let services = set.services.iter().map(|service| label(&service.metadata));
    let traffic = set.traffic.iter().map(|traffic| label(&traffic.metadata));
    let broken = set.broken.iter().map(BrokenResource::label);
    json!({
        "AuthorizationPolicy": policies.collect::<Vec<_>>(),
        "StaticService": services.collect::<Vec<_>>(),
        "TrafficPolicy": traffic.collect::<Vec<_>>(),
        "broken": broken.collect::<Vec<_>>(),
    })
}

fn label(metadata: &Metadata) -> String {
    format!("{}/{}", metadata.namespace, metadata.name)
}

/// The policies that select this workload, as they are live.
fn policies(set: &ResourceSet, workload: &Workload) -> Vec<Value> {
    set.policies
        .iter()
        .filter(|policy| policy::selects(policy, workload))
        .map(|policy| json!({ "policy": label(&policy.metadata), "spec": policy.spec }))
        .collect()
}

fn routes(snapshot: &Snapshot) -> Vec<Value> {
    let routes = snapshot.routes.all().into_iter();
    routes.map(|found| route(found)).collect()
}

fn route(route: &Route) -> Value {
    json!({
        "service": &*route.service,
        "targetPort": route.target_port,
        "endpoints": &*route.endpoints,
    })
}

/// What the controller said of one destination.
fn destination(answer: Option<&destinations::Answer>) -> Value {
    use destinations::{Answer, Destination};
    match answer {
        Some(Answer::Known(Destination::Meshed(found))) => {
            let mut entry = route(found);
            if let Some(entry) = entry.as_object_mut() {
                entry.insert("kind".to_owned(), json!("meshed"));
                entry.insert("protocol".to_owned(), json!(found.protocol));
            }
            entry
        }
        Some(Answer::Known(Destination::External { refused })) => {
            json!({ "kind": "external", "refused": refused })
        }
        Some(Answer::Unknown) => json!({ "kind": "unknown" }),
        None => json!({ "kind": "waiting" }),
    }
}

fn page(document: &impl Serialize) -> Answer {
    match serde_json::to_string_pretty(document) {
        Ok(mut text) => {
            text.push('\n');
            answer(StatusCode::OK, "application/json", text)
        }
        Err(error) => words(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        if write!(text, "{byte:02x}").is_err() {
            text.clear();
        }
        text
    })
}
