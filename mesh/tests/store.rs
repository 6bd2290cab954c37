//! A resource that can't be read never replaces one that could, and never leaves a hole.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::too_many_lines,
    missing_docs,
    reason = "tests"
)]

use std::sync::Arc;

use sidegate_mesh::resource::{Action, Kind, Mode};
use sidegate_mesh::{
    BrokenResource, Enforcement, Problem, ResourceStore, SpiffeId, TrustDomain, Workload,
};

/// A policy of the namespace `shop` for the path `/NAME`.
fn policy(name: &str, action: &str) -> String {
    format!(
        "apiVersion: sidegate.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{ name: {name}, namespace: shop }}\nspec:\n  selector: {{ matchLabels: {{ app: orders }} }}\n  action: {action}\n  rules: [{{ from: [{{ anyone: {{}} }}], to: [{{ http: {{ methods: [GET], paths: [/{name}] }} }}] }}]\n"
    )
}

/// The same with a misspelt field.
fn misspelt(name: &str, action: &str) -> String {
    policy(name, action).replace("methods", "method")
}

struct Folder {
    store: ResourceStore,
    files: Vec<(String, String)>,
}

impl Folder {
    fn of(files: &[(&str, &str)]) -> Self {
        let mut folder = Self {
            store: ResourceStore::new(),
            files: Vec::new(),
        };
        folder.write(files);
        folder
    }

    /// Makes these the folder's files.
    fn write(&mut self, files: &[(&str, &str)]) -> Vec<Problem> {
        let file = |(path, text): &(&str, &str)| ((*path).to_owned(), (*text).to_owned());
        self.files = files.iter().map(file).collect();
        self.store.replace_folder(&self.files)
    }

    /// `name=path` of each policy in force.
    fn policies(&self) -> Vec<String> {
        let policies = &self.store.resources().policies;
        let text = |policy: &Arc<sidegate_mesh::resource::AuthorizationPolicy>| {
            let sidegate_mesh::resource::Target::Http { paths, .. } = &policy.spec.rules[0].to[0]
            else {
                panic!("{policy:?}");
            };
            format!("{}={}", policy.metadata.name, paths[0])
        };
        policies.iter().map(text).collect()
    }

    fn broken(&self) -> &[BrokenResource] {
        &self.store.resources().broken
    }

    fn stale(&self) -> Vec<String> {
        self.store.stale().map(|key| key.name.clone()).collect()
    }
}

fn workload(namespace: &str, app: &str) -> Workload {
    let trust_domain: TrustDomain = "mesh.local".parse().unwrap();
    Workload {
        id: SpiffeId::for_workload(&trust_domain, namespace, app).unwrap(),
        trust_domain,
        namespace: namespace.to_owned(),
        labels: [("app".to_owned(), app.to_owned())].into(),
        ports: Vec::new(),
        enforcement: Enforcement::Enforce,
    }
}

/// Which of these workloads a mark denies.
fn denied(broken: &BrokenResource) -> Vec<&'static str> {
    let all = [
        ("shop", "orders", "shop/orders"),
        ("shop", "web", "shop/web"),
        ("jobs", "batch", "jobs/batch"),
    ];
    let denied = all
        .into_iter()
        .filter(|(namespace, app, _)| broken.denies(&workload(namespace, app)));
    denied.map(|(_, _, name)| name).collect()
}

#[test]
fn a_change_takes_effect_and_what_did_not_change_stays_the_same() {
    let mut folder = Folder::of(&[
        ("a.yaml", &policy("a", "Allow")),
        ("b.yaml", &policy("b", "Deny")),
    ]);
    assert_eq!(folder.policies(), ["a=/a", "b=/b"]);
    let before = folder.store.resources().clone();
    let changed = policy("b", "Deny").replace("[/b]", "[/c]");
    assert!(
        folder
            .write(&[("a.yaml", &policy("a", "Allow")), ("b.yaml", &changed)])
            .is_empty()
    );
    assert_eq!(folder.policies(), ["a=/a", "b=/c"]);
    let after = folder.store.resources();
    assert!(Arc::ptr_eq(&before.policies[0], &after.policies[0]));
    assert!(!Arc::ptr_eq(&before.policies[1], &after.policies[1]));
}

