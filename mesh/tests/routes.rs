//! Where an authority leads, who must answer there and how it is called.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use sidegate_mesh::resource::{Metadata, RetryCondition, StaticService, TrafficPolicy};
use sidegate_mesh::routes::{Ejection, PortProtocol, Traffic};
use sidegate_mesh::{
    Enforcement, Problem, ResourceSet, Route, Routes, ServiceName, Workload, service_of,
};

fn workload(namespace: &str) -> Workload {
    Workload {
        id: format!("spiffe://mesh.local/ns/{namespace}/sa/web")
            .parse()
            .unwrap(),
        trust_domain: "mesh.local".parse().unwrap(),
        namespace: namespace.to_owned(),
        labels: BTreeMap::new(),
        ports: Vec::new(),
        enforcement: Enforcement::Enforce,
    }
}

fn service(namespace: &str, name: &str, ports: &str, endpoints: &str) -> Arc<StaticService> {
    let spec = format!("{{ports: {ports}, endpoints: {endpoints}}}");
    Arc::new(StaticService {
        metadata: Metadata::new(namespace, name),
        spec: serde_saphyr::from_str(&spec).unwrap(),
    })
}

fn traffic(namespace: &str, name: &str, spec: &str) -> Arc<TrafficPolicy> {
    Arc::new(TrafficPolicy {
        metadata: Metadata::new(namespace, name),
        spec: serde_saphyr::from_str(spec).unwrap(),
    })
}

const ENDPOINTS: &str = "[{address: '127.0.0.1:21006', identity: {workload: {serviceAccount: orders}}}, \
     {address: '127.0.0.1:21007', identity: {workload: {serviceAccount: orders, namespace: blue}}}, \
     {address: '10.0.0.7:21008', identity: {spiffeId: {id: 'spiffe://other/ns/x/sa/y'}}}]";

fn shop() -> ResourceSet {
    ResourceSet {
        services: vec![
            service(
                "shop",
                "orders",
                "[{name: http, port: 80, targetPort: 8080}]",
                ENDPOINTS,
            ),
            service(
                "shop",
                "admin",
                "[{port: 9000}, {port: 80, protocol: grpc}]",
                "[]",
            ),
            service(
                "shop",
                "ledger",
                "[{name: redis, port: 6379, protocol: tcp}]",
                "[]",
            ),
            service("shop", "two", "[{port: 8081}, {port: 8082}]", "[]"),
            service("jobs", "orders", "[{port: 80}]", "[]"),
        ],
        ..ResourceSet::default()
    }
}

/// `service -> target port` that an authority leads to from a namespace.
fn resolve(namespace: &str, authority: &str) -> Option<(String, u16)> {
    let (routes, problems) = Routes::compile(&shop(), &workload(namespace));
    assert_eq!(problems, []);
    let route = routes.resolve(&authority.parse().unwrap())?;
    Some((route.service.to_string(), route.target_port))
}

#[track_caller]
fn check(authority: &str, expected: Option<(&str, u16)>) {
    let expected = expected.map(|(service, port)| (service.to_owned(), port));
    assert_eq!(resolve("shop", authority), expected, "{authority}");
}

#[test]
fn every_name_form_leads_to_the_service() {
    for form in [
        "orders",
        "orders.shop",
        "orders.shop.svc",
        "orders.shop.svc.cluster.local",
        "orders.shop.svc.mesh.local",
        "ORDERS.shop.",
        "orders:80",
        "orders.shop.svc.cluster.local:80",
    ] {
        check(form, Some(("orders.shop:80", 8080)));
    }
    for other in [
        "order",
        "orders.shop.svc.other.local",
        "127.0.0.1",
        "orders.shop.x",
        "orders:81",
    ] {
        check(other, None);
    }
}

#[test]
fn a_short_name_is_of_the_callers_own_namespace() {
    check("orders", Some(("orders.shop:80", 8080)));
    assert_eq!(
        resolve("jobs", "orders"),
        Some(("orders.jobs:80".to_owned(), 80))
    );
    assert_eq!(
        resolve("jobs", "orders.shop"),
        Some(("orders.shop:80".to_owned(), 8080))
    );
    assert_eq!(resolve("jobs", "ledger"), None);
}

#[test]
fn an_authority_without_a_port_means_port_80_or_the_only_port() {
    check("admin", Some(("admin.shop:80", 80)));
    check("admin:9000", Some(("admin.shop:9000", 9000)));
    check("ledger", Some(("ledger.shop:6379", 6379)));
    check("ledger:6379", Some(("ledger.shop:6379", 6379)));
    check("ledger:6380", None);
    check("two", None);
    check("two:8082", Some(("two.shop:8082", 8082)));
}

#[test]
fn routes_and_the_reading_of_names_agree_on_every_host() {
    let labels = ["orders", "shop", "jobs", "svc", "cluster", "local", "mesh"];
    for own in ["shop", "jobs"] {
        let workload = workload(own);
        let (routes, _) = Routes::compile(&shop(), &workload);
        for number in 0..labels.len().pow(5) {
            let picked = |at: u32| labels[number / labels.len().pow(at) % labels.len()];
            for count in 1..=5 {
                let host = (0..count).map(picked).collect::<Vec<_>>().join(".");
                let meant = service_of(&host, own, &workload.trust_domain);
                let expected = meant.and_then(|name| routes.service(&name, 80).map(Arc::as_ptr));
                let found = routes.resolve(&host.parse().unwrap()).map(Arc::as_ptr);
                assert_eq!(found, expected, "{host} in {own}");
            }
        }
    }
}

