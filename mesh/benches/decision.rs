//! One decision at 1,000 and 10,000 rules, in layouts that are usual and in those that are not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a benchmark"
)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use sidegate_mesh::policy::{Ask, Caller, HttpAsk};
use sidegate_mesh::resource::{
    Action, AuthorizationPolicy, AuthorizationPolicySpec, Metadata, Mode, Rule, Selector, Source,
    Target,
};
use sidegate_mesh::{
    Authority, CanonicalPath, Enforcement, Policy, ResourceSet, SpiffeId, Verdict, Workload,
    WorkloadPort,
};

const RULES_PER_POLICY: usize = 20;

fn http(methods: &[&str], path: &str, host: Option<String>) -> Target {
    Target::Http {
        methods: methods.iter().map(|method| (*method).to_owned()).collect(),
        paths: vec![path.parse().unwrap()],
        hosts: host.map(|host| vec![host]),
        upgrades: Vec::new(),
    }
}

fn account(name: String) -> Source {
    Source::Workload {
        service_account: name,
        namespace: None,
    }
}

/// One rule of a policy with its action.
type OneRule = (Action, Source, Target);

fn compile(rules: &[OneRule]) -> Policy {
    let mut policies = Vec::new();
    for (at, chunk) in rules.chunks(RULES_PER_POLICY).enumerate() {
        for action in [Action::Deny, Action::Allow] {
            let rules: Vec<Rule> = chunk
                .iter()
                .filter(|(of, ..)| *of == action)
                .map(|(_, from, to)| Rule {
                    name: None,
                    from: vec![from.clone()],
                    to: vec![to.clone()],
                })
                .collect();
            if rules.is_empty() {
                continue;
            }
            policies.push(Arc::new(AuthorizationPolicy {
                metadata: Metadata::new("shop", &format!("p{at}-{action:?}").to_lowercase()),
                spec: AuthorizationPolicySpec {
                    namespace_selector: None,
                    selector: Selector::default(),
                    ports: None,
                    action,
                    mode: Mode::Enforce,
                    rules,
                },
            }));
        }
    }
    let set = ResourceSet {
        policies,
        ..ResourceSet::default()
    };
    let workload = Workload {
        id: id("orders"),
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

fn id(account: &str) -> SpiffeId {
    format!("spiffe://mesh.local/ns/shop/sa/{account}")
        .parse()
        .unwrap()
}

/// A layout of rules, and the call that costs most in it.
struct Layout {
    name: &'static str,
    rules: fn(usize) -> Vec<OneRule>,
    caller: fn(usize) -> String,
    call: fn(usize) -> (&'static str, String, &'static str),
    expected: Verdict,
}

const LAYOUTS: [Layout; 9] = [
    // Every service has its own paths and callers; one rule in ten is a Deny.
    Layout {
        name: "usual_allowed",
        rules: usual,
        caller: |count| format!("caller-{}", (count / 2) % 37),
        call: |count| ("GET", format!("/api/v1/resource-{}/7", count / 2), "orders"),
        expected: Verdict::Allow,
    },
    Layout {
        name: "usual_denied",
        rules: usual,
        caller: |_| "stranger".to_owned(),
        call: |count| ("GET", format!("/api/v1/resource-{}/7", count / 2), "orders"),
        expected: Verdict::Deny,
    },
    // All rules share one path; each is for another caller.
    Layout {
        name: "one_path_many_callers",
        rules: |count| {
            let rule = |at| {
                let to = http(&["GET", "HEAD"], "/orders/*", None);
                (Action::Allow, account(format!("caller-{at}")), to)
            };
            (0..count).map(rule).collect()
        },
        caller: |count| format!("caller-{}", count - 1),
        call: |_| ("GET", "/orders/7".to_owned(), "orders"),
        expected: Verdict::Allow,
    },
    // All rules share one path and one caller; each is for another host.
    Layout {
        name: "one_path_one_caller_many_hosts",
        rules: |count| {
            let rule = |at| {
                let to = http(
                    &["GET"],
                    "/orders/*",
                    Some(format!("host-{at}.example.com")),
                );
                (Action::Allow, account("web".to_owned()), to)
            };
            (0..count).map(rule).collect()
        },
        caller: |_| "web".to_owned(),
        call: |_| ("GET", "/orders/7".to_owned(), "host-7.example.com"),
        expected: Verdict::Allow,
    },
    // Every pattern of ten segments of `a` and `*`, each for another caller.
    Layout {
        name: "stars_many_callers",
        rules: |count| {
            let rule = |at| {
                let to = http(&["GET"], &stars(at, "a"), None);
                (Action::Allow, account(format!("caller-{at}")), to)
            };
            (0..count).map(rule).collect()
        },
        caller: |count| format!("caller-{}", count - 1),
        call: |count| ("GET", stars(count - 1, "a").replace('*', "a"), "orders"),
        expected: Verdict::Allow,
    },
    // The same for one caller, and nothing matches in the end: every fork is tried.
    Layout {
        name: "stars_one_caller_miss",
        rules: |count| {
            let rule = |at| {
                let to = http(&["GET"], &format!("{}/end", stars(at, "a")), None);
                (Action::Allow, account("web".to_owned()), to)
            };
            (0..count).map(rule).collect()
        },
        caller: |_| "web".to_owned(),
        call: |count| {
            (
                "GET",
                format!("{}/nope", stars(count - 1, "a").replace('*', "a")),
                "orders",
            )
        },
        expected: Verdict::Deny,
    },
    // `**` twice in each pattern, and a long path of which each segment could be the one.
    Layout {
        name: "any_number_long_path",
        rules: |count| {
            let rule = |at| {
                let to = http(&["GET"], &format!("/**/s{at}/**/end"), None);
                (Action::Allow, account("web".to_owned()), to)
            };
            (0..count).map(rule).collect()
        },
        caller: |_| "web".to_owned(),
        call: |_| {
            (
                "GET",
                format!("{}/nope", "/s1/s2/s3/s4".repeat(5)),
                "orders",
            )
        },
        expected: Verdict::Deny,
    },
    Layout {
        name: "denies_before_one_allow",
        rules: |count| {
            let rule = |at| {
                let to = http(&["*"], &format!("/admin/{at}/**"), None);
                (Action::Deny, Source::Anyone {}, to)
            };
            let everything = (Action::Allow, Source::Anyone {}, http(&["*"], "/**", None));
            (1..count).map(rule).chain([everything]).collect()
        },
        caller: |_| "web".to_owned(),
        call: |_| ("GET", "/admin/x/y".to_owned(), "orders"),
        expected: Verdict::Allow,
    },
    Layout {
        name: "grpc_methods",
        rules: |count| {
            let rule = |at| {
                let to = Target::Grpc {
                    service: format!("shop.v1.Service{}", at / 10),
                    methods: vec![format!("Method{}", at % 10)],
                };
                (Action::Allow, account(format!("caller-{}", at % 37)), to)
            };
            (0..count).map(rule).collect()
        },
        caller: |count| format!("caller-{}", (count - 1) % 37),
        call: |count| {
            (
                "POST",
                format!("/shop.v1.Service{}/Method9", (count - 1) / 10),
                "orders",
            )
        },
        expected: Verdict::Allow,
    },
];

fn usual(count: usize) -> Vec<OneRule> {
    let rule = |at: usize| {
        let caller = account(format!("caller-{}", at % 37));
        if at % 10 == 9 {
            let path = format!("/api/v1/resource-{at}/admin/**");
            return (Action::Deny, Source::Anyone {}, http(&["*"], &path, None));
        }
        let path = format!("/api/v1/resource-{at}/*");
        (Action::Allow, caller, http(&["GET", "HEAD"], &path, None))
    };
    (0..count).map(rule).collect()
}

/// The bits of a number as a path: `a` and `*`.
fn stars(number: usize, literal: &str) -> String {
    let width = 14;
    let segment = |bit: usize| {
        if number >> bit & 1 == 1 {
            "/*".to_owned()
        } else {
            format!("/{literal}")
        }
    };
    (0..width).map(segment).collect()
}

fn bench(criterion: &mut Criterion) {
    for layout in LAYOUTS {
        let mut group = criterion.benchmark_group(layout.name);
        for count in [1_000, 10_000] {
            let policy = compile(&(layout.rules)(count));
            let (method, path, host) = (layout.call)(count);
            let caller = id(&(layout.caller)(count));
            let path: CanonicalPath = path.parse().unwrap();
            let authority: Authority = host.parse().unwrap();
            let ask = Ask::Http(HttpAsk {
                method,
                path: &path,
                authority: Some(&authority),
                upgrade: None,
                grpc: method == "POST",
            });
            let decision = policy.authorize(Caller::Mesh(&caller), 8080, &ask);
            assert_eq!(decision.verdict, layout.expected, "{}", layout.name);
            group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
                bencher.iter(|| {
                    policy.authorize(Caller::Mesh(black_box(&caller)), 8080, black_box(&ask))
                });
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = bench
}
criterion_main!(benches);