#[test]
fn a_refused_resource_keeps_its_last_good_version() {
    let mut folder = Folder::of(&[("a.yaml", &policy("a", "Allow"))]);
    for broken in [
        misspelt("a", "Allow"),
        policy("a", "Allow").replace("spec:", "spec: ["),
        policy("a", "Allow").replace("kind: AuthorizationPolicy", "kind: AuthorisationPolicy"),
        policy("a", "Allow").replace("namespace: shop", "namespace: Shop"),
        policy("a", "Allow").replace("v1alpha1", "v2"),
        String::new(),
        "{".to_owned(),
        "x".repeat(5 * 1024 * 1024),
    ] {
        let problems = folder.write(&[("a.yaml", &broken)]);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(folder.policies(), ["a=/a"], "{problems:?}");
        assert_eq!(folder.stale(), ["a"]);
        assert!(folder.broken().is_empty(), "{problems:?}");
    }
    assert!(
        folder
            .write(&[("a.yaml", &policy("a", "Allow"))])
            .is_empty()
    );
    assert!(folder.stale().is_empty());
}

#[test]
fn a_refused_resource_leaves_its_neighbours_in_the_file_alone() {
    let text = |second: &str| {
        format!(
            "{}---\n{second}---\n{}",
            policy("a", "Allow"),
            policy("c", "Allow")
        )
    };
    let mut folder = Folder::of(&[("a.yaml", &text(&policy("b", "Allow")))]);
    let changed = text(&misspelt("b", "Allow")).replace("[/c]", "[/d]");
    assert_eq!(folder.write(&[("a.yaml", &changed)]).len(), 1);
    assert_eq!(folder.policies(), ["a=/a", "b=/b", "c=/d"]);
    assert_eq!(folder.stale(), ["b"]);
    let removed = format!("{}---\n{}", policy("a", "Allow"), policy("c", "Allow"));
    assert!(folder.write(&[("a.yaml", &removed)]).is_empty());
    assert_eq!(folder.policies(), ["a=/a", "c=/c"]);
}

#[test]
fn a_file_that_is_gone_takes_its_resources_along() {
    let mut folder = Folder::of(&[
        ("a.yaml", &policy("a", "Allow")),
        ("b.yaml", &policy("b", "Allow")),
    ]);
    folder.write(&[("a.yaml", ""), ("b.yaml", &policy("b", "Allow"))]);
    assert_eq!(folder.policies(), ["a=/a", "b=/b"]);
    assert!(
        folder
            .write(&[("b.yaml", &policy("b", "Allow"))])
            .is_empty()
    );
    assert_eq!(folder.policies(), ["b=/b"]);
    assert!(folder.write(&[]).is_empty());
    assert!(folder.policies().is_empty() && folder.broken().is_empty());
}

#[test]
fn a_file_that_can_not_be_opened_keeps_its_resources() {
    let mut folder = Folder::of(&[("a.yaml", &policy("a", "Deny"))]);
    let unreadable = [("a.yaml".to_owned(), Err("permission denied".to_owned()))];
    let problems = folder.store.replace_files(&unreadable);
    assert!(
        problems[0].message.contains("permission denied"),
        "{problems:?}"
    );
    assert_eq!(folder.policies(), ["a=/a"]);
    let problems = ResourceStore::new().replace_files(&unreadable);
    assert_eq!(problems.len(), 1);
}

