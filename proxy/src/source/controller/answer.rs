//! The controller's word about a destination, as routes.
//!
//! Invariant: an endpoint without an identity, or at an address that no pod has, is left out: it is
//! never called.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use sidegate_api::control as proto;
use sidegate_mesh::routes::PortProtocol;
use sidegate_mesh::{Endpoint, Route, ServiceName, Traffic};
use tracing::warn;

use crate::destinations::{Answer, Destination};

/// Most endpoints of one destination.
const ENDPOINTS_MAX: usize = 10_000;

/// What the controller says, with the traffic policy that `traffic` finds.
pub(super) fn answer(
    at: SocketAddr,
    kind: Option<proto::destination::Kind>,
    traffic: impl Fn(&ServiceName) -> Arc<Traffic>,
) -> Answer {
    use proto::destination::Kind;
    match kind {
        Some(Kind::Meshed(meshed)) => {
            let Some(route) = route(at, &meshed, traffic) else {
                warn!(service = meshed.service, "destination of no service");
                return Answer::Unknown;
            };
            Answer::Known(Destination::Meshed(Arc::new(route)))
        }
        Some(Kind::External(external)) => Answer::Known(Destination::External {
            refused: external.refused,
        }),
        Some(Kind::Unknown(_)) | None => Answer::Unknown,
    }
}

fn route(
    at: SocketAddr,
    meshed: &proto::Meshed,
    traffic: impl Fn(&ServiceName) -> Arc<Traffic>,
) -> Option<Route> {
    let (host, port) = meshed.service.rsplit_once(':')?;
    // A pod that is called by its address has a name that may hold dots, a namespace has none.
    let (name, namespace) = host.rsplit_once('.')?;
    let name = ServiceName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    let endpoints: Vec<Endpoint> = meshed
        .endpoints
        .iter()
        .take(ENDPOINTS_MAX)
        .filter_map(endpoint)
        .collect();
    if endpoints.len() < meshed.endpoints.len() {
        let left_out = meshed.endpoints.len() - endpoints.len();
        warn!(service = meshed.service, left_out, "endpoints left out");
    }
    let target = endpoints.first().map(|endpoint| endpoint.address.port());
    Some(Route {
        service: meshed.service.as_str().into(),
        traffic: traffic(&name),
        name,
        port: port.parse().ok()?,
        protocol: protocol(&meshed.protocol),
        target_port: target.unwrap_or(at.port()),
        endpoints: endpoints.into(),
    })
}

fn endpoint(endpoint: &proto::Endpoint) -> Option<Endpoint> {
    let address: SocketAddr = endpoint.address.parse().ok()?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    if !is_a_pods(address) {
        return None;
    }
    let zone = Some(endpoint.zone.as_str()).filter(|zone| !zone.is_empty());
    Some(Endpoint {
        zone: zone.map(Into::into),
        draining: endpoint.terminating,
        ..Endpoint::new(address, endpoint.spiffe_id.parse().ok()?)
    })
}

/// Whether a pod can have this address. Loopback would be the caller's own.
fn is_a_pods(address: SocketAddr) -> bool {
    let ip = address.ip();
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let is_special = ip.is_loopback() || ip.is_unspecified() || ip.is_multicast();
    address.port() != 0 && !is_special && !is_link_local
}

/// What is not known here is found out from the first bytes, within what the called side's policy
/// lets enter.
fn protocol(word: &str) -> PortProtocol {
    match word {
        "http" => PortProtocol::Http,
        "grpc" => PortProtocol::Grpc,
        "tcp" => PortProtocol::Tcp,
        _ => PortProtocol::Auto,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meshed(service: &str, addresses: &[&str]) -> Option<Route> {
        let endpoint = |address: &&str| proto::Endpoint {
            address: (*address).to_owned(),
            spiffe_id: "spiffe://mesh.local/ns/shop/sa/orders".into(),
            zone: "a".into(),
            terminating: false,
        };
        let meshed = proto::Meshed {
            service: service.into(),
            protocol: "grpc".into(),
            endpoints: addresses.iter().map(endpoint).collect(),
        };
        let at = "10.96.0.7:80".parse().unwrap();
        let kind = Some(proto::destination::Kind::Meshed(meshed));
        match answer(at, kind, |_| Arc::default()) {
            Answer::Known(Destination::Meshed(route)) => Some(Route::clone(&route)),
            _ => None,
        }
    }

    #[test]
    fn a_service_is_a_route() {
        let route = meshed("orders.shop:80", &["10.1.0.2:8080", "10.1.0.3:8081"]).unwrap();
        assert_eq!(&*route.service, "orders.shop:80");
        assert_eq!(route.name.to_string(), "orders.shop");
        assert_eq!((route.port, route.target_port), (80, 8080));
        assert_eq!(route.protocol, PortProtocol::Grpc);
        let ports = route
            .endpoints
            .iter()
            .map(|endpoint| endpoint.address.port());
        assert_eq!(ports.collect::<Vec<_>>(), [8080, 8081]);
        assert_eq!(route.endpoints[0].zone.as_deref(), Some("a"));
    }

    #[test]
    fn a_pod_may_have_dots_in_its_name() {
        let route = meshed("web.v1.shop:8080", &[]).unwrap();
        assert_eq!(
            (&*route.name.name, &*route.name.namespace),
            ("web.v1", "shop")
        );
        assert!(meshed("orders", &[]).is_none());
        assert!(meshed("orders.shop:x", &[]).is_none());
    }

    #[test]
    fn an_endpoint_that_is_no_pods_is_never_called() {
        let addresses = [
            "127.0.0.1:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "0.0.0.0:80",
            "169.254.169.254:80",
            "[fe80::1]:80",
            "224.0.0.1:80",
            "10.1.0.2:0",
            "10.1.0.2",
            "orders:80",
            "10.1.0.2:80",
        ];
        let route = meshed("orders.shop:80", &addresses).unwrap();
        assert_eq!(route.endpoints.len(), 1);
    }
}
