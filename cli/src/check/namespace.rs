//! Whether the pods of a namespace are in the mesh, and stay there.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Namespace, Pod};
use kube::ResourceExt;
use serde_json::Value;
use sidegate_injector::{NamespaceFacts, Outcome, Settings, inject, templates};
use sidegate_mesh::resource::Kind;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Facts;
use super::control_plane::{bundle_fault, installed_version};
use super::finding::{Finding, names};
use super::injected::{Certificate, Injected, own_containers};
use crate::kube::sidecars::Sidecar;

const INJECT: &str = "sidegate.dev/inject";
const ENFORCEMENT: &str = "sidegate.dev/enforcement";
const SKIPPED: &str = "sidegate.dev/skipped";
const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";

/// Kubernetes' own default.
const GRACE_S: i64 = 30;

/// Whether pods of a namespace are injected.
pub(super) fn is_labelled(namespace: &Namespace) -> bool {
    to_facts(namespace).is_labelled()
}

/// Whether a pod only records what it would refuse.
pub(super) fn audits(facts: &Facts, pod: &Injected<'_>) -> bool {
    let namespace = find(facts, &pod.sidecar.namespace);
    let said = namespace.and_then(|it| it.annotations().get(ENFORCEMENT));
    let said = pod.enforcement().or(said.map(String::as_str));
    said == Some("audit")
}

/// One line for each labelled namespace.
pub(super) fn overview(facts: &Facts) -> Vec<Finding> {
    let check = "namespaces";
    let labelled: Vec<&Namespace> = facts
        .namespaces
        .iter()
        .filter(|it| is_labelled(it))
        .collect();
    if labelled.is_empty() {
        return vec![Finding::look(
            check,
            "none is in the mesh",
            "kubectl label namespace NAME sidegate.dev/inject=enabled, then restart its workloads",
        )];
    }
    labelled
        .into_iter()
        .map(|namespace| adoption(facts, namespace))
        .collect()
}

/// How far a namespace has come.
fn adoption(facts: &Facts, namespace: &Namespace) -> Finding {
    let check = "adoption";
    let name = namespace.name_any();
    let pods: Vec<&Pod> = pods_of(facts, &name).collect();
    let meshed = pods
        .iter()
        .filter(|pod| Injected::of(pod).is_some())
        .count();
    let audited = namespace
        .annotations()
        .get(ENFORCEMENT)
        .is_some_and(|it| it == "audit");
    let mode = if audited { "audit" } else { "enforce" };
    let message = format!("{name}: {meshed} of {} pods meshed, {mode}", pods.len());
    if meshed < pods.len() {
        return Finding::look(
            check,
            message,
            format!("sidegate check -n {name} says which and why"),
        );
    }
    if audited {
        return Finding::look(
            check,
            format!("{message}: nothing is refused"),
            format!(
                "look at `sidegate logs -n {name} --denied`; when it shows only what should be \
                 refused: kubectl annotate namespace {name} --overwrite {ENFORCEMENT}=enforce"
            ),
        );
    }
    Finding::well(check, message)
}

/// Everything about one namespace.
pub(super) fn check(facts: &Facts, name: &str) -> Vec<Finding> {
    let Some(namespace) = find(facts, name) else {
        return vec![Finding::wrong(
            "namespace",
            format!("{name} is not there"),
            "kubectl get namespaces",
        )];
    };
    if !is_labelled(namespace) {
        return vec![Finding::wrong(
            "namespace",
            format!("{name} is not in the mesh"),
            format!("kubectl label namespace {name} {INJECT}=enabled, then restart its workloads"),
        )];
    }
    let injected: Vec<Injected<'_>> = pods_of(facts, name).filter_map(Injected::of).collect();
    let mut findings = vec![adoption(facts, namespace), pod_security(namespace)];
    findings.push(bundle(facts, name));
    findings.push(other_meshes(namespace));
    findings.extend(unmeshed(facts, namespace));
    findings.push(refused_workloads(facts, namespace));
    findings.push(old_versions(facts, &injected));
    findings.push(readiness(&injected));
    findings.push(certificates(facts));
    findings.push(skipped_probes(&injected));
    findings.push(udp(&injected));
    findings.push(draining(&injected));
    findings.push(escapes(&injected));
    findings.push(policy_there(facts, namespace));
    findings
}

fn find<'a>(facts: &'a Facts, name: &str) -> Option<&'a Namespace> {
    facts.namespaces.iter().find(|it| it.name_any() == name)
}

/// The pods of a namespace that have not ended.
fn pods_of<'a>(facts: &'a Facts, name: &'a str) -> impl Iterator<Item = &'a Pod> {
    facts.pods.iter().filter(move |pod| {
        let phase = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        pod.namespace().as_deref() == Some(name) && !matches!(phase, Some("Succeeded" | "Failed"))
    })
}