#[test]
fn without_a_last_good_version_a_deny_denies_what_it_selects_and_an_allow_gives_nothing() {
    let folder = Folder::of(&[("a.yaml", &misspelt("a", "Deny"))]);
    let [broken] = folder.broken() else { panic!() };
    assert_eq!(broken.action, Some(Action::Deny));
    assert_eq!(broken.label(), "shop/a");
    assert_eq!(denied(broken), ["shop/orders"]);
    let folder = Folder::of(&[("a.yaml", &misspelt("a", "Allow"))]);
    assert_eq!(folder.broken().len(), 1);
    assert!(denied(&folder.broken()[0]).is_empty());
}

#[test]
fn a_mark_is_as_wide_as_what_can_not_be_read() {
    let deny = policy("a", "Deny");
    let cases = [
        (
            deny.replace("matchLabels", "matchLabel"),
            vec!["shop/orders", "shop/web"],
        ),
        (
            deny.replace("action: Deny", "action: Dney"),
            vec!["shop/orders"],
        ),
        (
            deny.replace("action: Deny", "action: allow"),
            vec!["shop/orders"],
        ),
        (deny.replace("  action: Deny\n", ""), vec!["shop/orders"]),
        (
            deny.replace("action: Deny", "action: Allow\n  action: Deny"),
            vec!["shop/orders"],
        ),
        (
            deny.replace("namespace: shop", "namespace: Shop"),
            vec!["shop/orders"],
        ),
        (
            deny.replace("matchLabels: { app: orders }", "matchLabel: {}")
                .replace("namespace: shop", "ns: shop"),
            vec!["shop/orders", "shop/web", "jobs/batch"],
        ),
        (
            deny.replace("kind: AuthorizationPolicy", "kind: AuthorizationPolice"),
            vec!["shop/orders"],
        ),
        (
            deny.replace("kind: AuthorizationPolicy", "kind: StaticService"),
            vec![],
        ),
        (
            deny.replace("action: Deny", "action: Deny\n  mode: Audit")
                .replace("methods", "method"),
            vec![],
        ),
        (
            deny.replace("action: Deny", "action: Deny\n  mode: audit"),
            vec!["shop/orders"],
        ),
        (
            deny.replace("namespace: shop", "namespace: sidegate-system")
                .replace("methods", "method"),
            vec!["shop/orders"],
        ),
        (
            "garbage: [".to_owned(),
            vec!["shop/orders", "shop/web", "jobs/batch"],
        ),
        (String::new(), vec!["shop/orders", "shop/web", "jobs/batch"]),
    ];
    for (text, expected) in cases {
        let folder = Folder::of(&[("a.yaml", &text)]);
        let [broken] = folder.broken() else {
            panic!("{text}: {:?}", folder.broken());
        };
        assert_eq!(denied(broken), expected, "{text}");
    }
}

/// A policy in block style, which is valid YAML wherever it is cut.
fn block_policy(name: &str, action: &str) -> String {
    format!(
        "apiVersion: sidegate.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  name: {name}\n  namespace: shop\nspec:\n  selector:\n    matchLabels:\n      app: orders\n  action: {action}\n  rules:\n    - from:\n        - anyone: {{}}\n      to:\n        - http:\n            methods:\n              - GET\n            paths:\n              - /{name}\n"
    )
}

/// Cuts a file with an Allow and then a Deny everywhere. What no parser can tell from a shorter
/// file is left to the two scans of a folder: a cut that is wholly good, and at the first start
/// what an Allow that was cut was followed by.
#[track_caller]
fn check_every_cut(text: &str) {
    let second_at = text.find("---\n").unwrap();
    let has_deny = |folder: &Folder| {
        let policies = &folder.store.resources().policies;
        policies
            .iter()
            .any(|policy| policy.spec.action == Action::Deny)
    };
    let mut good = 0;
    for cut in 0..text.len() {
        let cut_off = &text[..cut];
        let mut folder = Folder::of(&[]);
        if folder.write(&[("a.yaml", cut_off)]).is_empty() {
            good += 1;
            continue;
        }
        let orders = workload("shop", "orders");
        let denies = folder.broken().iter().any(|broken| broken.denies(&orders));
        let is_before = cut < second_at + 3;
        assert!(denies || has_deny(&folder) || is_before, "{cut}: {cut_off}");
        folder.write(&[("a.yaml", text)]);
        assert_eq!(folder.policies(), ["a=/a", "b=/b"]);
        assert!(folder.broken().is_empty());
        folder.write(&[("a.yaml", cut_off)]);
        assert!(has_deny(&folder), "{cut}: {cut_off}");
    }
    assert!(good <= 10, "{good}");
}