fn orders(set: &ResourceSet) -> (Arc<Route>, Vec<Problem>) {
    let (routes, problems) = Routes::compile(set, &workload("shop"));
    let name = ServiceName {
        namespace: "shop".to_owned(),
        name: "orders".to_owned(),
    };
    (Arc::clone(routes.service(&name, 80).unwrap()), problems)
}

#[test]
fn each_endpoint_has_the_identity_that_must_answer() {
    let (route, _) = orders(&shop());
    let endpoints: Vec<String> = route
        .endpoints
        .iter()
        .map(|endpoint| format!("{} {}", endpoint.address, endpoint.identity))
        .collect();
    assert_eq!(
        endpoints,
        [
            "127.0.0.1:21006 spiffe://mesh.local/ns/shop/sa/orders",
            "127.0.0.1:21007 spiffe://mesh.local/ns/blue/sa/orders",
            "10.0.0.7:21008 spiffe://other/ns/x/sa/y",
        ]
    );
    assert_eq!(route.protocol, PortProtocol::Auto);
}

#[test]
fn without_a_traffic_policy_nothing_is_retried_and_failing_endpoints_are_left_out() {
    let (route, problems) = orders(&shop());
    assert_eq!(problems, []);
    assert_eq!(*route.traffic, Traffic::default());
    assert!(route.traffic.retry.is_none() && route.traffic.grpc_retry.is_none());
    assert_eq!(route.traffic.timeout, None);
    let ejection = Ejection {
        consecutive_failures: 5,
        duration: Duration::from_secs(10),
        ejected_max: 0.5,
    };
    assert_eq!(route.traffic.ejection, ejection);
}

#[test]
fn a_traffic_policy_is_compiled_into_plain_values() {
    let mut set = shop();
    set.traffic = vec![traffic(
        "shop",
        "orders",
        "{service: orders, timeout: 2s, \
          retry: {attempts: 2, conditions: [connect-failure, gateway-error], methods: [GET, HEAD], perTryTimeout: 500ms, budget: 25%}, \
          grpcRetry: {attempts: 3, codes: [unavailable], methods: [shop.v1.Orders/Get]}, \
          outlierEjection: {consecutiveFailures: 2, duration: 3s, maxEjected: 10%}}",
    )];
    let (route, problems) = orders(&set);
    assert_eq!(problems, []);
    let traffic = &route.traffic;
    assert_eq!(traffic.timeout, Some(Duration::from_secs(2)));
    let retry = traffic.retry.as_ref().unwrap();
    assert_eq!(retry.attempts, 2);
    assert!(retry.covers_method("GET") && !retry.covers_method("POST"));
    assert!(retry.covers(RetryCondition::ConnectFailure) && !retry.covers(RetryCondition::Reset));
    assert!(retry.covers_status(503) && !retry.covers_status(500) && !retry.covers_status(404));
    assert_eq!(retry.per_try_timeout, Some(Duration::from_millis(500)));
    assert!((retry.budget - 0.25).abs() < 1e-9);
    let grpc = traffic.grpc_retry.as_ref().unwrap();
    assert!(grpc.covers("shop.v1.Orders", "Get", 14));
    assert!(!grpc.covers("shop.v1.Orders", "Get", 13));
    assert!(!grpc.covers("shop.v1.Orders", "List", 14));
    assert_eq!(traffic.ejection.consecutive_failures, 2);
    assert!((traffic.ejection.ejected_max - 0.1).abs() < 1e-9);
}

#[test]
fn the_second_traffic_policy_of_a_service_does_nothing_and_is_a_problem() {
    let mut set = shop();
    let first = traffic("shop", "a", "{service: orders, timeout: 1s}");
    let second = traffic("shop", "b", "{service: orders, timeout: 2s}");
    let elsewhere = traffic("jobs", "0", "{service: orders, timeout: 3s}");
    for order in [[&first, &second, &elsewhere], [&second, &elsewhere, &first]] {
        set.traffic = order.into_iter().map(Arc::clone).collect();
        let (route, problems) = orders(&set);
        assert_eq!(route.traffic.timeout, Some(Duration::from_secs(1)));
        let messages: Vec<&str> = problems
            .iter()
            .map(|problem| problem.message.as_str())
            .collect();
        assert_eq!(
            messages,
            ["orders.shop already has the traffic policy `a`, so this one does nothing"]
        );
        assert_eq!(problems[0].resource.as_ref().unwrap().name, "b");
    }
}

#[test]
fn a_traffic_policy_without_its_service_is_a_problem() {
    let mut set = shop();
    set.traffic = vec![traffic("jobs", "t", "{service: ledger, timeout: 1s}")];
    let (_, problems) = orders(&set);
    assert_eq!(problems[0].message, "there is no service ledger.jobs");
    assert!(!problems[0].is_error());
}

#[test]
fn every_route_is_listed_in_order() {
    let (routes, _) = Routes::compile(&shop(), &workload("shop"));
    let listed: Vec<&str> = routes
        .all()
        .into_iter()
        .map(|route| &*route.service)
        .collect();
    assert_eq!(
        listed,
        [
            "orders.jobs:80",
            "admin.shop:80",
            "admin.shop:9000",
            "ledger.shop:6379",
            "orders.shop:80",
            "two.shop:8081",
            "two.shop:8082",
        ]
    );
    assert!(routes.knows(&"two".parse().unwrap()));
    assert!(!routes.knows(&"three".parse().unwrap()));
}
