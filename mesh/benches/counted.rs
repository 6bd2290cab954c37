//! What a sidecar does for each call and for each change: timed here by criterion, and counted in
//! instructions by `benches/instructions`, which lets callgrind look at what is inside `counted_*`.
//!
//! Always true: a `counted_*` function calls no other one and holds no closure, since callgrind
//! knows it by name and turns counting over at each entry.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a benchmark"
)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use criterion::{Criterion, criterion_group, criterion_main};
use sidegate_mesh::access_log::{Direction, Protocol, Record};
use sidegate_mesh::policy::{Ask, Caller, HttpAsk};
use sidegate_mesh::resource::{
    Action, AuthorizationPolicy, AuthorizationPolicySpec, EndpointIdentity, Metadata, Mode,
    PortProtocol, Rule, Selector, ServiceEndpoint, ServicePort, Source, StaticService,
    StaticServiceSpec, Target,
};
use sidegate_mesh::{
    Authority, CanonicalPath, Decision, Enforcement, Problem, ResourceSet, Snapshot, SpiffeId,
    Verdict, Workload, WorkloadPort,
};

const SERVICES: usize = 1_000;
const ENDPOINTS_PER_SERVICE: u8 = 3;
const RULES: usize = 10_000;
const RULES_PER_POLICY: usize = 20;
const CALLERS: usize = 37;
/// A rule that is asked for: it allows, and stands in the middle.
const ASKED: usize = RULES / 2;
/// Calls before the one that counts, so that the allocator has what it needs.
const WARM: usize = 100;

fn id(account: &str) -> SpiffeId {
    format!("spiffe://mesh.local/ns/shop/sa/{account}")
        .parse()
        .unwrap()
}

fn workload() -> Workload {
    Workload {
        id: id("orders"),
        trust_domain: "mesh.local".parse().unwrap(),
        namespace: "shop".to_owned(),
        labels: BTreeMap::new(),
        ports: vec![WorkloadPort {
            name: Some("http".to_owned()),
            port: 8080,
        }],
        enforcement: Enforcement::Enforce,
    }
}

/// Rule number `at` with its action: each has a path of its own, and one in ten denies.
fn rule(at: usize) -> (Action, Rule) {
    let denies = at % 10 == 9;
    let (methods, path) = if denies {
        (vec!["*"], format!("/api/v1/resource-{at}/admin/**"))
    } else {
        (vec!["GET", "HEAD"], format!("/api/v1/resource-{at}/*"))
    };
    let from = if denies {
        Source::Anyone {}
    } else {
        Source::Workload {
            service_account: format!("caller-{}", at % CALLERS),
            namespace: None,
        }
    };
    let rule = Rule {
        name: Some(format!("rule-{at}")),
        from: vec![from],
        to: vec![Target::Http {
            methods: methods.into_iter().map(str::to_owned).collect(),
            paths: vec![path.parse().unwrap()],
            hosts: None,
            upgrades: Vec::new(),
        }],
    };
    (if denies { Action::Deny } else { Action::Allow }, rule)
}

fn policies() -> Vec<Arc<AuthorizationPolicy>> {
    let mut policies = Vec::new();
    for action in [Action::Allow, Action::Deny] {
        let rules: Vec<Rule> = (0..RULES)
            .map(rule)
            .filter(|(of, _)| *of == action)
            .map(|(_, rule)| rule)
            .collect();
        for (at, rules) in rules.chunks(RULES_PER_POLICY).enumerate() {
            let name = format!("{action:?}-{at:04}").to_lowercase();
            policies.push(Arc::new(AuthorizationPolicy {
                metadata: Metadata::new("shop", &name),
                spec: AuthorizationPolicySpec {
                    namespace_selector: None,
                    selector: Selector::default(),
                    ports: None,
                    action,
                    mode: Mode::Enforce,
                    rules: rules.to_vec(),
                },
            }));
        }
    }
    policies
}

fn service(at: usize) -> Arc<StaticService> {
    let bytes = u16::try_from(at).unwrap().to_be_bytes();
    let endpoint = |of| ServiceEndpoint {
        address: SocketAddr::from(([10, of, bytes[0], bytes[1]], 15006)),
        identity: EndpointIdentity::Workload {
            service_account: format!("service-{at}"),
            namespace: None,
        },
    };
    Arc::new(StaticService {
        metadata: Metadata::new("shop", &format!("service-{at:04}")),
        spec: StaticServiceSpec {
            ports: vec![ServicePort {
                name: Some("http".to_owned()),
                port: 80,
                target_port: Some(8080),
                protocol: PortProtocol::Http,
            }],
            endpoints: (0..ENDPOINTS_PER_SERVICE).map(endpoint).collect(),
        },
    })
}