#[test]
fn a_file_that_was_cut_off_anywhere_is_never_wider() {
    check_every_cut(&format!(
        "{}---\n{}",
        policy("a", "Allow"),
        policy("b", "Deny")
    ));
    check_every_cut(&format!(
        "{}---\n{}",
        block_policy("a", "Allow"),
        block_policy("b", "Deny")
    ));
}

#[test]
fn the_broken_syntax_of_one_document_still_tells_whose_it_is() {
    let text = policy("a", "Deny") + "   - bad: [\n";
    let folder = Folder::of(&[("a.yaml", &text)]);
    let [broken] = folder.broken() else { panic!() };
    assert_eq!(broken.kind, Some(Kind::AuthorizationPolicy));
    assert_eq!(broken.label(), "shop/a");
    assert_eq!(broken.action, Some(Action::Deny));
    assert_eq!(denied(broken), ["shop/orders"]);
    assert_eq!(broken.mode, None::<Mode>);
}

#[test]
fn the_second_resource_of_a_name_is_refused_and_says_where_the_first_is() {
    let other = policy("a", "Allow").replace("[/a]", "[/b]");
    let mut folder = Folder::of(&[]);
    let problems = folder.write(&[("2.yaml", &other), ("1.yaml", &policy("a", "Allow"))]);
    assert_eq!(folder.policies(), ["a=/a"]);
    let text = problems[0].to_string();
    assert_eq!(problems.len(), 1);
    assert!(
        text.starts_with("2.yaml:1:1: AuthorizationPolicy shop/a is already in 1.yaml:1:1"),
        "{text}"
    );
    let problems = folder.write(&[("0.yaml", &other), ("1.yaml", &policy("a", "Allow"))]);
    assert_eq!(folder.policies(), ["a=/a"], "the one in force stays");
    assert_eq!(problems[0].file, "0.yaml");
    assert!(folder.broken().is_empty());
}

#[test]
fn a_second_resource_of_a_name_does_not_take_over_when_the_first_breaks() {
    let other = policy("a", "Allow").replace("[/a]", "[/**]");
    for broken in [misspelt("a", "Allow"), String::new(), "{".to_owned()] {
        let mut folder = Folder::of(&[("b.yaml", &policy("a", "Allow"))]);
        folder.write(&[("a.yaml", &other), ("b.yaml", &policy("a", "Allow"))]);
        for _ in 0..2 {
            folder.write(&[("a.yaml", &other), ("b.yaml", &broken)]);
            assert_eq!(folder.policies(), ["a=/a"], "{broken}");
        }
        assert!(folder.broken().is_empty());
        folder.write(&[("a.yaml", &other)]);
        assert_eq!(folder.policies(), ["a=/**"], "{broken}");
    }
}

#[test]
fn a_resource_may_move_to_another_file() {
    let mut folder = Folder::of(&[
        ("a.yaml", &policy("a", "Allow")),
        ("b.yaml", &policy("b", "Allow")),
    ]);
    let both = format!("{}---\n{}", policy("a", "Allow"), policy("b", "Allow"));
    assert!(folder.write(&[("b.yaml", &both)]).is_empty());
    assert_eq!(folder.policies(), ["a=/a", "b=/b"]);
    folder.write(&[
        ("c.yaml", &misspelt("a", "Allow")),
        ("b.yaml", &policy("b", "Allow")),
    ]);
    assert_eq!(
        folder.policies(),
        ["a=/a", "b=/b"],
        "moved and broken: the last good version stays"
    );
    assert_eq!(folder.stale(), ["a"]);
    folder.write(&[("b.yaml", &policy("b", "Allow"))]);
    assert_eq!(folder.policies(), ["b=/b"]);
}

