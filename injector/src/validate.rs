//! What a resource must be to come into a cluster.
//!
//! Invariant: the words are those of `sidegate validate`, found by the same parser, so that a file
//! that passes there passes here; only what a cluster forbids beyond that is added.

use std::net::IpAddr;

use serde_json::Value;
use sidegate_mesh::resource::{Problem, Resource, StaticService, as_written, parse_value};
use sidegate_mesh::validate::validate;

use crate::review::{Answer, Denial};

/// The API group of the resources.
pub(crate) const GROUP: &str = "sidegate.dev";

/// Most problems and warnings that are said at once.
const SAID_MAX: usize = 20;

/// Judges an object of ours that is about to be stored.
pub(crate) fn judge(object: &Value) -> Answer {
    // Whatever it says, it must be able to go: taking a finalizer away is an update.
    if object
        .pointer("/metadata/deletionTimestamp")
        .is_some_and(|time| !time.is_null())
    {
        return Answer::unchanged();
    }
    let written = as_written(object);
    match parse_value(&written) {
        Err(problems) => Answer::Denied(denial(&problems)),
        Ok(resource) => match misuse(&resource) {
            Some(problem) => Answer::Denied(denial(&[problem])),
            None => Answer::Allowed {
                patch: json_patch::Patch::default(),
                warnings: warnings(&written),
            },
        },
    }
}

fn denial(problems: &[Problem]) -> Denial {
    let said: Vec<String> = problems
        .iter()
        .take(SAID_MAX)
        .map(Problem::sentence)
        .collect();
    let causes = problems.iter().take(SAID_MAX).filter_map(|problem| {
        let field = problem.field.clone()?;
        Some((field, problem.words()))
    });
    Denial {
        code: 422,
        reason: "Invalid",
        message: said.join("\n"),
        causes: causes.collect(),
    }
}

/// What a cluster forbids beyond the grammar.
fn misuse(resource: &Resource) -> Option<Problem> {
    match resource {
        Resource::StaticService(service) => endpoint_that_is_nobodys(service),
        Resource::AuthorizationPolicy(_) | Resource::TrafficPolicy(_) => None,
    }
}

/// An endpoint on loopback or the link is another machine for each caller. Addresses of nodes,
/// pods and services are refused by the controller, which knows them.
fn endpoint_that_is_nobodys(service: &StaticService) -> Option<Problem> {
    let mut endpoints = service.spec.endpoints.iter().enumerate();
    let (index, endpoint) = endpoints.find(|(_, endpoint)| is_nobodys(endpoint.address.ip()))?;
    let resource = Resource::StaticService(service.clone());
    let mut problem = Problem::warning(
        resource.key(),
        format!("spec.endpoints[{index}].address"),
        format!(
            "{} is a different machine for each caller",
            endpoint.address
        ),
        "in a cluster, write an address that is the same for all",
    );
    problem.severity = sidegate_mesh::resource::Severity::Error;
    Some(problem)
}

fn is_nobodys(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local(),
    }
}