fn to_facts(namespace: &Namespace) -> NamespaceFacts {
    let map = |from: &BTreeMap<String, String>| from.clone();
    NamespaceFacts {
        name: namespace.name_any(),
        labels: map(namespace.labels()),
        annotations: map(namespace.annotations()),
    }
}

fn pod_security(namespace: &Namespace) -> Finding {
    let check = "pod security";
    match namespace.labels().get(POD_SECURITY).map(String::as_str) {
        Some(level @ ("baseline" | "restricted")) => Finding::wrong(
            check,
            format!("`{level}` refuses the init container, which needs NET_ADMIN"),
            format!(
                "kubectl label namespace {} --overwrite {POD_SECURITY}=privileged (audit and warn \
                 may stay)",
                namespace.name_any()
            ),
        ),
        _ => Finding::well(check, "admits the init container"),
    }
}

fn bundle(facts: &Facts, name: &str) -> Finding {
    let check = "bundle";
    match bundle_fault(facts, name) {
        None => Finding::well(check, "the mesh's roots are here"),
        Some(fault) => Finding::wrong(
            check,
            format!("the ConfigMap sidegate-bundle: {fault}"),
            "the CA publishes it within seconds; `sidegate check` says whether the CA runs",
        ),
    }
}

fn other_meshes(namespace: &Namespace) -> Finding {
    let check = "other meshes";
    let labels = namespace.labels();
    let istio = labels
        .get("istio-injection")
        .is_some_and(|it| it == "enabled")
        || labels.contains_key("istio.io/rev");
    let linkerd = namespace.annotations().get("linkerd.io/inject");
    if istio || linkerd.is_some_and(|it| it == "enabled" || it == "ingress") {
        return Finding::wrong(
            check,
            "another mesh injects here, too: both redirect, and neither works",
            "take the other one's label or annotation off, and restart the workloads",
        );
    }
    Finding::well(check, "none injects here")
}

