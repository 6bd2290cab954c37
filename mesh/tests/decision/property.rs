//! 100,000 random policies × calls: the compiled policy, the reference and the explanation agree.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::test_runner::TestRunner;
use sidegate_mesh::policy::{Ask, Caller, HttpAsk};
use sidegate_mesh::resource::{
    Action, AuthorizationPolicy, AuthorizationPolicySpec, Kind, Metadata, Mode, PathPattern,
    PortRef, Rule, Selector, Source, Target, Upgrade,
};
use sidegate_mesh::{
    Authority, BrokenResource, CanonicalPath, Enforcement, Policy, Problem, ResourceSet, SpiffeId,
    Verdict, Workload,
};

use crate::reference;
use crate::world;

const SETS: u32 = 1_000;
const CALLS: usize = 100;

/// A call that owns its parts.
#[derive(Clone, Debug)]
struct Call {
    caller: Option<SpiffeId>,
    port: u16,
    request: Option<Request>,
}

#[derive(Clone, Debug)]
struct Request {
    method: &'static str,
    path: CanonicalPath,
    authority: Option<Authority>,
    upgrade: Option<&'static str>,
    grpc: bool,
}

fn any_of<T: Clone + std::fmt::Debug + 'static>(
    items: impl IntoIterator<Item = T>,
) -> impl Strategy<Value = T> + Clone {
    select(items.into_iter().collect::<Vec<T>>())
}

fn some_of(items: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
    subsequence(items, 1..=items.len())
        .prop_map(|names| names.into_iter().map(str::to_owned).collect())
}

fn methods(all: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
    prop_oneof![1 => Just(vec!["*".to_owned()]), 1 => some_of(all)]
}

fn pattern() -> impl Strategy<Value = PathPattern> {
    let segment = || any_of(["a", "a", "b", "*", "*", "**", "**", "s.A", "M"]);
    let random = (vec(segment(), 0..4), any::<bool>(), 0..3_u8);
    random.prop_filter_map("two stars twice", |(segments, slash, rare)| {
        let slash = slash && rare == 0 && !segments.is_empty();
        let text = format!("/{}{}", segments.join("/"), if slash { "/" } else { "" });
        text.parse().ok()
    })
}

fn source() -> impl Strategy<Value = Source> {
    let account = any_of(["web", "batch"]).prop_map(str::to_owned);
    let namespace = any_of([None, Some("shop"), Some("jobs")]).prop_map(|n| n.map(str::to_owned));
    let foreign = any_of([
        "spiffe://other/ns/shop/sa/web",
        "spiffe://mesh.local/ns/jobs/sa/web",
    ]);
    prop_oneof![
        4 => (account, namespace).prop_map(|(service_account, namespace)| Source::Workload {
            service_account,
            namespace,
        }),
        2 => any_of(["shop", "jobs"]).prop_map(|name| Source::Namespace { name: name.to_owned() }),
        1 => foreign.prop_map(|id| Source::SpiffeId { id: id.parse().unwrap() }),
        4 => Just(Source::Anyone {}),
        1 => Just(Source::Unauthenticated {}),
    ]
}

fn target() -> impl Strategy<Value = Target> {
    let hosts = prop_oneof![
        3 => Just(None),
        1 => some_of(&["orders", "orders.shop", "orders.jobs.svc", "a.example.com"]).prop_map(Some),
    ];
    let upgrades = prop_oneof![3 => Just(Vec::new()), 1 => Just(vec![Upgrade::Websocket])];
    let http = (
        methods(&["GET", "HEAD", "POST", "PURGE"]),
        vec(pattern(), 1..4),
        hosts,
        upgrades,
    );
    let grpc = (any_of(["s.A", "s.B"]), methods(&["M", "N"]));
    prop_oneof![
        6 => http.prop_map(|(methods, paths, hosts, upgrades)| Target::Http {
            methods,
            paths,
            hosts,
            upgrades,
        }),
        2 => grpc.prop_map(|(service, methods)| Target::Grpc {
            service: service.to_owned(),
            methods,
        }),
        1 => Just(Target::Tcp {}),
        1 => Just(Target::Anything {}),
    ]
}

fn ports() -> impl Strategy<Value = Option<Vec<PortRef>>> {
    let name = |name: &str| PortRef::Name(name.to_owned());
    let number = PortRef::Number;
    let refs = vec![
        name("http"),
        name("grpc"),
        number(8080),
        number(6379),
        number(7000),
        name("nope"),
    ];
    prop_oneof![
        4 => Just(None),
        4 => subsequence(refs[..4].to_vec(), 1..3).prop_map(Some),
        1 => subsequence(refs, 1..4).prop_map(Some),
    ]
}

