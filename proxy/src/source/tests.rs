//! From files to the snapshot in force.

use std::path::Path;
use std::time::SystemTime;

use prometheus_client::registry::Registry;
use sidegate_mesh::{Enforcement, ManualClock, SpiffeId, TrustDomain};

use super::*;
use crate::config::LimitsConfig;

const POLICY: &str = "\
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: orders, namespace: shop }
spec:
  selector: {}
  action: Allow
  rules:
    - name: readers
      from: [{ workload: { serviceAccount: web } }]
      to: [{ http: { methods: [GET], paths: [\"/orders/*\"] } }]
";

const SERVICE: &str = "\
apiVersion: sidegate.dev/v1alpha1
kind: StaticService
metadata: { name: orders, namespace: shop }
spec:
  ports: [{ name: http, port: 80, protocol: auto }]
  endpoints:
    - { address: \"127.0.0.1:21006\", identity: { workload: { serviceAccount: orders } } }
";

struct Source(FolderSource);

impl std::ops::Deref for Source {
    type Target = Publisher;

    fn deref(&self) -> &Publisher {
        &self.0.publisher
    }
}

impl Source {
    fn apply(&mut self, files: &Files) {
        self.0.apply(files);
    }

    fn lose(&self, lost: &Lost) {
        self.0.lose(lost);
    }
}

fn source() -> Source {
    let trust_domain: TrustDomain = "mesh.local".parse().unwrap();
    let workload = Workload {
        id: SpiffeId::for_workload(&trust_domain, "shop", "orders").unwrap(),
        trust_domain,
        namespace: "shop".into(),
        labels: std::collections::BTreeMap::new(),
        ports: vec![],
        enforcement: Enforcement::Enforce,
    };
    let clock: Arc<dyn Clock> = Arc::new(ManualClock::new(SystemTime::UNIX_EPOCH));
    let folder = Folder::new(
        Path::new("/nowhere").to_owned(),
        &LimitsConfig::default(),
        Arc::clone(&clock),
    );
    let metrics = Metrics::new(&mut Registry::default(), 100);
    let publisher = Publisher {
        store: ResourceStore::new(),
        workload: Arc::new(workload),
        state: State::new(),
        metrics: Arc::new(metrics),
        clock,
        report: Report::default(),
        reported: HashSet::new(),
    };
    Source(FolderSource { folder, publisher })
}

fn files(files: &[(&str, &str)]) -> Files {
    let content = |text: &&str| Content::Text((*text).into());
    files
        .iter()
        .map(|(path, text)| ((*path).to_owned(), content(text)))
        .collect()
}

fn policies(source: &Source) -> Vec<Option<String>> {
    let policies = &source.report().current().resources.policies;
    let rules = policies.iter().flat_map(|policy| &policy.spec.rules);
    rules.map(|rule| rule.name.clone()).collect()
}

#[test]
fn nothing_is_published_while_the_source_is_lost() {
    let mut source = source();
    source.lose(&Lost::Restless {
        path: "/nowhere".into(),
    });
    assert!(source.state.current().is_none());
    assert!(source.report().current().lost.is_some());
    source.apply(&files(&[("a.yaml", POLICY)]));
    assert_eq!(source.state.current().unwrap().number, 1);
    assert!(source.report().current().lost.is_none());
    source.lose(&Lost::Restless {
        path: "/nowhere".into(),
    });
    assert_eq!(
        source.state.current().unwrap().number,
        1,
        "the last one stays"
    );
    assert_eq!(policies(&source), [Some("readers".to_owned())]);
}

#[test]
fn an_endpoint_change_keeps_the_policy_pointer() {
    let mut source = source();
    source.apply(&files(&[("a.yaml", POLICY), ("b.yaml", SERVICE)]));
    let before = source.state.current().unwrap();
    let moved = SERVICE.replace("21006", "21007");
    source.apply(&files(&[("a.yaml", POLICY), ("b.yaml", &moved)]));
    let after = source.state.current().unwrap();
    assert_eq!(after.number, before.number + 1);
    assert!(
        Arc::ptr_eq(&before.policy, &after.policy),
        "no stream is checked again"
    );
    assert!(!Arc::ptr_eq(&before.routes, &after.routes));
}

#[test]
fn a_refused_resource_keeps_its_last_good_version_and_is_counted_once() {
    let mut source = source();
    source.apply(&files(&[("a.yaml", POLICY)]));
    let broken = POLICY.replace("methods", "methodz");
    source.apply(&files(&[("a.yaml", &broken)]));
    let rejections = source.metrics.snapshot_rejections.clone();
    assert_eq!(rejections.get(), 1);
    assert_eq!(policies(&source), [Some("readers".to_owned())]);
    assert_eq!(source.report().current().problems.len(), 1);
    source.apply(&files(&[("a.yaml", &broken), ("b.yaml", SERVICE)]));
    assert_eq!(rejections.get(), 1, "it was said before");
    assert_eq!(
        source.report().current().problems.len(),
        1,
        "it is shown while it lasts"
    );
    source.apply(&files(&[("a.yaml", POLICY), ("b.yaml", SERVICE)]));
    assert!(source.report().current().problems.is_empty());
    source.apply(&files(&[("a.yaml", &broken), ("b.yaml", SERVICE)]));
    assert_eq!(rejections.get(), 2, "it is said again after it was well");
}

#[test]
fn two_files_with_one_resource_are_reported() {
    let mut source = source();
    source.apply(&files(&[("a.yaml", POLICY), ("b.yaml", POLICY)]));
    let reading = source.report().current();
    assert_eq!(reading.resources.policies.len(), 1);
    assert!(
        reading.problems.iter().any(|p| p.file == "b.yaml"),
        "{:?}",
        reading.problems
    );
}

#[test]
fn an_emptied_file_keeps_what_it_said_and_an_unusable_one_too() {
    let mut source = source();
    source.apply(&files(&[("a.yaml", POLICY)]));
    source.apply(&files(&[("a.yaml", "")]));
    assert_eq!(policies(&source), [Some("readers".to_owned())]);
    let mut unusable = files(&[]);
    unusable.insert(
        "a.yaml".into(),
        Content::Unusable("permission denied".into()),
    );
    source.apply(&unusable);
    assert_eq!(policies(&source), [Some("readers".to_owned())]);
    let problems = source.report().current().problems.clone();
    assert!(
        problems[0].to_string().contains("permission denied"),
        "{problems:?}"
    );
}

#[test]
fn an_emptied_folder_is_empty_and_says_so() {
    let mut source = source();
    source.apply(&files(&[("a.yaml", POLICY)]));
    source.apply(&files(&[]));
    let reading = source.report().current();
    assert!(reading.resources.policies.is_empty());
    assert!(!reading.problems[0].is_error(), "{:?}", reading.problems);
}
