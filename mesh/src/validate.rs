//! Offline checks of resource files: what `sidegate validate` says.
//!
//! Invariant: an error here is what a sidecar refuses, found by the same code; a warning is what
//! the compiler says of the workloads that the policies themselves describe.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;

use crate::policy::Policy;
use crate::resource::{
    AuthorizationPolicy, Located, PortRef, Problem, Resource, ResourceKey, parse_documents,
};
use crate::routes::Routes;
use crate::spiffe::{SpiffeId, TrustDomain};
use crate::store::{ResourceSet, ResourceStore};
use crate::workload::{Enforcement, Workload, WorkloadPort};

/// The trust domain of the workloads that warnings are about.
const TRUST_DOMAIN: &str = "mesh.local";
/// The service account of a workload that only its labels describe.
const SERVICE_ACCOUNT: &str = "any";

/// What is wrong with some files of resources.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// How many files were read.
    pub files: usize,
    /// How many resources are good.
    pub resources: usize,
    /// What is wrong, by file, line and column.
    pub problems: Vec<Problem>,
}

impl Report {
    /// How many problems make a resource refused.
    pub fn errors(&self) -> usize {
        let errors = self.problems.iter().filter(|problem| problem.is_error());
        errors.count()
    }

    /// How many problems are worth a look.
    pub fn warnings(&self) -> usize {
        self.problems.len() - self.errors()
    }
}

/// Checks these files as the whole of a folder: each alone, then together.
///
/// In place of a file's text may stand why it can't be read.
pub fn validate(files: &[(String, Result<String, String>)]) -> Report {
    let mut store = ResourceStore::new();
    let mut problems = store.replace_files(files);
    let set = store.resources();
    let mut warnings = warnings(set);
    place(&mut warnings, files);
    problems.extend(warnings);
    problems.sort_by(|a, b| {
        let place = |problem: &Problem| (problem.line, problem.column, problem.severity);
        (&a.file, place(a)).cmp(&(&b.file, place(b)))
    });
    Report {
        files: files.len(),
        resources: set.policies.len() + set.services.len() + set.traffic.len(),
        problems,
    }
}

/// Says of each warning in which file, line and column it is.
fn place(warnings: &mut [Problem], files: &[(String, Result<String, String>)]) {
    if warnings.is_empty() {
        return;
    }
    let mut places: BTreeMap<ResourceKey, Located<Resource>> = BTreeMap::new();
    for (file, text) in files {
        let documents = text.iter().flat_map(|text| parse_documents(file, text));
        for document in documents.flatten() {
            places.entry(document.value.key()).or_insert(document);
        }
    }
    for warning in warnings {
        let key = warning.resource.as_ref();
        if let Some(document) = key.and_then(|key| places.get(key)) {
            document.place(warning);
        }
    }
}

/// What the compiler says of each workload that a policy describes by namespace and labels.
fn warnings(set: &ResourceSet) -> Vec<Problem> {
    let Ok(trust_domain) = TRUST_DOMAIN.parse::<TrustDomain>() else {
        return Vec::new();
    };
    let ports = Ports::named_in(&set.policies);
    let mut warnings = Vec::new();
    let mut seen = BTreeSet::new();
    let mut routes_done = false;
    for workload in workloads(set, &trust_domain, &ports) {
        let (_, mut found) = Policy::compile(set, &workload);
        if !std::mem::replace(&mut routes_done, true) {
            found.extend(Routes::compile(set, &workload).1);
        }
        for mut warning in found {
            warning.message = ports.with_names(&warning.message);
            let identity = (
                warning.resource.clone(),
                warning.field.clone(),
                warning.message.clone(),
            );
            if seen.insert(identity) {
                warnings.push(warning);
            }
        }
    }
    warnings
}

/// One workload for each pair of namespace and labels that a policy selects, and one at least.
fn workloads(set: &ResourceSet, trust_domain: &TrustDomain, ports: &Ports) -> Vec<Workload> {
    let none = (SERVICE_ACCOUNT.to_owned(), BTreeMap::new());
    let selected = set.policies.iter().map(|policy| {
        let namespace = policy.metadata.namespace.clone();
        (namespace, policy.spec.selector.match_labels.clone())
    });
    let described: BTreeSet<_> = selected.chain([none]).collect();
    let workload = |(namespace, labels): (String, BTreeMap<String, String>)| {
        let id = SpiffeId::for_workload(trust_domain, &namespace, SERVICE_ACCOUNT).ok()?;
        Some(Workload {
            id,
            trust_domain: trust_domain.clone(),
            namespace,
            labels,
            ports: ports.of_workload(),
            enforcement: Enforcement::Enforce,
        })
    };
    described.into_iter().filter_map(workload).collect()
}