fn selector(app: &'static [&'static str]) -> impl Strategy<Value = Selector> {
    let labelled = any_of(app.to_vec()).prop_map(|app| Selector {
        match_labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
    });
    prop_oneof![4 => Just(Selector::default()), 2 => labelled]
}

fn namespace_selector() -> impl Strategy<Value = Option<Selector>> {
    let of = |key: &str, value: &str| {
        Some(Selector {
            match_labels: BTreeMap::from([(key.to_owned(), value.to_owned())]),
        })
    };
    let name = "kubernetes.io/metadata.name";
    any_of([None, of(name, "shop"), of(name, "jobs"), of("env", "prod")])
}

fn policy() -> impl Strategy<Value = AuthorizationPolicy> {
    let rule =
        (any::<bool>(), vec(source(), 1..3), vec(target(), 1..3)).prop_map(|(named, from, to)| {
            Rule {
                name: named.then(|| "named".to_owned()),
                from,
                to,
            }
        });
    (
        any_of([
            "shop",
            "shop",
            "shop",
            "shop",
            "shop",
            "jobs",
            "sidegate-system",
        ]),
        (
            namespace_selector(),
            selector(&["orders", "orders", "other"]),
        ),
        ports(),
        any_of([
            Action::Allow,
            Action::Allow,
            Action::Allow,
            Action::Allow,
            Action::Allow,
            Action::Deny,
        ]),
        any_of([Mode::Enforce, Mode::Enforce, Mode::Enforce, Mode::Audit]),
        vec(rule, 1..4),
    )
        .prop_map(
            |(namespace, (spaces, selector), ports, action, mode, rules)| {
                let is_system = namespace == "sidegate-system";
                AuthorizationPolicy {
                    metadata: Metadata::new(namespace, "unnamed"),
                    spec: AuthorizationPolicySpec {
                        namespace_selector: spaces.filter(|_| is_system),
                        selector,
                        ports,
                        action,
                        mode,
                        rules,
                    },
                }
            },
        )
}

fn broken() -> impl Strategy<Value = Vec<BrokenResource>> {
    let one = (
        any_of([
            None,
            Some(Kind::AuthorizationPolicy),
            Some(Kind::TrafficPolicy),
        ]),
        any_of([None, Some("shop"), Some("jobs")]),
        any_of([None, Some(Action::Allow), Some(Action::Deny)]),
        any_of([None, Some(Mode::Audit)]),
        prop_oneof![Just(None), selector(&["orders", "other"]).prop_map(Some)],
    )
        .prop_map(|(kind, namespace, action, mode, selector)| BrokenResource {
            kind,
            namespace: namespace.map(str::to_owned),
            name: None,
            action,
            mode,
            selector,
            problem: Problem::of_file("x", "broken", "mend it"),
        });
    prop_oneof![9 => Just(Vec::new()), 1 => vec(one, 1..2)]
}

fn world() -> impl Strategy<Value = (ResourceSet, Workload)> {
    let enforcement = any_of([
        Enforcement::Enforce,
        Enforcement::Enforce,
        Enforcement::Audit,
    ]);
    (vec(policy(), 1..12), broken(), enforcement).prop_map(|(mut policies, broken, enforcement)| {
        // The order of the set is not the order of the names.
        for (at, policy) in policies.iter_mut().enumerate() {
            policy.metadata.name = format!("p{}", (at * 5 + 3) % 12);
        }
        let set = ResourceSet {
            policies: policies.into_iter().map(Arc::new).collect(),
            broken,
            ..ResourceSet::default()
        };
        (set, world::workload(enforcement))
    })
}

fn call() -> impl Strategy<Value = Call> {
    let path = prop_oneof![
        8 => (vec(any_of(["a", "a", "b", "c", "s.A", "M"]), 0..5), 0..4_u8).prop_map(|(segments, rare)| {
            let slash = if rare == 0 && !segments.is_empty() { "/" } else { "" };
            format!("/{}{slash}", segments.join("/"))
        }),
        3 => any_of(["/s.A/M", "/s.A/N", "/s.B/M", "/s.A/M/", "*"]).prop_map(str::to_owned),
    ];
    let authority = any_of([
        None,
        Some("orders"),
        Some("orders.shop:8080"),
        Some("orders.jobs"),
        Some("orders.shop.svc.mesh.local"),
        Some("A.example.com"),
    ]);
    let request = (
        any_of(["GET", "GET", "POST", "POST", "HEAD", "PURGE", "get"]),
        path,
        authority,
        prop_oneof![
            6 => Just(None),
            1 => any_of(["websocket", "WebSocket", "h2c"]).prop_map(Some),
        ],
        any_of([false, false, true]),
    )
        .prop_map(|(method, path, authority, upgrade, grpc)| Request {
            method,
            path: path.parse().unwrap(),
            authority: authority.map(|text| text.parse().unwrap()),
            upgrade,
            grpc,
        });
    let caller = any_of([
        Some("shop/web"),
        Some("shop/web"),
        Some("shop/web"),
        Some("shop/batch"),
        Some("shop/batch"),
        Some("jobs/web"),
        Some("jobs/batch"),
        Some("spiffe://other/ns/shop/sa/web"),
        Some("spiffe://mesh.local/ns/shop/sa/web/more"),
        None,
    ]);
    let request = prop_oneof![5 => request.prop_map(Some), 1 => Just(None)];
    (caller, any_of([8080, 8080, 9090, 6379, 7000]), request).prop_map(|(caller, port, request)| {
        Call {
            caller: caller.map(world::id),
            port,
            request,
        }
    })
}

