//! Whether a cluster has what Sidegate needs.

use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt;

use super::Facts;
use super::finding::{Finding, names};
use crate::install::manifests;

/// Oldest version: the first in which a `ValidatingAdmissionPolicy` may be relied on.
const VERSION_MIN: (u32, u32) = (1, 30);

/// How far a node's clock may be off before certificates of the CA look as if they came too early:
/// they begin 30 s in the past.
const SKEW_WRONG_MS: i64 = 30_000;
/// From here on the margin is not for clocks alone.
const SKEW_LOOK_MS: i64 = 5_000;

/// APIs that are installed into, and may be turned off.
const NEEDED: [&str; 3] = [
    "admissionregistration.k8s.io/v1",
    "apiextensions.k8s.io/v1",
    "discovery.k8s.io/v1",
];

/// Before installation.
pub(super) fn before(facts: &Facts) -> Vec<Finding> {
    let mut findings = after(facts);
    findings.push(apis(facts));
    findings.push(permissions(facts));
    findings.push(names_taken(facts));
    findings
}

/// What must stay so.
pub(super) fn after(facts: &Facts) -> Vec<Finding> {
    vec![
        version(facts),
        kubelets(facts),
        clocks(facts),
        socket_load_balancer(facts),
    ]
}

fn version(facts: &Facts) -> Finding {
    let check = "kubernetes version";
    match parse_version(&facts.version) {
        Some(version) if version >= VERSION_MIN => Finding::well(check, &facts.version),
        _ => Finding::wrong(
            check,
            format!("{} is not 1.30 or newer", facts.version),
            "upgrade the cluster: native sidecars and admission policies are needed",
        ),
    }
}

/// `v1.34.4`, and what vendors make of it.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let digits = |part: &str| {
        let end = part.find(|c: char| !c.is_ascii_digit());
        part.get(..end.unwrap_or(part.len()))?.parse().ok()
    };
    let mut parts = text.trim_start_matches('v').split('.');
    Some((digits(parts.next()?)?, digits(parts.next()?)?))
}

fn kubelets(facts: &Facts) -> Finding {
    let check = "nodes";
    let old: Vec<String> = facts
        .nodes
        .iter()
        .filter_map(|node| {
            let info = node.status.as_ref()?.node_info.as_ref()?;
            let version = parse_version(&info.kubelet_version);
            let old = version.is_none_or(|version| version < VERSION_MIN);
            let linux = info.operating_system == "linux";
            (linux && old).then(|| format!("{} ({})", node.name_any(), info.kubelet_version))
        })
        .collect();
    if old.is_empty() {
        return Finding::well(
            check,
            format!("{} run what sidecars need", facts.nodes.len()),
        );
    }
    Finding::wrong(
        check,
        format!("kubelets older than 1.30: {}", names(&old)),
        "upgrade these nodes, or keep meshed pods off them",
    )
}

/// A node's lease says when it was renewed by the node's clock, and its managed fields by the API
/// server's.
fn skew_ms(lease: &Lease) -> Option<i64> {
    let node = lease.spec.as_ref()?.renew_time.as_ref()?.0.as_millisecond();
    let writes = lease.metadata.managed_fields.as_ref()?;
    let server = writes.iter().filter_map(|write| write.time.as_ref());
    let server = server.map(|time| time.0.as_millisecond()).max()?;
    // The server's time has whole seconds: within that second nothing is known.
    let ahead = node - server;
    Some(if (0..1_000).contains(&ahead) {
        0
    } else {
        ahead
    })
}

fn clocks(facts: &Facts) -> Finding {
    let check = "clocks";
    let mut worst = 0;
    let mut off = Vec::new();
    for lease in &facts.leases {
        let skew = skew_ms(lease).unwrap_or(0);
        if skew.abs() > SKEW_LOOK_MS {
            worst = worst.max(skew.abs());
            let way = if skew > 0 { "ahead" } else { "behind" };
            off.push(format!(
                "{} {} s {way}",
                lease.name_any(),
                skew.abs() / 1_000
            ));
        }
    }
    if off.is_empty() {
        return Finding::well(check, "nodes and API server agree");
    }
    let message = format!("off the API server's clock: {}", names(&off));
    let remedy = "synchronise the nodes' clocks (NTP): a certificate is refused before its start \
                  and after its end";
    if worst > SKEW_WRONG_MS {
        Finding::wrong(check, message, remedy)
    } else {
        Finding::look(check, message, remedy)
    }
}

/// Cilium may translate a Service's address in the socket, before anything is redirected.
fn socket_load_balancer(facts: &Facts) -> Finding {
    let check = "load balancer";
    let Some(config) = &facts.cilium else {
        return Finding::well(check, "Service addresses are seen by sidecars");
    };
    let says = |key: &str, values: &[&str]| {
        let value = config.data.as_ref().and_then(|data| data.get(key));
        value.is_some_and(|value| values.contains(&value.as_str()))
    };
    let sockets =
        says("bpf-lb-sock", &["true"]) || says("kube-proxy-replacement", &["true", "strict"]);
    if !sockets || says("bpf-lb-sock-hostns-only", &["true"]) {
        return Finding::well(check, "Cilium leaves the sockets of pods alone");
    }
    Finding::look(
        check,
        "Cilium translates Service addresses in the sockets of pods, so sidecars see pods' \
         addresses and a TrafficPolicy of the Service is not found",
        "set `socketLB.hostNamespaceOnly=true` in Cilium's Helm values",
    )
}