/// The ports that policies name. A file doesn't say which numbers they have, so they get some.
struct Ports(BTreeMap<String, u16>);

impl Ports {
    fn named_in(policies: &[Arc<AuthorizationPolicy>]) -> Self {
        let all = policies
            .iter()
            .flat_map(|policy| policy.spec.ports.iter().flatten());
        let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
        for port in all {
            match port {
                PortRef::Name(name) => drop(names.insert(name.clone())),
                PortRef::Number(number) => drop(numbers.insert(*number)),
            }
        }
        let free = (1..=u16::MAX)
            .rev()
            .filter(|number| !numbers.contains(number));
        Self(names.into_iter().zip(free).collect())
    }

    fn of_workload(&self) -> Vec<WorkloadPort> {
        let port = |(name, port): (&String, &u16)| WorkloadPort {
            name: Some(name.clone()),
            port: *port,
        };
        self.0.iter().map(port).collect()
    }

    /// A message in which a port stands under the name that the person wrote.
    fn with_names(&self, message: &str) -> String {
        let named = |message: String, (name, port): (&String, &u16)| {
            message.replace(&format!("port {port} "), &format!("port `{name}` "))
        };
        self.0.iter().fold(message.to_owned(), named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: sidegate.dev/v1alpha1\nkind: AuthorizationPolicy\n";

    fn report(files: &[(&str, &str)]) -> Report {
        let file = |(path, text): &(&str, &str)| ((*path).to_owned(), Ok((*text).to_owned()));
        let files: Vec<_> = files.iter().map(file).collect();
        validate(&files)
    }

    fn texts(report: &Report) -> Vec<String> {
        report.problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn good_files_have_no_problems() {
        let reference = include_str!("../tests/data/reference.yaml");
        let report = report(&[("a.yaml", reference)]);
        assert_eq!(texts(&report), Vec::<String>::new());
        assert_eq!((report.files, report.resources), (1, 4));
    }

    #[test]
    fn errors_are_found_in_each_file_and_between_files() {
        let policy = format!(
            "{HEAD}metadata: {{ name: a, namespace: b }}\nspec:\n  selector: {{}}\n  action: Allow\n  rules: [{{ from: [{{ anyone: {{}} }}], to: [{{ http: {{ methods: [GET], paths: [/x] }} }}] }}]\n"
        );
        let misspelt = policy
            .replace("selector", "selectors")
            .replace("name: a", "name: c");
        let report = report(&[
            ("1.yaml", &policy),
            ("2.yaml", &policy),
            ("3.yaml", &misspelt),
        ]);
        let texts = texts(&report);
        assert_eq!((report.errors(), report.warnings()), (2, 0), "{texts:?}");
        assert!(
            texts[0].starts_with("2.yaml:1:1: AuthorizationPolicy b/a is already in 1.yaml:1:1")
        );
        assert!(
            texts[1].starts_with("3.yaml:5:3: unknown field `selectors`; did you mean `selector`?")
        );
    }

    #[test]
    fn a_rule_that_can_never_match_is_shown_where_it_stands() {
        let text = format!(
            "{HEAD}metadata: {{ name: a, namespace: b }}\nspec:\n  selector: {{}}\n  action: Allow\n  rules:\n    - from: [{{ anyone: {{}} }}]\n      to:\n        - http: {{ methods: [POST], paths: [/x], upgrades: [websocket] }}\n"
        );
        let report = report(&[("a.yaml", &text)]);
        let texts = texts(&report);
        assert_eq!((report.errors(), report.warnings()), (0, 1), "{texts:?}");
        assert!(
            texts[0].starts_with("a.yaml:10:28: warning: the rule can never match"),
            "{texts:?}"
        );
    }

    #[test]
    fn a_port_in_conflict_is_called_as_it_was_written() {
        let text = format!(
            "{HEAD}metadata: {{ name: a, namespace: b }}\nspec:\n  selector: {{}}\n  ports: [db]\n  action: Allow\n  rules:\n    - from: [{{ anyone: {{}} }}]\n      to: [{{ tcp: {{}} }}, {{ http: {{ methods: [GET], paths: [/x] }} }}]\n"
        );
        let report = report(&[("a.yaml", &text)]);
        let texts = texts(&report);
        assert_eq!(texts.len(), 1, "{texts:?}");
        assert!(
            texts[0].starts_with("a.yaml:6:10: warning: port `db` never carries"),
            "{texts:?}"
        );
    }
}