/// What is probably not meant, as `sidegate validate` says it.
fn warnings(written: &Value) -> Vec<String> {
    let report = validate(&[(String::new(), Ok(written.to_string()))]);
    let warnings = report.problems.iter().filter(|problem| !problem.is_error());
    warnings.take(SAID_MAX).map(Problem::sentence).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use sidegate_mesh::resource::parse_documents;

    use super::*;

    fn policy() -> Value {
        json!({
            "apiVersion": "sidegate.dev/v1alpha1",
            "kind": "AuthorizationPolicy",
            "metadata": {
                "name": "orders", "namespace": "shop", "uid": "x", "generation": 3, "creationTimestamp": null,
                "resourceVersion": "7", "managedFields": [], "labels": { "a": "b" },
                "annotations": { "kubectl.kubernetes.io/last-applied-configuration": "{}" }, "finalizers": ["x/y"],
            },
            "spec": {
                "selector": {},
                "action": "Allow",
                "rules": [{ "from": [{ "anyone": {} }], "to": [{ "http": { "methods": ["GET"], "paths": ["/x"] } }] }],
            },
            "status": { "conditions": [] },
        })
    }

    #[track_caller]
    fn check(object: &Value, field: &str, expected: &str) {
        match judge(object) {
            Answer::Denied(denial) => {
                assert!(denial.message.contains(expected), "{}", denial.message);
                assert_eq!(denial.code, 422);
                assert_eq!(denial.causes[0].0, field);
            }
            allowed @ Answer::Allowed { .. } => panic!("{expected} expected, not {allowed:?}"),
        }
    }

    #[test]
    fn what_the_api_server_adds_is_no_fault() {
        assert_eq!(judge(&policy()), Answer::unchanged());
        let mut generated = policy();
        let metadata = generated["metadata"].as_object_mut().unwrap();
        metadata.remove("name");
        metadata.insert("generateName".to_owned(), json!("orders-"));
        assert_eq!(judge(&generated), Answer::unchanged());
    }

    #[test]
    fn a_misspelt_field_is_refused_with_its_path_in_the_words_of_validate() {
        let mut object = policy();
        object["spec"]["rules"][0]["to"][0]["http"]["methds"] = json!(["GET"]);
        let field = "spec.rules[0].to[0].http.methds";
        check(
            &object,
            field,
            "spec.rules[0].to[0].http.methds: unknown field `methds`; did you mean `methods`?",
        );
        let file = parse_documents("", &as_written(&object).to_string());
        let [Err(problem)] = &file[..] else {
            panic!("{file:?}")
        };
        let Answer::Denied(denial) = judge(&object) else {
            panic!()
        };
        assert_eq!(denial.message, format!("{field}: {}", problem.words()));
    }

    #[test]
    fn a_tenant_cannot_reach_beyond_its_namespace() {
        let mut object = policy();
        object["spec"]["namespaceSelector"] = json!({});
        check(
            &object,
            "spec.namespaceSelector",
            "only policies of the namespace `sidegate-system` cover other namespaces",
        );
        object["metadata"]["namespace"] = json!("sidegate-system");
        assert_eq!(judge(&object), Answer::unchanged());
    }

    #[test]
    fn an_endpoint_is_the_same_machine_for_every_caller() {
        let service = |address: &str| {
            json!({
                "apiVersion": "sidegate.dev/v1alpha1", "kind": "StaticService", "metadata": { "name": "x", "namespace": "shop" },
                "spec": {
                    "ports": [{ "name": "http", "port": 80, "protocol": "auto" }],
                    "endpoints": [{ "address": "192.0.2.1:80", "identity": { "workload": { "serviceAccount": "x" } } },
                                  { "address": address, "identity": { "workload": { "serviceAccount": "x" } } }],
                },
            })
        };
        for address in [
            "127.0.0.1:80",
            "[::1]:80",
            "169.254.169.254:80",
            "[fe80::1]:80",
            "[::ffff:127.0.0.1]:80",
        ] {
            check(
                &service(address),
                "spec.endpoints[1].address",
                "is a different machine for each caller",
            );
        }
        assert_eq!(judge(&service("192.0.2.2:80")), Answer::unchanged());
    }

    #[test]
    fn what_is_probably_not_meant_is_a_warning() {
        let mut object = policy();
        object["spec"]["rules"][0]["to"][0]["http"] =
            json!({ "methods": ["POST"], "paths": ["/x"], "upgrades": ["websocket"] });
        let Answer::Allowed { warnings, .. } = judge(&object) else {
            panic!()
        };
        assert!(
            warnings[0].starts_with("spec.rules[0].to[0]")
                && warnings[0].contains("can never match"),
            "{warnings:?}"
        );
    }

    #[test]
    fn what_is_being_deleted_may_go() {
        let mut object = policy();
        object["spec"] = json!("nonsense");
        assert!(matches!(judge(&object), Answer::Denied(_)));
        object["metadata"]["deletionTimestamp"] = json!("2027-01-01T00:00:00Z");
        assert_eq!(judge(&object), Answer::unchanged());
        assert!(matches!(judge(&json!(null)), Answer::Denied(_)));
        assert!(matches!(
            judge(&json!({ "kind": "AuthorizationPolicy", "metadata": 1 })),
            Answer::Denied(_)
        ));
    }
}