/// A large mesh: 1,000 services of three endpoints, 10,000 rules, all for one workload.
fn set() -> ResourceSet {
    ResourceSet {
        policies: policies(),
        services: (0..SERVICES).map(service).collect(),
        ..ResourceSet::default()
    }
}

/// A call that was served, with every field that one usually has.
fn record() -> Record {
    Record {
        time: SystemTime::UNIX_EPOCH,
        duration: Duration::from_micros(1_234),
        upstream: Some(Duration::from_micros(987)),
        direction: Direction::Inbound,
        protocol: Protocol::Http1,
        source: Some("spiffe://mesh.local/ns/shop/sa/web".into()),
        destination: Some("spiffe://mesh.local/ns/shop/sa/orders".into()),
        destination_service: Some("orders.shop:80".into()),
        source_address: Some(SocketAddr::from(([10, 0, 3, 7], 41234)).into()),
        destination_address: Some(SocketAddr::from(([127, 0, 0, 1], 8080)).into()),
        method: Some("GET".into()),
        authority: Some("orders.shop".to_owned()),
        path: Some("/api/v1/orders/7".to_owned()),
        query: true,
        grpc_service: None,
        grpc_method: None,
        grpc_status: None,
        grpc_message: None,
        status: Some(200),
        decision: Some(Verdict::Allow),
        policy: Some("shop/orders".into()),
        rule: Some("readers".into()),
        reason: None,
        decision_id: None,
        audit: None,
        request_bytes: 0,
        response_bytes: 412,
        error: None,
        flags: Vec::new(),
        attempts: None,
        tls_version: Some("TLSv1.3"),
        snapshot: Some(3),
        request_id: Some("6f1c1b0e-7a43-4a0b-9f5e-2f7c3a1d9b10".to_owned()),
        trace_id: Some("4bf92f3577b34da6a3ce929d0e0e4736".to_owned()),
        user_agent: Some("curl/8.14.1".to_owned()),
    }
}

fn write(record: &mut Record, at: SystemTime, line: &mut Vec<u8>) {
    record.time = at;
    record.write_line(line);
}

#[inline(never)]
fn counted_decision(snapshot: &Snapshot, caller: &SpiffeId, ask: &Ask<'_>) -> Decision {
    snapshot.policy.authorize(Caller::Mesh(caller), 8080, ask)
}

#[inline(never)]
fn counted_log_line(record: &mut Record, at: SystemTime, line: &mut Vec<u8>) {
    write(record, at, line);
}

#[inline(never)]
fn counted_compile(set: &ResourceSet, workload: &Workload) -> (Snapshot, Vec<Problem>) {
    Snapshot::compile(set, workload, 1)
}

fn decision(criterion: &mut Criterion, name: &str, caller: &str, expected: Verdict) {
    criterion.bench_function(name, |bencher| {
        let snapshot = Snapshot::compile(&set(), &workload(), 1).0;
        let path: CanonicalPath = format!("/api/v1/resource-{ASKED}/7").parse().unwrap();
        let authority: Authority = "orders.shop".parse().unwrap();
        let caller = id(caller);
        let ask = Ask::Http(HttpAsk {
            method: "GET",
            path: &path,
            authority: Some(&authority),
            upgrade: None,
            grpc: false,
        });
        for _ in 0..WARM {
            let decision = snapshot.policy.authorize(Caller::Mesh(&caller), 8080, &ask);
            assert_eq!(decision.verdict, expected, "{name}");
        }
        bencher.iter(|| counted_decision(&snapshot, black_box(&caller), black_box(&ask)));
    });
}

fn bench(criterion: &mut Criterion) {
    let allowed = format!("caller-{}", ASKED % CALLERS);
    decision(criterion, "decision_allowed", &allowed, Verdict::Allow);
    decision(criterion, "decision_denied", "stranger", Verdict::Deny);
    criterion.bench_function("log_line", |bencher| {
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_042);
        let (mut record, mut line) = (record(), Vec::new());
        for _ in 0..WARM {
            line.clear();
            write(&mut record, at, &mut line);
        }
        bencher.iter(|| {
            line.clear();
            counted_log_line(&mut record, black_box(at), &mut line);
        });
    });
    criterion.bench_function("snapshot_compile", |bencher| {
        let (set, workload) = (set(), workload());
        let (snapshot, problems) = Snapshot::compile(&set, &workload, 1);
        assert_eq!(snapshot.routes.all().len(), SERVICES);
        assert!(problems.is_empty(), "{problems:?}");
        bencher.iter_with_large_drop(|| counted_compile(black_box(&set), &workload));
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = bench
}
criterion_main!(benches);
