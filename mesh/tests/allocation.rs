//! A decision that allows a call allocates nothing. One test only: the count is the process's.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::alloc::System;
use std::collections::BTreeMap;
use std::sync::Arc;

use sidegate_mesh::policy::{Ask, Caller, HttpAsk};
use sidegate_mesh::resource::{AuthorizationPolicy, Metadata};
use sidegate_mesh::{
    Authority, CanonicalPath, Enforcement, Policy, ResourceSet, SpiffeId, Verdict, Workload,
    WorkloadPort,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const POLICIES: [&str; 3] = [
    "{selector: {}, ports: [http], action: Deny, rules: [{from: [{anyone: {}}], \
      to: [{http: {methods: ['*'], paths: ['/admin/**', '/*/secret']}}]}]}",
    "{selector: {}, ports: [http], action: Allow, rules: [{name: web, from: [{namespace: {name: shop}}], \
      to: [{http: {methods: [GET], paths: ['/**/items/*', '/orders/*'], hosts: [orders.shop]}}, \
           {http: {methods: [GET], paths: ['/events/**'], upgrades: [websocket]}}, \
           {grpc: {service: shop.v1.Orders, methods: ['*']}}]}]}",
    "{selector: {}, ports: [6379], action: Allow, rules: [{from: [{workload: {serviceAccount: web}}], \
      to: [{tcp: {}}]}]}",
];

fn policy() -> Policy {
    let policies = POLICIES.iter().enumerate().map(|(at, spec)| {
        Arc::new(AuthorizationPolicy {
            metadata: Metadata::new("shop", &format!("p{at}")),
            spec: serde_saphyr::from_str(spec).unwrap(),
        })
    });
    let set = ResourceSet {
        policies: policies.collect(),
        ..ResourceSet::default()
    };
    let workload = Workload {
        id: "spiffe://mesh.local/ns/shop/sa/orders".parse().unwrap(),
        trust_domain: "mesh.local".parse().unwrap(),
        namespace: "shop".to_owned(),
        labels: BTreeMap::new(),
        ports: vec![WorkloadPort {
            name: Some("http".to_owned()),
            port: 8080,
        }],
        enforcement: Enforcement::Enforce,
    };
    Policy::compile(&set, &workload).0
}

#[test]
fn an_allowed_call_allocates_nothing() {
    let policy = policy();
    let caller: SpiffeId = "spiffe://mesh.local/ns/shop/sa/web".parse().unwrap();
    let authority: Authority = "orders.shop.svc.cluster.local:8080".parse().unwrap();
    let calls = [
        ("GET", "/orders/7", None),
        ("GET", "/a/b/c/d/items/7", None),
        ("GET", "/events/a/b/c", Some("websocket")),
        ("POST", "/shop.v1.Orders/List", None),
    ];
    let calls: Vec<(&str, CanonicalPath, Option<&str>)> = calls
        .into_iter()
        .map(|(method, path, upgrade)| (method, path.parse().unwrap(), upgrade))
        .collect();
    let region = Region::new(ALLOCATOR);
    let mut allowed = 0;
    for (method, path, upgrade) in &calls {
        let ask = Ask::Http(HttpAsk {
            method,
            path,
            authority: Some(&authority),
            upgrade: *upgrade,
            grpc: *method == "POST",
        });
        let decision = policy.authorize(Caller::Mesh(&caller), 8080, &ask);
        allowed += u32::from(decision.verdict == Verdict::Allow);
    }
    let decision = policy.authorize(Caller::Mesh(&caller), 6379, &Ask::Opaque);
    allowed += u32::from(decision.verdict == Verdict::Allow);
    let change = region.change();
    assert_eq!(allowed, 5);
    assert_eq!(
        (change.allocations, change.reallocations),
        (0, 0),
        "{change:?}"
    );
}
