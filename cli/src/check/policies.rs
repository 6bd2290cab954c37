//! Whether policies are accepted, live, and about anything.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::Value;
use sidegate_mesh::resource::{Kind, SYSTEM_NAMESPACE};

use super::Facts;
use super::finding::{Finding, names};

/// The policies of one namespace, or all.
pub(super) fn check(facts: &Facts, namespace: Option<&str>) -> Vec<Finding> {
    let here = |object: &&(Kind, DynamicObject)| {
        let of = object.1.namespace();
        namespace.is_none_or(|name| of.as_deref() == Some(name))
    };
    let resources: Vec<&(Kind, DynamicObject)> = facts.resources.iter().filter(here).collect();
    let mut findings = vec![accepted(&resources), live(&resources)];
    findings.push(about_something(facts, &resources));
    findings
}

fn name(object: &DynamicObject) -> String {
    format!(
        "{}/{}",
        object.namespace().unwrap_or_default(),
        object.name_any()
    )
}

fn condition<'a>(object: &'a DynamicObject, kind: &str) -> Option<&'a Value> {
    let conditions = object.data.pointer("/status/conditions")?.as_array()?;
    conditions
        .iter()
        .find(|condition| text(condition, "type") == kind)
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn accepted(resources: &[&(Kind, DynamicObject)]) -> Finding {
    let check = "policies accepted";
    let mut refused = Vec::new();
    let mut unjudged = Vec::new();
    for (kind, object) in resources {
        match condition(object, "Accepted") {
            Some(said) if text(said, "status") == "True" => {}
            Some(said) => refused.push(format!(
                "{kind} {}: {}",
                name(object),
                text(said, "message")
            )),
            None => unjudged.push(format!("{kind} {}", name(object))),
        }
    }
    if !refused.is_empty() {
        return Finding::wrong(
            check,
            names(&refused),
            "mend them: until then the last good version counts, or nothing does",
        );
    }
    if unjudged.is_empty() {
        return Finding::well(check, format!("{} resources", resources.len()));
    }
    Finding::look(
        check,
        format!("no word of the controller yet on {}", names(&unjudged)),
        "`sidegate check` says whether the controller runs",
    )
}

fn live(resources: &[&(Kind, DynamicObject)]) -> Finding {
    let check = "policies live";
    let pending: Vec<String> = resources
        .iter()
        .filter_map(|(kind, object)| {
            let said = condition(object, "Live")?;
            let done = text(said, "status") == "True";
            let count = object.data.pointer("/status/live").and_then(Value::as_str);
            let count = count.unwrap_or_else(|| text(said, "message"));
            (!done).then(|| format!("{kind} {} ({count})", name(object)))
        })
        .collect();
    if pending.is_empty() {
        return Finding::well(check, "on every sidecar that they select");
    }
    Finding::look(
        check,
        format!("not everywhere: {}", names(&pending)),
        "`sidegate status` shows which sidecars; one that is older, or cut off, keeps what it had",
    )
}

fn about_something(facts: &Facts, resources: &[&(Kind, DynamicObject)]) -> Finding {
    let check = "policies used";
    let idle = |(kind, object): &&&(Kind, DynamicObject)| match kind {
        Kind::AuthorizationPolicy => !selects_a_pod(facts, object),
        Kind::TrafficPolicy => !names_a_service(facts, object),
        Kind::StaticService => false,
    };
    let idle: Vec<String> = resources
        .iter()
        .filter(idle)
        .map(|(kind, object)| format!("{kind} {}", name(object)))
        .collect();
    if idle.is_empty() {
        return Finding::well(check, "each is about something that is there");
    }
    Finding::look(
        check,
        format!("about nothing that is there: {}", names(&idle)),
        "compare selector.matchLabels with `kubectl get pods --show-labels`, and service with \
         `kubectl get services`",
    )
}

fn selects_a_pod(facts: &Facts, policy: &DynamicObject) -> bool {
    let of = policy.namespace();
    let labels = policy.data.pointer("/spec/selector/matchLabels");
    let labels: BTreeMap<String, String> = labels
        .and_then(|labels| serde_json::from_value(labels.clone()).ok())
        .unwrap_or_default();
    // Mesh-wide policies select by namespace, too; that one is there is all that is asked.
    let wide = of.as_deref() == Some(SYSTEM_NAMESPACE);
    facts.pods.iter().any(|pod| {
        let here = wide || pod.namespace() == of;
        here && has_labels(pod, &labels)
    })
}

pub(super) fn has_labels(pod: &Pod, labels: &BTreeMap<String, String>) -> bool {
    labels
        .iter()
        .all(|(key, value)| pod.labels().get(key) == Some(value))
}

fn names_a_service(facts: &Facts, policy: &DynamicObject) -> bool {
    let service = policy.data.pointer("/spec/service").and_then(Value::as_str);
    let is = |namespace: Option<String>, called: String| {
        namespace == policy.namespace() && Some(called.as_str()) == service
    };
    let mut services = facts.services.iter();
    let mut resources = facts.resources.iter();
    services.any(|it| is(it.namespace(), it.name_any()))
        || resources
            .any(|(kind, it)| *kind == Kind::StaticService && is(it.namespace(), it.name_any()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::finding::Level;
    use super::super::injected::tests::meshed;
    use super::*;

    fn policy(spec: &Value, status: &Value) -> (Kind, DynamicObject) {
        let object = json!({
            "metadata": { "name": "orders", "namespace": "shop" },
            "spec": spec, "status": status,
        });
        (
            Kind::AuthorizationPolicy,
            serde_json::from_value(object).unwrap(),
        )
    }

    fn levels(spec: &Value, status: &Value) -> Vec<Level> {
        let facts = Facts {
            pods: vec![meshed("orders", &[], &json!({}))],
            resources: vec![policy(spec, status)],
            ..Facts::default()
        };
        check(&facts, Some("shop"))
            .iter()
            .map(|it| it.level)
            .collect()
    }

    fn conditions(accepted: &str, live: &str) -> Value {
        json!({ "live": "1 of 2", "conditions": [
            { "type": "Accepted", "status": accepted, "message": "spec.rules[0]: empty" },
            { "type": "Live", "status": live },
        ] })
    }

    #[test]
    fn a_policy_is_accepted_live_and_selects_something_or_it_is_said() {
        let good = json!({ "selector": { "matchLabels": { "app": "orders" } } });
        let idle = json!({ "selector": { "matchLabels": { "app": "order" } } });
        let all = json!({ "selector": {} });
        let (well, look, wrong) = (Level::Well, Level::Look, Level::Wrong);
        assert_eq!(
            levels(&good, &conditions("True", "True")),
            [well, well, well]
        );
        assert_eq!(
            levels(&all, &conditions("True", "True")),
            [well, well, well]
        );
        assert_eq!(
            levels(&idle, &conditions("True", "True")),
            [well, well, look]
        );
        assert_eq!(
            levels(&good, &conditions("True", "False")),
            [well, look, well]
        );
        assert_eq!(levels(&good, &conditions("False", "False"))[0], wrong);
        assert_eq!(levels(&good, &json!({}))[0], look, "nobody has judged it");
    }
}