#[derive(Default)]
struct Seen {
    calls: Cell<u32>,
    allowed: Cell<u32>,
    denied_by_rule: Cell<u32>,
    not_admitted: Cell<u32>,
    opaque_allowed: Cell<u32>,
    audited: Cell<u32>,
}

impl Seen {
    fn count(&self, call: &Call, decision: &sidegate_mesh::Decision) {
        let add = |cell: &Cell<u32>, when: bool| cell.set(cell.get() + u32::from(when));
        let allowed = decision.verdict == Verdict::Allow;
        add(&self.calls, true);
        add(&self.allowed, allowed);
        add(&self.denied_by_rule, !allowed && decision.rule.is_some());
        add(&self.not_admitted, !allowed && decision.policy.is_none());
        add(&self.opaque_allowed, allowed && call.request.is_none());
        add(&self.audited, decision.audit.is_some());
    }
}

fn check_call(
    policy: &Policy,
    (set, workload): (&ResourceSet, &Workload),
    call: &Call,
    seen: &Seen,
) -> Result<(), TestCaseError> {
    let caller = call
        .caller
        .as_ref()
        .map_or(Caller::Unauthenticated, Caller::Mesh);
    let ask = call.request.as_ref().map_or(Ask::Opaque, |request| {
        Ask::Http(HttpAsk {
            method: request.method,
            path: &request.path,
            authority: request.authority.as_ref(),
            upgrade: request.upgrade,
            grpc: request.grpc,
        })
    });
    let decision = policy.authorize(caller, call.port, &ask);
    let explained = policy.explain(caller, call.port, &ask);
    let carries = policy.carries_opaque(call.port);
    prop_assert_eq!(carries, reference::carries_opaque(set, workload, call.port));
    let asked = reference::Call {
        caller,
        port: call.port,
        ask,
    };
    let expected = reference::decide(set, workload, &asked);
    let got = reference::Expected {
        verdict: decision.verdict,
        policy: decision.policy.as_deref().map(str::to_owned),
        rule: decision.rule.as_deref().map(str::to_owned),
        audit: decision.audit.as_deref().map(str::to_owned),
    };
    prop_assert_eq!(&got, &expected, "{:?}", call);
    prop_assert_eq!(explained.verdict, decision.verdict, "{:?}", call);
    prop_assert_eq!(explained.reason, decision.reason);
    prop_assert_eq!(&explained.policy, &decision.policy);
    prop_assert_eq!(&explained.rule, &decision.rule);
    prop_assert_eq!(&explained.audit, &decision.audit);
    seen.count(call, &decision);
    Ok(())
}

#[test]
fn the_compiled_policy_the_reference_and_the_explanation_agree_on_100_000_calls() {
    let seen = Seen::default();
    let config = ProptestConfig {
        cases: SETS,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let outcome = TestRunner::new(config).run(
        &(world(), vec(call(), CALLS)),
        |((set, workload), calls)| {
            let (policy, _) = Policy::compile(&set, &workload);
            calls
                .iter()
                .try_for_each(|call| check_call(&policy, (&set, &workload), call, &seen))
        },
    );
    if let Err(error) = outcome {
        panic!("{error}");
    }
    // The alphabets are small so that each outcome is frequent: agreeing on nothing is no proof.
    let calls = seen.calls.get();
    let shares = [
        ("allowed", &seen.allowed, 10),
        ("denied by rule", &seen.denied_by_rule, 8),
        ("not admitted", &seen.not_admitted, 8),
        ("audited", &seen.audited, 5),
    ];
    assert!(calls >= SETS * u32::try_from(CALLS).unwrap());
    for (what, count, percent_min) in shares {
        let percent = count.get() * 100 / calls;
        println!("{what}: {percent} %");
        assert!(
            percent >= percent_min || what == "opaque allowed" && count.get() > 300,
            "{what}: {percent} %"
        );
    }
}