/// Pods without a sidecar, by the reason.
fn unmeshed(facts: &Facts, namespace: &Namespace) -> Vec<Finding> {
    let name = namespace.name_any();
    let (mut opted_out, mut skipped, mut refused, mut early) = (vec![], vec![], vec![], vec![]);
    let to = to_facts(namespace);
    for pod in pods_of(facts, &name).filter(|pod| Sidecar::of(pod).is_none()) {
        let called = pod.name_any();
        if pod.labels().get(INJECT).is_some_and(|it| it == "disabled") {
            opted_out.push(called);
        } else if let Some(reason) = pod.annotations().get(SKIPPED) {
            skipped.push(format!("{called} ({reason})"));
        } else {
            let raw = serde_json::to_value(pod).unwrap_or_default();
            match inject(&raw, &to, &Settings::default()) {
                Err(refusal) => refused.push(format!("{called}: {refusal}")),
                Ok(Outcome::Skipped { reason, .. }) => skipped.push(format!("{called} ({reason})")),
                Ok(_) => early.push(called),
            }
        }
    }
    let mut findings = Vec::new();
    let mut look = |check, pods: &[String], why: &str, remedy: &str| {
        if !pods.is_empty() {
            findings.push(Finding::look(
                check,
                format!("{why}: {}", names(pods)),
                remedy,
            ));
        }
    };
    look(
        "pods without sidecar",
        &early,
        "made before the label, or without the injector",
        &format!("restart what makes them: kubectl rollout restart deployment -n {name}"),
    );
    look(
        "opted out",
        &opted_out,
        "have no identity, and receive no meshed call",
        &format!("take the label {INJECT} off their template if that is not meant"),
    );
    look(
        "skipped",
        &skipped,
        "cannot have a sidecar",
        "the reason says what to change; an enforcing workload refuses their calls",
    );
    if !refused.is_empty() {
        findings.push(Finding::wrong(
            "pods without sidecar",
            format!("would be refused when made again: {}", names(&refused)),
            "the message names what to change, in the workload's template or the namespace",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::well("pods without sidecar", "none"));
    }
    findings
}

/// Workloads whose pods the injector refuses: they have none that could be looked at.
fn refused_workloads(facts: &Facts, namespace: &Namespace) -> Finding {
    let check = "workloads";
    let to = to_facts(namespace);
    let mut refused = Vec::new();
    for workload in &facts.workloads {
        let mut workload = workload.clone();
        let judged = templates(&mut workload, &mut |which, template| {
            if let Err(refusal) = inject(template, &to, &Settings::default()) {
                refused.push(format!("{} {}: {refusal}", which.kind, which.name));
            }
            Ok::<(), std::convert::Infallible>(())
        });
        if let Err(never) = judged {
            match never {}
        }
    }
    if refused.is_empty() {
        let count = facts.workloads.len();
        return Finding::well(check, format!("the pods of {count} can be injected"));
    }
    Finding::wrong(
        check,
        format!("their pods are refused: {}", names(&refused)),
        "the message names what to change: an annotation, a port of ours, our uid",
    )
}

fn old_versions(facts: &Facts, injected: &[Injected<'_>]) -> Finding {
    let check = "sidecars' versions";
    let current = installed_version(facts).unwrap_or(env!("CARGO_PKG_VERSION"));
    let old: Vec<String> = injected
        .iter()
        .filter(|pod| pod.sidecar.version != current)
        .map(|pod| format!("{} ({})", pod.sidecar.pod, pod.sidecar.version))
        .collect();
    if old.is_empty() {
        return Finding::well(check, current);
    }
    Finding::look(
        check,
        format!(
            "injected by another version than {current}: {}",
            names(&old)
        ),
        "restart their workloads when it suits; a policy that an older sidecar does not know fails \
         closed there",
    )
}

fn readiness(injected: &[Injected<'_>]) -> Finding {
    let check = "sidecars";
    let troubled: Vec<String> = injected
        .iter()
        .filter(|pod| !pod.sidecar.terminating)
        .filter_map(|pod| match (pod.sidecar.running, pod.sidecar.restarts) {
            (false, _) => Some(format!("{} does not run", pod.sidecar.pod)),
            (true, 0) => None,
            (true, restarts) => Some(format!("{} restarted {restarts} times", pod.sidecar.pod)),
        })
        .collect();
    if troubled.is_empty() {
        return Finding::well(check, format!("{} run", injected.len()));
    }
    Finding::look(
        check,
        names(&troubled),
        "kubectl logs POD -c sidegate-proxy --previous, and kubectl describe pod POD",
    )
}

fn certificates(facts: &Facts) -> Finding {
    let check = "certificates";
    let (mut ended, mut near) = (Vec::new(), Vec::new());
    for certificate in &facts.certificates {
        match left(certificate, facts.now) {
            Left::Enough => {}
            Left::Little(why) => near.push(why),
            Left::None(why) => ended.push(why),
        }
    }
    let remedy = "`sidegate check` says whether the CA runs; `sidegate certs` shows each, and its \
                  last error";
    match (ended.is_empty(), near.is_empty()) {
        (false, _) => Finding::wrong(check, names(&ended), remedy),
        (true, false) => Finding::look(check, names(&near), remedy),
        (true, true) => Finding::well(check, format!("{} in date", facts.certificates.len())),
    }
}

/// How much of a certificate's life is left.
enum Left {
    Enough,
    Little(String),
    None(String),
}

/// Renewal comes at half of the life, so a quarter that is left is a renewal that failed.
fn left(certificate: &Certificate, now: i64) -> Left {
    let pod = &certificate.pod;
    let certs = match &certificate.answer {
        Ok(certs) => certs,
        Err(error) => return Left::Little(format!("{pod} does not say: {error}")),
    };
    let error = certs.renewals.last_error.as_deref();
    let why = error.map_or(String::new(), |error| format!(": {error}"));
    let Some(leaf) = &certs.certificate else {
        return Left::None(format!("{pod} has none{why}"));
    };
    let at = |text: &str| OffsetDateTime::parse(text, &Rfc3339).ok();
    let (Some(from), Some(to)) = (at(&leaf.not_before), at(&leaf.not_after)) else {
        return Left::Little(format!("{pod} has unreadable dates"));
    };
    let (life, left) = (to - from, to.unix_timestamp() - now);
    if left <= 0 {
        Left::None(format!("{pod} has one that has ended{why}"))
    } else if left < life.whole_seconds() / 4 {
        Left::Little(format!("{pod} has {left} s left{why}"))
    } else {
        Left::Enough
    }
}

/// Probes go through the sidecar, so a port need not be skipped for them.
fn skipped_probes(injected: &[Injected<'_>]) -> Finding {
    let check = "probes";
    let mut useless = Vec::new();
    for pod in injected {
        let skipped = pod.skipped_inbound();
        let probed = pod.probed().into_iter();
        useless.extend(
            probed
                .filter(|(_, port)| skipped.contains(port))
                .map(|(probe, port)| format!("{} {probe} on {port}", pod.sidecar.pod)),
        );
    }
    if useless.is_empty() {
        return Finding::well(check, "work without a skipped port");
    }
    Finding::look(
        check,
        format!("on a port that is skipped: {}", names(&useless)),
        "probes work under default deny; a skipped port is neither encrypted nor authorized: take \
         it off sidegate.dev/skip-inbound-ports",
    )
}

/// UDP comes in only where it is named.
fn udp(injected: &[Injected<'_>]) -> Finding {
    let check = "other protocols";
    let mut closed = Vec::new();
    for pod in injected {
        let open = pod.udp_open();
        for port in own_containers(pod.pod).flat_map(|it| it.ports.iter().flatten()) {
            let number = u16::try_from(port.container_port).unwrap_or(0);
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let named = protocol == "UDP" && open.contains(&number);
            if protocol != "TCP" && !named {
                closed.push(format!("{} {number}/{protocol}", pod.sidecar.pod));
            }
        }
    }
    if closed.is_empty() {
        return Finding::well(check, "none is shut off");
    }
    Finding::look(
        check,
        format!("closed to callers: {}", names(&closed)),
        "name UDP ports in sidegate.dev/udp-ports; they are neither encrypted nor authorized",
    )
}

fn draining(injected: &[Injected<'_>]) -> Finding {
    let check = "draining";
    let long: Vec<String> = injected
        .iter()
        .filter_map(|pod| {
            let spec = pod.pod.spec.as_ref()?;
            let grace = spec.termination_grace_period_seconds.unwrap_or(GRACE_S);
            let drain = pod.drain_s()?;
            let beyond = u64::try_from(grace).is_ok_and(|grace| drain > grace.max(1));
            beyond.then(|| format!("{} ({drain} s of {grace} s)", pod.sidecar.pod))
        })
        .collect();
    if long.is_empty() {
        return Finding::well(check, "fits into the pods' grace periods");
    }
    Finding::look(
        check,
        format!(
            "drain-timeout is longer than the grace period: {}",
            names(&long)
        ),
        "raise terminationGracePeriodSeconds, or lower sidegate.dev/drain-timeout",
    )
}

/// Containers that can undo redirection, or pass for the sidecar.
fn escapes(injected: &[Injected<'_>]) -> Finding {
    let check = "escapes";
    let mut able = Vec::new();
    for pod in injected {
        let root_pod = pod_runs_as_root(pod.pod);
        for container in own_containers(pod.pod) {
            if let Some(how) = escape(container, root_pod) {
                able.push(format!("{}/{} ({how})", pod.sidecar.pod, container.name));
            }
        }
    }
    if able.is_empty() {
        return Finding::well(check, "no container may undo redirection");
    }
    Finding::look(
        check,
        format!("can leave the mesh when taken over: {}", names(&able)),
        "run them without root and NET_ADMIN, with `capabilities: { drop: [ALL] }`; what comes in is \
         enforced all the same",
    )
}

fn pod_runs_as_root(pod: &Pod) -> bool {
    let context = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.security_context.as_ref());
    context.and_then(|context| context.run_as_user) == Some(0)
}

fn escape(container: &Container, root_pod: bool) -> Option<&'static str> {
    let context = container.security_context.as_ref();
    if context.and_then(|it| it.privileged) == Some(true) {
        return Some("privileged");
    }
    let capabilities = context.and_then(|it| it.capabilities.as_ref());
    let lists = |list: Option<&Vec<String>>, wanted: &[&str]| {
        let mut list = list.into_iter().flatten();
        list.any(|it| wanted.contains(&it.trim_start_matches("CAP_")))
    };
    let added = capabilities.and_then(|it| it.add.as_ref());
    let dropped = capabilities.and_then(|it| it.drop.as_ref());
    if lists(added, &["NET_ADMIN", "SYS_ADMIN", "ALL"]) {
        return Some("NET_ADMIN");
    }
    let user = context.and_then(|it| it.run_as_user);
    let root = user.map_or(root_pod, |user| user == 0);
    let may_change_user = lists(added, &["SETUID"]) || !lists(dropped, &["ALL", "SETUID"]);
    (root && may_change_user).then_some("root with SETUID")
}

/// Without a policy an enforcing namespace refuses every call.
fn policy_there(facts: &Facts, namespace: &Namespace) -> Finding {
    let check = "policies";
    let name = namespace.name_any();
    let of = |(kind, object): &&(Kind, kube::api::DynamicObject)| {
        *kind == Kind::AuthorizationPolicy && object.namespace().as_deref() == Some(&name)
    };
    let policies = facts.resources.iter().filter(of);
    let action = |object: &kube::api::DynamicObject| {
        object.data.pointer("/spec/action").and_then(Value::as_str) == Some("Allow")
    };
    let allows = policies.filter(|(_, object)| action(object)).count();
    let audited = namespace
        .annotations()
        .get(ENFORCEMENT)
        .is_some_and(|it| it == "audit");
    if allows > 0 {
        return Finding::well(check, format!("{allows} that allow"));
    }
    let message = "no AuthorizationPolicy allows anything";
    let remedy = "write one for each workload; `sidegate authz test` shows what it decides";
    if audited {
        return Finding::look(
            check,
            format!("{message}: enforced, every call would be refused"),
            remedy,
        );
    }
    Finding::look(check, format!("{message}: every call is refused"), remedy)
}

#[cfg(test)]
mod tests;
