//! What no pod may take: our names, our uid, our ports, and the sidecar's processes.
//!
//! Invariant: a pod that passed shares neither uid nor process list with its sidecar, listens on
//! none of its ports, and mounts none of its volumes.

use std::collections::HashSet;

use serde_json::Value;

use super::Refusal;
use super::pod::{Container, List, Object, Pod, object};
use crate::settings::{
    BUNDLE_VOLUME, INIT_CONTAINER, PROXY_CONTAINER, PROXY_UID, RESERVED_PORTS, TOKEN_VOLUME,
};

/// Whether a container's name is ours.
pub(super) fn is_our_container(name: &str) -> bool {
    [INIT_CONTAINER, PROXY_CONTAINER].contains(&name)
}

/// Whether a volume's name is ours.
pub(super) fn is_our_volume(name: &str) -> bool {
    [TOKEN_VOLUME, BUNDLE_VOLUME].contains(&name)
}

/// The names of ours that a pod brings.
pub(super) fn names_of_ours<'p>(pod: &'p Pod<'_>) -> impl Iterator<Item = &'p str> {
    let containers = pod.containers.iter().map(|container| container.name);
    let volumes = pod.volumes.iter().flatten();
    let volumes = volumes.filter_map(|volume| volume.get("name")?.as_str());
    let containers = containers.filter(|name| is_our_container(name));
    containers.chain(volumes.filter(|name| is_our_volume(name)))
}

/// Refuses a pod that takes what is the sidecar's. Containers and volumes of our names in their
/// own places are compared elsewhere.
pub(super) fn check(pod: &Pod<'_>) -> Result<(), Refusal> {
    check_names(pod)?;
    check_processes(pod)?;
    if let Some(context) = object(pod.spec, "securityContext", || {
        "spec.securityContext".into()
    })? {
        check_user(context, "the pod")?;
    }
    for container in &pod.containers {
        if is_our_container(container.name) {
            if container.list != List::Init {
                return Err(Refusal::Taken {
                    what: format!("the name of container {}", container.name),
                    help: "rename it",
                });
            }
            continue;
        }
        let whose = || format!("container {}", container.name);
        if let Some(context) = container.object("securityContext")? {
            check_user(context, &whose())?;
        }
        check_ports(container)?;
        check_mounts(container)?;
    }
    Ok(())
}

/// The API server refuses two containers of one name only after us, and what is kept of their
/// probes goes by the name.
fn check_names(pod: &Pod<'_>) -> Result<(), Refusal> {
    let mut seen = HashSet::new();
    match pod.containers.iter().find(|each| !seen.insert(each.name)) {
        None => Ok(()),
        Some(second) => Err(Refusal::shape(
            format!("container {}", second.name),
            "its name is another container's too",
        )),
    }
}

fn check_processes(pod: &Pod<'_>) -> Result<(), Refusal> {
    for field in ["shareProcessNamespace", "hostPID"] {
        if pod.flag(field) {
            return Err(Refusal::Taken {
                what: format!("with {field}, the application sees the sidecar's process, which"),
                help: "remove it, or leave the mesh with the label sidegate.dev/inject: disabled",
            });
        }
    }
    Ok(())
}

fn check_user(context: &Object, whose: &str) -> Result<(), Refusal> {
    let is_ours = |value: &Value| value.as_i64() == Some(i64::from(PROXY_UID));
    let fields = ["runAsUser", "runAsGroup", "fsGroup"];
    let mut taken = fields
        .iter()
        .filter(|field| context.get(**field).is_some_and(is_ours));
    let groups = context.get("supplementalGroups").and_then(Value::as_array);
    let in_groups = groups.is_some_and(|groups| groups.iter().any(is_ours));
    let field = taken
        .next()
        .copied()
        .or(in_groups.then_some("supplementalGroups"));
    match field {
        None => Ok(()),
        Some(field) => Err(Refusal::Taken {
            what: format!("uid and gid {PROXY_UID} ({field} of {whose})"),
            help: "choose another: traffic of this one is not redirected",
        }),
    }
}

fn check_ports(container: &Container<'_>) -> Result<(), Refusal> {
    for port in container.objects("ports")? {
        let protocol = port.get("protocol").and_then(Value::as_str);
        let number = port.get("containerPort").and_then(Value::as_u64);
        let is_tcp = protocol.is_none_or(|protocol| protocol == "TCP");
        let taken = RESERVED_PORTS
            .iter()
            .find(|port| number == Some(u64::from(**port)));
        if let (true, Some(port)) = (is_tcp, taken) {
            return Err(Refusal::Taken {
                what: format!("port {port} (of container {})", container.name),
                help: "let the application listen on another",
            });
        }
    }
    Ok(())
}

fn check_mounts(container: &Container<'_>) -> Result<(), Refusal> {
    for mount in container.objects("volumeMounts")? {
        let volume = mount
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if is_our_volume(volume) {
            return Err(Refusal::Taken {
                what: format!("volume {volume} (mounted in container {})", container.name),
                help: "remove the mount",
            });
        }
    }
    Ok(())
}
