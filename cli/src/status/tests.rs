use clap::Parser;
use serde_json::{Value, json};

use super::*;
use crate::kube::fake::Fake;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    status: StatusArgs,
}

fn arguments(line: &str) -> StatusArgs {
    let words = std::iter::once("status").chain(line.split_whitespace());
    Command::try_parse_from(words).unwrap().status
}

/// A policy of `generation` whose status is about `observed`, live on `live` of `of`.
fn policy(name: &str, (generation, observed): (i64, i64), (live, of): (u64, u64)) -> Value {
    let condition = |kind: &str, holds: bool, reason: &str| {
        json!({
            "type": kind, "status": if holds { "True" } else { "False" }, "reason": reason,
            "message": "", "observedGeneration": observed,
        })
    };
    json!({
        "apiVersion": "sidegate.dev/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": { "namespace": "shop", "name": name, "generation": generation },
        "spec": {},
        "status": {
            "observedGeneration": observed,
            "live": format!("{live} of {of}"),
            "sidecars": { "selected": of, "live": live, "refused": 0 },
            "conditions": [
                condition("Accepted", true, "Accepted"),
                condition("Live", live == of, "Acknowledged"),
            ],
        },
    })
}

async fn mesh() -> Fake {
    let fake = Fake::start().await;
    for plural in ["authorizationpolicies", "trafficpolicies"] {
        let mut other = policy("other", (1, 1), (0, 0));
        other["status"]["conditions"][1]["reason"] = "NoSidecars".into();
        other["status"]["conditions"][1]["message"] = "0 of 0: it selects no sidecar".into();
        other["metadata"]["namespace"] = "jobs".into();
        fake.put(plural, other);
    }
    fake.put("authorizationpolicies", policy("orders", (3, 3), (2, 2)));
    fake.put("authorizationpolicies", policy("ledger", (2, 1), (2, 2)));
    let set = json!({
        "metadata": { "namespace": "sidegate-system", "name": "sidegate-ca" },
        "spec": { "replicas": 2, "selector": {}, "serviceName": "x", "template": {} },
        "status": { "replicas": 2, "readyReplicas": 1 },
    });
    fake.put("statefulsets", set);
    fake
}

async fn shown(fake: &Fake, line: &str) -> (Option<u8>, String, String) {
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let code = show(&arguments(line), &fake.cluster(), &mut out, &mut notes).await;
    let mut notes = String::from_utf8(notes).unwrap();
    if let Err(error) = &code {
        notes = format!("{notes}{error:#}");
    }
    (code.ok(), String::from_utf8(out).unwrap(), notes)
}

#[tokio::test]
async fn a_status_about_an_earlier_generation_says_nothing() {
    let fake = mesh().await;
    let (code, out, notes) = shown(&fake, "").await;
    assert_eq!(code, Some(0), "{notes}");
    assert_eq!(
        out,
        "\
Control plane: ca 1/2 ready, controller not there, injector not there

KIND                 NAMESPACE  NAME    GENERATION  ACCEPTED  LIVE    REASON
AuthorizationPolicy  shop       ledger  2           Unknown   -       NotSeenYet
AuthorizationPolicy  shop       orders  3           True      2 of 2  Accepted
"
    );
    let (_, out, _) = shown(&fake, "-A -o json").await;
    let data: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(data["resources"].as_array().unwrap().len(), 4);
    assert_eq!(
        data["controlPlane"][0],
        json!({ "name": "ca", "ready": 1, "replicas": 2 })
    );
    let other = &data["resources"][0];
    assert_eq!(other["message"], "0 of 0: it selects no sidecar");
    let orders = &data["resources"][3];
    assert_eq!(
        (&orders["live"], &orders["liveOn"]),
        (&json!(true), &json!(2))
    );
}

#[tokio::test]
async fn resources_are_named_as_kubectl_names_them() {
    let fake = mesh().await;
    for name in [
        "orders",
        "sgap/orders",
        "authorizationpolicy/orders",
        "authorizationpolicies.sidegate.dev/orders",
    ] {
        let (_, out, _) = shown(&fake, name).await;
        assert_eq!(out.lines().count(), 4, "{name}\n{out}");
    }
    let (code, _, notes) = shown(&fake, "sgtp/orders ledger").await;
    assert_eq!(code, None);
    assert_eq!(notes, "sgtp/orders not there, in the namespace shop");
    assert!("pod/orders".parse::<Named>().is_err());
}

#[tokio::test]
async fn without_the_definitions_it_says_to_install() {
    let fake = Fake::start().await;
    let (code, _, notes) = shown(&fake, "").await;
    assert_eq!(code, None);
    assert!(
        notes.contains("install it first: `sidegate install | kubectl apply -f -`"),
        "{notes}"
    );
}

#[tokio::test]
async fn waiting_ends_when_the_present_generation_is_live_everywhere() {
    let fake = mesh().await;
    let script = async {
        fake.asked("authorizationpolicies?&watch=true").await;
        fake.put("authorizationpolicies", policy("ledger", (2, 2), (1, 2)));
        fake.put("authorizationpolicies", policy("ledger", (3, 2), (2, 2)));
        fake.put("authorizationpolicies", policy("new", (1, 1), (0, 0)));
        fake.put("authorizationpolicies", policy("ledger", (3, 3), (2, 2)));
    };
    let ((code, out, notes), ()) = tokio::join!(shown(&fake, "ledger orders new --wait"), script);
    assert_eq!(code, Some(0), "{notes}");
    assert!(
        out.contains("ledger  3           True      2 of 2"),
        "{out}"
    );
    assert!(notes.contains("waiting for new: not there"), "{notes}");
}

#[tokio::test]
async fn a_wait_that_ends_without_success_says_what_is_missing() {
    let fake = mesh().await;
    let mut refused = policy("ledger", (2, 2), (0, 2));
    refused["status"]["conditions"][0] = json!({
        "type": "Accepted", "status": "False", "reason": "Invalid",
        "message": "spec.rules[0].from: unknown field `x`", "observedGeneration": 2,
    });
    fake.put("authorizationpolicies", refused);
    let (code, out, notes) = shown(&fake, "ledger sgtp/orders --wait --timeout 300ms").await;
    assert_eq!(code, Some(1));
    assert!(
        out.contains("False     0 of 2  Invalid: spec.rules[0].from"),
        "{out}"
    );
    assert!(
        notes.contains("sidegate: not live everywhere after 300ms:"),
        "{notes}"
    );
    assert!(
        notes.contains("sidegate: sgtp/orders: not there"),
        "{notes}"
    );
    let words = "AuthorizationPolicy shop/ledger generation 2: accepted False, live 0 of 2, Invalid: spec.rules[0].from";
    assert!(notes.contains(words), "{notes}");
}
