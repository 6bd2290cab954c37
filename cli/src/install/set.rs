//! `--set KEY=VALUE`: what users tune, by name.
//!
//! Invariant: an unknown key, or a value that the part would not accept, is an error; the list in
//! the help is the list that is read.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use sidegate_injector::{LogLevel, Resources};

use super::plan::Plan;

/// Sets one thing, or says what is wrong with the value.
type Setter = fn(&mut Plan, &str) -> Result<(), String>;

/// One key: its name, what it sets, and how.
struct Key {
    name: &'static str,
    about: &'static str,
    set: Setter,
}

/// Keys of one thing each. Amounts of CPU and memory are `PART.AMOUNT`, see [`amount`].
const KEYS: &[Key] = &[
    key(
        "clusterDomain",
        "DNS domain of the cluster (cluster.local)",
        |plan, value| name(value).map(|value| plan.cluster_domain = value),
    ),
    key("ca.replicas", "replicas of the CA (1)", |plan, value| {
        read(value).map(|value| plan.ca.replicas = value)
    }),
    key(
        "ca.leafLifetime",
        "life of a workload's certificate, 1m to 7d (24h)",
        |plan, value| duration(value).map(|value| plan.leaf_lifetime = value),
    ),
    key(
        "ca.storageSize",
        "size of its volumes, with --ca-storage-class (1Gi)",
        |plan, value| {
            let size = read(value)?;
            let Some(storage) = &mut plan.ca_storage else {
                return Err("needs --ca-storage-class".to_owned());
            };
            storage.size = Some(size);
            Ok(())
        },
    ),
    key(
        "ca.checkSourceAddress",
        "refuse a token from an address that is none of its pod's (true)",
        |plan, value| read(value).map(|value| plan.check_source_address = value),
    ),
    key("ca.image", "whole reference of its image", |plan, value| {
        name(value).map(|value| plan.ca.image = Some(value))
    }),
    key(
        "controller.replicas",
        "replicas of the controller (1)",
        |plan, value| read(value).map(|value| plan.controller.replicas = value),
    ),
    key(
        "controller.podCidrs",
        "ranges of pod addresses that the nodes do not tell, by commas",
        |plan, value| networks(value).map(|value| plan.pod_cidrs = value),
    ),
    key(
        "controller.serviceCidrs",
        "ranges of Service addresses beside the cluster's ServiceCIDRs, by commas",
        |plan, value| networks(value).map(|value| plan.service_cidrs = value),
    ),
    key(
        "controller.externalCidrs",
        "ranges that are never the mesh's though they lie in the others, by commas",
        |plan, value| networks(value).map(|value| plan.external_cidrs = value),
    ),
    key(
        "controller.image",
        "whole reference of its image",
        |plan, value| name(value).map(|value| plan.controller.image = Some(value)),
    ),
    key(
        "injector.replicas",
        "replicas of the injector (1)",
        |plan, value| read(value).map(|value| plan.injector.replicas = value),
    ),
    key(
        "injector.image",
        "whole reference of its image",
        |plan, value| name(value).map(|value| plan.injector.image = Some(value)),
    ),
    key(
        "proxy.image",
        "whole reference of the sidecar's image",
        |plan, value| name(value).map(|value| plan.injection.images.proxy = Some(value)),
    ),
    key(
        "proxy.logLevel",
        "error, warn, info, debug or trace (info)",
        |plan, value| {
            let level = LogLevel::from_word(value).ok_or("is not a level")?;
            plan.injection.log_level = level;
            Ok(())
        },
    ),
    key(
        "proxy.drainTimeout",
        "how long an ending sidecar waits for open calls (25s)",
        |plan, value| duration(value).map(|value| plan.injection.drain_timeout = value),
    ),
    key(
        "proxy.waitTimeout",
        "how long an application waits for its sidecar (60s)",
        |plan, value| duration(value).map(|value| plan.injection.wait_timeout = value),
    ),
    key(
        "init.image",
        "whole reference of the init container's image",
        |plan, value| name(value).map(|value| plan.injection.images.init = Some(value)),
    ),
    key(
        "imagePullSecrets",
        "Secrets of sidegate-system for the control plane's images, by commas",
        |plan, value| list_of_names(value).map(|value| plan.image_pull_secrets = value),
    ),
    key(
        "priorityClassName",
        "priority class of the control plane",
        |plan, value| name(value).map(|value| plan.priority_class = Some(value)),
    ),
];

/// Whose amounts can be set.
const PARTS: [&str; 5] = ["ca", "controller", "injector", "proxy", "init"];
/// Which amounts.
const AMOUNTS: [&str; 4] = ["cpuRequest", "cpuLimit", "memoryRequest", "memoryLimit"];

const fn key(name: &'static str, about: &'static str, set: Setter) -> Key {
    Key { name, about, set }
}

/// Does what `KEY=VALUE` says.
pub(super) fn apply(assignment: &str, plan: &mut Plan) -> Result<(), String> {
    let Some((key, value)) = assignment.split_once('=') else {
        return Err(format!("--set {assignment}: write KEY=VALUE"));
    };
    let wrong = |why: String| format!("--set {key}: `{value}` {why}");
    if let Some(known) = KEYS.iter().find(|known| known.name == key) {
        return (known.set)(plan, value).map_err(wrong);
    }
    let Some(amounts) = key.split_once('.').and_then(|(part, amount)| {
        let resources = resources(plan, part)?;
        self::amount(resources, amount)
    }) else {
        return Err(format!(
            "--set {key}: there is no such key; `sidegate install --help` lists them"
        ));
    };
    *amounts = read(value).map_err(wrong)?;
    Ok(())
}

