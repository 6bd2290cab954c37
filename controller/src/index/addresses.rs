//! Whose an address is that no Service and no pod has.
//!
//! Invariant: an address in a range of pods or Services that nobody is known to have is unknown,
//! never external: it may belong to a pod that the watch has not shown yet.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::facts::Node;

/// The ranges and addresses that are said by hand or by the cluster.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    configured: Ranges,
    nodes: HashMap<Arc<str>, Node>,
    services: HashMap<Arc<str>, Vec<IpNet>>,
    /// Neighbourhoods of known pods and how many are in each.
    neighbourhoods: HashMap<IpNet, usize>,
    /// The same of Service addresses, for clusters without ServiceCIDRs.
    service_neighbourhoods: HashMap<IpNet, usize>,
}

/// Ranges from the configuration.
#[derive(Clone, Debug, Default)]
pub struct Ranges {
    /// Pods' addresses.
    pub pods: Vec<IpNet>,
    /// Services' addresses.
    pub services: Vec<IpNet>,
    /// Never the mesh's.
    pub external: Vec<IpNet>,
}

/// Whose an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Positively not the mesh's.
    Outside,
    /// A node's.
    Node,
    /// Of a range of pods or Services.
    Cluster,
    /// Nobody's that can be called from elsewhere: loopback and its like.
    Nobody,
}

impl Addresses {
    pub(crate) fn new(configured: Ranges) -> Self {
        Self {
            configured,
            ..Self::default()
        }
    }

    pub(crate) fn owner(&self, address: IpAddr) -> Owner {
        if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            return Owner::Nobody;
        }
        if self
            .nodes
            .values()
            .any(|node| node.addresses.contains(&address))
        {
            return Owner::Node;
        }
        let within = |ranges: &[IpNet]| ranges.iter().any(|range| range.contains(&address));
        if within(&self.configured.external) {
            return Owner::Outside;
        }
        let told = within(&self.configured.pods)
            || within(&self.configured.services)
            || self.nodes.values().any(|node| within(&node.pod_ranges))
            || self.services.values().any(|ranges| within(ranges));
        if told || self.is_near_a_pod(address) || self.is_near_a_service(address) {
            Owner::Cluster
        } else {
            Owner::Outside
        }
    }

    fn is_near_a_pod(&self, address: IpAddr) -> bool {
        let is_told = !self.configured.pods.is_empty()
            || self.nodes.values().any(|node| !node.pod_ranges.is_empty());
        !is_told && self.neighbourhoods.contains_key(&neighbourhood(address))
    }

    fn is_near_a_service(&self, address: IpAddr) -> bool {
        let is_told = !self.configured.services.is_empty() || !self.services.is_empty();
        !is_told
            && self
                .service_neighbourhoods
                .contains_key(&service_neighbourhood(address))
    }

    /// Whether something changed.
    pub(crate) fn set_node(&mut self, name: &str, node: Option<Node>) -> bool {
        set(&mut self.nodes, name, node)
    }

    /// Whether something changed.
    pub(crate) fn set_services(&mut self, name: &str, ranges: Option<Vec<IpNet>>) -> bool {
        set(&mut self.services, name, ranges)
    }

    pub(crate) fn zone(&self, node: Option<&Arc<str>>) -> Option<&Arc<str>> {
        self.nodes.get(node?)?.zone.as_ref()
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = &Arc<str>> {
        self.nodes.keys()
    }

    pub(crate) fn service_ranges(&self) -> impl Iterator<Item = &Arc<str>> {
        self.services.keys()
    }

    /// A pod with these addresses came (`true`) or went. Whether an address changed its owner.
    pub(crate) fn count_pod(&mut self, addresses: &[IpAddr], came: bool) -> bool {
        let nets = addresses.iter().map(|address| neighbourhood(*address));
        count(&mut self.neighbourhoods, nets, came)
    }

    /// As [`Self::count_pod`], for a Service.
    pub(crate) fn count_service(&mut self, addresses: &[IpAddr], came: bool) -> bool {
        let nets = addresses
            .iter()
            .map(|address| service_neighbourhood(*address));
        count(&mut self.service_neighbourhoods, nets, came)
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
            + self.services.len()
            + self.neighbourhoods.len()
            + self.service_neighbourhoods.len()
    }
}

fn set<T: PartialEq>(map: &mut HashMap<Arc<str>, T>, name: &str, value: Option<T>) -> bool {
    if map.get(name) == value.as_ref() {
        return false;
    }
    match value {
        Some(value) => drop(map.insert(name.into(), value)),
        None => drop(map.remove(name)),
    }
    true
}

fn count(map: &mut HashMap<IpNet, usize>, nets: impl Iterator<Item = IpNet>, came: bool) -> bool {
    let mut changed = false;
    for net in nets {
        let number = map.entry(net).or_default();
        if came {
            *number += 1;
            changed |= *number == 1;
        } else {
            *number = number.saturating_sub(1);
            if *number == 0 {
                map.remove(&net);
                changed = true;
            }
        }
    }
    changed
}

/// The /24 or /64 around a pod.
fn neighbourhood(address: IpAddr) -> IpNet {
    around(address, 24, 64)
}

/// The /16 or /108 around a Service: common sizes of ranges of Services.
fn service_neighbourhood(address: IpAddr) -> IpNet {
    around(address, 16, 108)
}

fn around(address: IpAddr, v4: u8, v6: u8) -> IpNet {
    let length = if address.is_ipv4() { v4 } else { v6 };
    IpNet::new(address, length)
        .unwrap_or_else(|_| address.into())
        .trunc()
}