fn apis(facts: &Facts) -> Finding {
    let check = "APIs";
    let served = |api: &&str| !facts.served.iter().any(|served| served == api);
    let missing: Vec<&str> = NEEDED.into_iter().filter(served).collect();
    if missing.is_empty() {
        return Finding::well(check, "all that is needed is served");
    }
    Finding::wrong(
        check,
        format!("the API server does not serve {}", names(&missing)),
        "turn them on with --runtime-config of the API server",
    )
}

fn permissions(facts: &Facts) -> Finding {
    let check = "permissions";
    if facts.denied.is_empty() {
        return Finding::well(check, "you may install Sidegate");
    }
    Finding::wrong(
        check,
        format!("you may not {}", names(&facts.denied)),
        "ask whoever runs the cluster, or choose another --context; cluster-admin may",
    )
}

/// An installation that is there already, or somebody else's objects of the same names.
fn names_taken(facts: &Facts) -> Finding {
    let check = "names";
    let namespace = facts
        .namespaces
        .iter()
        .find(|namespace| namespace.name_any() == sidegate_mesh::resource::SYSTEM_NAMESPACE);
    let Some(namespace) = namespace else {
        return Finding::well(check, "nothing of Sidegate is here yet");
    };
    let ours = namespace.labels().get("app.kubernetes.io/part-of");
    if ours.is_some_and(|part| part == "sidegate") {
        return Finding::look(
            check,
            "Sidegate is installed already",
            "`sidegate install | kubectl diff -f -` shows what an upgrade changes",
        );
    }
    Finding::wrong(
        check,
        format!("the namespace {} is somebody else's", namespace.name_any()),
        format!(
            "the control plane's namespace cannot be another ({}); move what is in it",
            manifests::CA
        ),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::finding::Level;
    use super::*;

    fn of<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    fn lease(node: &str, server: &str) -> Lease {
        of(json!({
            "metadata": { "name": "node1", "managedFields": [{ "manager": "kubelet", "time": server }] },
            "spec": { "renewTime": node },
        }))
    }

    #[test]
    fn a_version_is_judged_whatever_a_vendor_adds() {
        for (text, level) in [
            ("v1.34.4", Level::Well),
            ("v1.30.0-gke.100+abc", Level::Well),
            ("v1.30+", Level::Well),
            ("v1.29.15", Level::Wrong),
            ("v2.0.0", Level::Well),
            ("unknown", Level::Wrong),
        ] {
            let facts = Facts {
                version: text.to_owned(),
                ..Facts::default()
            };
            assert_eq!(version(&facts).level, level, "{text}");
        }
    }

    #[test]
    fn clocks_are_compared_by_what_each_wrote() {
        let at = |node: &str| {
            let lease = lease(node, "2026-01-01T00:00:10Z");
            clocks(&Facts {
                leases: vec![lease],
                ..Facts::default()
            })
        };
        assert_eq!(at("2026-01-01T00:00:10.900000Z").level, Level::Well);
        assert_eq!(at("2026-01-01T00:00:06.000000Z").level, Level::Well);
        let behind = at("2026-01-01T00:00:04.000000Z");
        assert_eq!(behind.level, Level::Look);
        assert!(behind.message.contains("node1 6 s behind"), "{behind:?}");
        let ahead = at("2026-01-01T00:00:41.000000Z");
        assert_eq!(ahead.level, Level::Wrong);
        assert!(ahead.message.contains("31 s ahead"), "{ahead:?}");
    }

    #[test]
    fn a_load_balancer_in_sockets_is_found() {
        let with = |data: Value| {
            let cilium = Some(of(json!({ "metadata": {}, "data": data })));
            socket_load_balancer(&Facts {
                cilium,
                ..Facts::default()
            })
            .level
        };
        assert_eq!(with(json!({})), Level::Well);
        assert_eq!(with(json!({ "bpf-lb-sock": "true" })), Level::Look);
        assert_eq!(
            with(json!({ "kube-proxy-replacement": "true" })),
            Level::Look
        );
        let limited = json!({ "bpf-lb-sock": "true", "bpf-lb-sock-hostns-only": "true" });
        assert_eq!(with(limited), Level::Well);
        assert_eq!(socket_load_balancer(&Facts::default()).level, Level::Well);
    }

    #[test]
    fn what_is_missing_before_installation_is_wrong() {
        let facts = Facts {
            version: "v1.34.4".to_owned(),
            denied: vec!["create clusterroles".to_owned()],
            namespaces: vec![of(json!({ "metadata": { "name": "sidegate-system" } }))],
            nodes: vec![of(json!({
                "metadata": { "name": "old" },
                "status": { "nodeInfo": {
                    "kubeletVersion": "v1.28.1", "operatingSystem": "linux",
                    "architecture": "", "bootID": "", "containerRuntimeVersion": "",
                    "kernelVersion": "", "kubeProxyVersion": "", "machineID": "",
                    "osImage": "", "systemUUID": "",
                } },
            }))],
            ..Facts::default()
        };
        let wrong: Vec<&str> = before(&facts)
            .iter()
            .filter(|finding| finding.level == Level::Wrong)
            .map(|finding| finding.check)
            .collect();
        assert_eq!(wrong, ["nodes", "APIs", "permissions", "names"]);
    }
}