fn resources<'a>(plan: &'a mut Plan, part: &str) -> Option<&'a mut Resources> {
    match part {
        "ca" => Some(&mut plan.ca.resources),
        "controller" => Some(&mut plan.controller.resources),
        "injector" => Some(&mut plan.injector.resources),
        "proxy" => Some(&mut plan.injection.proxy_resources),
        "init" => Some(&mut plan.injection.init_resources),
        _ => None,
    }
}

fn amount<'a>(
    resources: &'a mut Resources,
    amount: &str,
) -> Option<&'a mut sidegate_injector::Quantity> {
    match amount {
        "cpuRequest" => Some(&mut resources.cpu_request),
        "cpuLimit" => Some(&mut resources.cpu_limit),
        "memoryRequest" => Some(&mut resources.memory_request),
        "memoryLimit" => Some(&mut resources.memory_limit),
        _ => None,
    }
}

/// The end of `sidegate install --help`.
pub(super) fn long_help() -> String {
    let mut text = "Keys of --set, and what is so without:\n".to_owned();
    for Key { name, about, .. } in KEYS {
        let _written = writeln!(text, "  {name:<26} {about}");
    }
    let _written = writeln!(text, "  {:<26} of {}", "PART.AMOUNT", PARTS.join(", "));
    let _written = writeln!(text, "  {:<26} {}", "", AMOUNTS.join(", "));
    text.push_str(
        "\nEverything else is for a kustomize overlay on deploy/kubernetes.\n\nExamples:\n  \
         sidegate install | kubectl apply -f -\n  \
         sidegate install --ha --ca-storage-class standard | kubectl apply -f -\n  \
         sidegate install --set proxy.memoryLimit=512Mi --set ca.leafLifetime=12h\n\n\
         `sidegate check` says when it is ready.",
    );
    text
}

fn read<T: FromStr<Err: std::fmt::Display>>(value: &str) -> Result<T, String> {
    value
        .parse()
        .map_err(|error: T::Err| format!("cannot be used: {error}"))
}

fn duration(value: &str) -> Result<Duration, String> {
    humantime::parse_duration(value).map_err(|error| format!("is not a duration: {error}"))
}

/// A name or reference: something, and nothing that could be YAML or a shell's.
fn name(value: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/:@+".contains(c);
    if value.is_empty() || !value.chars().all(allowed) {
        return Err("is not a name".to_owned());
    }
    Ok(value.to_owned())
}

/// Networks, each once and by its first address: anything else is most likely a slip.
fn networks(value: &str) -> Result<Vec<IpNet>, String> {
    let network = |text: &str| {
        let network: IpNet = text.trim().parse().map_err(|_error| {
            format!(
                "has `{text}`, which is not a network; write for example 10.244.0.0/16,fd00::/64"
            )
        })?;
        match network.trunc() {
            first if first == network => Ok(network),
            first => Err(format!(
                "has {network}, which is not the start of its network; write {first}"
            )),
        }
    };
    let networks = value
        .split(',')
        .map(network)
        .collect::<Result<Vec<_>, _>>()?;
    let mut seen = BTreeSet::new();
    match networks.iter().find(|network| !seen.insert(**network)) {
        Some(again) => Err(format!("has {again} twice")),
        None => Ok(networks),
    }
}

fn list_of_names(value: &str) -> Result<Vec<String>, String> {
    value.split(',').map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_amount_of_every_part_can_be_set() {
        let mut plan = Plan::default();
        for part in PARTS {
            for amount in AMOUNTS {
                apply(&format!("{part}.{amount}=333m"), &mut plan).unwrap();
                let set = self::amount(resources(&mut plan, part).unwrap(), amount);
                assert_eq!(set.unwrap().as_str(), "333m", "{part}.{amount}");
            }
        }
    }

    #[test]
    fn what_is_not_known_or_not_possible_is_refused() {
        let refused = [
            ("proxy.memory=1Gi", "no such key"),
            ("Proxy.logLevel=info", "no such key"),
            ("proxy.logLevel", "write KEY=VALUE"),
            ("proxy.logLevel=loud", "not a level"),
            ("proxy.memoryLimit=lots", "`lots`"),
            ("ca.replicas=two", "`two`"),
            ("ca.leafLifetime=1", "not a duration"),
            ("ca.storageSize=1Gi", "--ca-storage-class"),
            (
                "controller.podCidrs=10.0.0.0",
                "`10.0.0.0`, which is not a network",
            ),
            ("controller.podCidrs=", "``, which is not a network"),
            ("controller.serviceCidrs=10.96.0.1/12", "write 10.96.0.0/12"),
            (
                "controller.externalCidrs=fd00::/8,fd00::/8",
                "fd00::/8 twice",
            ),
            ("clusterDomain=", "not a name"),
            ("imagePullSecrets=a,,b", "not a name"),
        ];
        for (assignment, expected) in refused {
            let error = apply(assignment, &mut Plan::default()).unwrap_err();
            assert!(error.contains(expected), "{assignment}: {error}");
        }
    }

    #[test]
    fn the_help_lists_every_key() {
        let help = long_help();
        for key in KEYS {
            assert!(help.contains(key.name), "{}", key.name);
        }
    }
}