#[test]
fn a_resource_may_move_out_of_a_file_that_is_broken() {
    let text = format!("{}---\n{}", policy("a", "Allow"), policy("b", "Allow"));
    let mut folder = Folder::of(&[("a.yaml", &text)]);
    let moved = policy("b", "Allow").replace("[/b]", "[/c]");
    let problems = folder.write(&[("a.yaml", &misspelt("a", "Allow")), ("b.yaml", &moved)]);
    assert_eq!(folder.policies(), ["a=/a", "b=/c"]);
    assert_eq!(problems.len(), 1, "{problems:?}");
}

#[test]
fn a_renamed_resource_that_breaks_is_not_taken_for_the_old_one() {
    let mut folder = Folder::of(&[("a.yaml", &policy("a", "Deny"))]);
    folder.write(&[("a.yaml", &misspelt("b", "Deny"))]);
    assert_eq!(
        folder.policies(),
        ["a=/a"],
        "nothing is removed by a file that is not good"
    );
    assert_eq!(denied(&folder.broken()[0]), ["shop/orders"]);
    folder.write(&[("a.yaml", &policy("b", "Deny"))]);
    assert_eq!(folder.policies(), ["b=/b"]);
    assert!(folder.broken().is_empty());
}

#[test]
fn a_new_document_that_can_not_be_told_is_not_taken_for_an_old_one_that_is_there() {
    let mut folder = Folder::of(&[("a.yaml", &policy("a", "Allow"))]);
    let unknown = policy("b", "Deny").replace("metadata", "meta");
    folder.write(&[("a.yaml", &format!("{}---\n{unknown}", policy("a", "Allow")))]);
    assert_eq!(folder.policies(), ["a=/a"]);
    assert_eq!(denied(&folder.broken()[0]), ["shop/orders"]);
    let two = format!("{unknown}---\n{unknown}");
    folder.write(&[("a.yaml", &two)]);
    assert_eq!(folder.policies(), ["a=/a"], "one of the two may be it");
    assert_eq!(folder.broken().len(), 1, "but not both");
}

#[test]
fn a_last_good_version_survives_many_broken_ones() {
    let mut folder = Folder::of(&[("a.yaml", &policy("a", "Deny"))]);
    for _ in 0..3 {
        folder.write(&[("a.yaml", "")]);
        folder.write(&[("a.yaml", &misspelt("a", "Allow"))]);
        folder.write(&[("a.yaml", "---\n{ [ }")]);
        assert_eq!(folder.policies(), ["a=/a"]);
        assert_eq!(
            folder.store.resources().policies[0].spec.action,
            Action::Deny
        );
    }
}

#[test]
fn a_folder_holds_a_bounded_number_of_resources() {
    let small = |index: usize| {
        format!(
            "apiVersion: sidegate.dev/v1alpha1\nkind: StaticService\nmetadata: {{ name: s{index}, namespace: a }}\nspec: {{ ports: [{{ port: 80 }}], endpoints: [] }}\n"
        )
    };
    let file = |file: usize| {
        let documents: Vec<String> = (0..1_000)
            .map(|index| small(file * 1_000 + index))
            .collect();
        (format!("{file:02}.yaml"), documents.join("---\n"))
    };
    let mut files: Vec<_> = (0..10).map(file).collect();
    files.push(("99.yaml".to_owned(), small(10_000)));
    let mut store = ResourceStore::new();
    let problems = store.replace_folder(&files);
    assert_eq!(store.resources().services.len(), 10_000);
    assert_eq!(problems.len(), 1);
    assert!(
        problems[0]
            .to_string()
            .contains("99.yaml:1:1: the folder has more than 10000"),
        "{}",
        problems[0]
    );
}
