//! One replica and its sidecars.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use sidegate_api::control::replica_client::ReplicaClient;
use sidegate_api::control::watch_request::Message;
use sidegate_api::control::{Acknowledge, ReportRequest, Subscribe, destination};
use sidegate_mesh::resource::Kind;
use sidegate_mtls::Trust;
use tonic::Code;

use crate::mesh::{Mesh, connect, controller_id, id};
use crate::support::{
    Bed, DEFINITIONS, PODS, POLICIES, Sidecar, TRAFFIC, get, metrics_say, pod, policy, source_of,
    updates,
};

#[tokio::test]
async fn a_sidecar_hears_its_policies_and_each_change_within_a_second() {
    let bed = Bed::new();
    bed.policy("mine", "web", "/1");
    bed.policy("other", "orders", "/1");
    let controller = bed.start("a").await;
    let mut web = bed.sidecar("web", controller.address()).await;
    let first = web.answer().await;
    assert_eq!(
        (updates(&first), first.complete),
        (vec!["mine@1".to_owned()], true)
    );
    let facts = first.workload.unwrap();
    assert_eq!(
        (facts.labels["app"].as_str(), facts.enforcement.as_str()),
        ("web", "enforce")
    );
    let applied = Instant::now();
    bed.policy("mine", "web", "/2");
    assert_eq!(updates(&web.answer().await), ["mine@2"]);
    assert!(
        applied.elapsed() < Duration::from_secs(1),
        "{:?}",
        applied.elapsed()
    );
    bed.cluster.delete(POLICIES, "shop", "mine");
    assert_eq!(updates(&web.answer().await), ["-mine"]);
    let mut leaving = pod("web", "127.0.0.11");
    leaving["metadata"]["deletionTimestamp"] = json!("2026-11-24T00:00:00Z");
    bed.cluster.put(PODS, leaving);
    assert!(web.answer().await.workload.unwrap().terminating);
    bed.cluster.delete(PODS, "shop", "web-1");
    assert_eq!(web.end().await.unwrap_err().code(), Code::NotFound);
    controller.shutdown().await;
}

#[tokio::test]
async fn a_sidecar_hears_of_the_destinations_that_it_calls() {
    let bed = Bed::new();
    let controller = bed.start("a").await;
    let mut web = bed.sidecar("web", controller.address()).await;
    web.answer().await;
    web.subscribe("127.0.0.12:8080").await;
    let answer = web.answer().await;
    let Some(destination::Kind::Meshed(meshed)) = &answer.destinations[0].kind else {
        panic!("{answer:?}")
    };
    assert_eq!(
        meshed.endpoints[0].spiffe_id,
        "spiffe://cluster.local/ns/shop/sa/orders"
    );
    bed.cluster.delete(PODS, "shop", "orders-1");
    let answer = web.answer().await;
    assert!(
        matches!(
            answer.destinations[0].kind,
            Some(destination::Kind::Unknown(_))
        ),
        "{answer:?}"
    );
    web.subscribe("no destination at all").await;
    assert_eq!(web.end().await.unwrap_err().code(), Code::InvalidArgument);
    controller.shutdown().await;
}

#[tokio::test]
async fn nothing_is_streamed_before_every_kind_was_listed() {
    let bed = Bed::new();
    bed.policy("mine", "web", "/1");
    bed.cluster.fail(TRAFFIC, true);
    let controller = bed.start("a").await;
    let mut web = bed.sidecar("web", controller.address()).await;
    let at = controller.metrics_address();
    let waiting = async {
        loop {
            let (status, text) = get(at, "/readyz").await;
            assert_eq!(status, 503);
            if text.ends_with("not listed yet: trafficpolicies\n") {
                return text;
            }
            tokio::task::yield_now().await;
        }
    };
    let missing = tokio::time::timeout(crate::PATIENCE, waiting)
        .await
        .unwrap();
    assert!(web.is_silent().await, "{missing}");
    bed.cluster.fail(TRAFFIC, false);
    let first = web.answer().await;
    assert!(first.complete && updates(&first) == ["mine@1"]);
    assert_eq!(get(at, "/readyz").await.0, 200);
    let (_, metrics) = get(at, "/metrics").await;
    assert!(
        metrics.contains("sidegate_controller_synced{kind=\"pods\"} 1"),
        "{metrics}"
    );
    assert!(
        metrics.contains("sidegate_controller_sidecars 1"),
        "{metrics}"
    );
    assert_eq!(get(at, "/livez").await.0, 200);
    controller.shutdown().await;
}

#[tokio::test]
async fn whoever_is_not_that_pod_is_refused() {
    let bed = Bed::new();
    let controller = bed.start("a").await;
    let at = controller.address();
    let (web, orders) = (source_of("web"), source_of("orders"));
    let refused = async |store: Arc<_>, source, app: &str| {
        let sidecar = Sidecar::hello(&store, source, at, app).await;
        match sidecar {
            Ok(mut sidecar) => sidecar.end().await.unwrap_err().code(),
            Err(status) => status.code(),
        }
    };
    let as_web = bed.mesh.store(&id("shop", "web"));
    assert_eq!(
        refused(Arc::clone(&as_web), web, "orders").await,
        Code::PermissionDenied,
        "another's pod"
    );
    assert_eq!(
        refused(Arc::clone(&as_web), orders, "web").await,
        Code::PermissionDenied,
        "another address"
    );
    let elsewhere = bed.mesh.store(&id("plain", "web"));
    assert_eq!(
        refused(elsewhere, web, "web").await,
        Code::PermissionDenied,
        "another namespace"
    );
    let mut re_created = pod("web", "127.0.0.11");
    re_created["metadata"]["uid"] = json!("uid-new");
    bed.cluster.put(PODS, re_created);
    assert_eq!(
        refused(as_web, web, "web").await,
        Code::PermissionDenied,
        "the pod of that name is another"
    );
    // A certificate of another CA is not even heard.
    let stranger = Mesh::new().store(&id("shop", "web"));
    stranger.publish_trust(bed.mesh.trust(2)).unwrap();
    let outcome = Sidecar::hello(&stranger, web, at, "web").await;
    let outcome = match outcome {
        Ok(mut sidecar) => sidecar.end().await.unwrap_err(),
        Err(status) => status,
    };
    assert_ne!(outcome.code(), Code::PermissionDenied, "{outcome:?}");
    let (_, metrics) = get(controller.metrics_address(), "/metrics").await;
    assert!(
        metrics.contains("hellos_refused_total{reason=\"identity\"}"),
        "{metrics}"
    );
    assert!(
        metrics.contains("handshake_failures_total{reason="),
        "{metrics}"
    );
    controller.shutdown().await;
}

#[tokio::test]
async fn a_stream_begins_with_one_hello() {
    let bed = Bed::new();
    let controller = bed.start("a").await;
    let store = bed.mesh.store(&id("shop", "web"));
    let first = Message::Subscribe(Subscribe {
        destination: "10.0.0.1:80".to_owned(),
    });
    let mut web = Sidecar::begin(&store, source_of("web"), controller.address(), first)
        .await
        .unwrap();
    assert_eq!(web.end().await.unwrap_err().code(), Code::InvalidArgument);
    let mut web = bed.sidecar("web", controller.address()).await;
    web.answer().await;
    web.say(Message::Hello(sidegate_api::control::Hello::default()))
        .await;
    assert_eq!(web.end().await.unwrap_err().code(), Code::InvalidArgument);
    controller.shutdown().await;
}

#[tokio::test]
async fn a_pod_that_the_watch_has_not_shown_yet_is_waited_for() {
    let bed = Bed::new();
    bed.cluster.delete(PODS, "shop", "web-1");
    let controller = bed.start("a").await;
    let mut web = bed.sidecar("web", controller.address()).await;
    assert!(web.is_silent().await);
    bed.pod("web", "127.0.0.11");
    assert!(web.answer().await.complete);
    bed.cluster.delete(PODS, "shop", "orders-1");
    let mut nobody = bed.sidecar("orders", controller.address()).await;
    assert_eq!(
        nobody.end().await.unwrap_err().code(),
        Code::PermissionDenied,
        "not for ever"
    );
    controller.shutdown().await;
}

#[tokio::test]
async fn a_slow_reader_gets_the_latest_state_and_not_each_that_there_was() {
    const CHANGES: usize = 400;
    let bed = Bed::new();
    let controller = bed.start("a").await;
    let mut web = bed.sidecar("web", controller.address()).await;
    assert!(web.answer().await.complete);
    let long = "x".repeat(1_000);
    for change in 1..=CHANGES {
        let mut changed = policy("mine", "web", "/x");
        let paths: Vec<String> = (0..40)
            .map(|number| format!("/{change}/{number}/{long}"))
            .collect();
        changed["spec"]["rules"][0]["to"][0]["http"]["paths"] = json!(paths);
        bed.cluster.put(POLICIES, changed);
        tokio::task::yield_now().await;
    }
    let at = controller.metrics_address();
    let heard = format!(
        "sidegate_controller_watch_events_total{{kind=\"authorizationpolicies\"}} {}",
        CHANGES + 2
    );
    metrics_say(at, &heard).await;
    let mut responses = 0;
    loop {
        let answer = web.answer().await;
        responses += 1;
        if updates(&answer) == [format!("mine@{CHANGES}")] {
            break;
        }
    }
    assert!(
        responses < CHANGES / 2,
        "{responses} responses for {CHANGES} changes"
    );
    controller.shutdown().await;
}

#[tokio::test]
async fn a_definition_that_vanishes_is_a_lost_source_and_not_an_empty_one() {
    let bed = Bed::new();
    bed.policy("mine", "web", "/1");
    bed.policy("second", "web", "/1");
    let controller = bed.start("a").await;
    let mut web = bed.sidecar("web", controller.address()).await;
    assert_eq!(web.answer().await.updated.len(), 2);
    // `kubectl delete crd`: the definition is marked, then its objects go, then it goes itself.
    let name = "authorizationpolicies.sidegate.dev";
    let mut leaving = bed.cluster.get(DEFINITIONS, "", name).unwrap();
    leaving["metadata"]["deletionTimestamp"] = json!("2026-11-24T00:00:00Z");
    bed.cluster.put(DEFINITIONS, leaving.clone());
    bed.cluster.delete(POLICIES, "shop", "mine");
    let at = controller.metrics_address();
    let lost = "sidegate_controller_source_lost{kind=\"authorizationpolicies\"} 1";
    metrics_say(at, lost).await;
    assert!(web.is_silent().await, "nothing is taken away");
    let mut again = bed.sidecar("web", controller.address()).await;
    assert_eq!(
        again.answer().await.updated.len(),
        2,
        "also for a sidecar that comes now"
    );
    // The same deletion with the definition there is one.
    leaving["metadata"]
        .as_object_mut()
        .unwrap()
        .remove("deletionTimestamp");
    bed.cluster.put(DEFINITIONS, leaving);
    bed.cluster.delete(POLICIES, "shop", "second");
    assert_eq!(updates(&again.answer().await), ["-second"]);
    controller.shutdown().await;
}

#[tokio::test]
async fn a_stream_ends_with_the_certificates_that_it_stands_on() {
    let bed = Bed::new();
    let own = bed.mesh.store(&controller_id());
    let surroundings = bed.surroundings("a");
    let controller =
        sidegate_controller::Controller::start_as(Bed::config(), surroundings, Arc::clone(&own));
    let controller = controller.await.unwrap();
    let at = controller.address();
    let short = bed
        .mesh
        .store_for(&id("shop", "web"), Duration::from_secs(3));
    let mut web = Sidecar::hello(&short, source_of("web"), at, "web")
        .await
        .unwrap();
    assert!(web.answer().await.complete);
    assert_eq!(
        web.end().await.unwrap_err().code(),
        Code::Unauthenticated,
        "at its end"
    );
    let mut web = bed.sidecar("web", at).await;
    assert!(web.answer().await.complete);
    let other: Trust = Mesh::new().trust(2);
    own.publish_trust(other).unwrap();
    assert_eq!(
        web.end().await.unwrap_err().code(),
        Code::Unauthenticated,
        "when its root is removed"
    );
    controller.shutdown().await;
}

#[tokio::test]
async fn only_replicas_report_and_only_to_the_leader_of_that_term() {
    let bed = Bed::new();
    let controller = bed.start("a").await;
    let report = async |store: &Arc<_>, leader: &str, term: i32| {
        let channel = connect(store, source_of("web"), controller.address())
            .await
            .unwrap();
        let request = ReportRequest {
            leader: leader.to_owned(),
            term,
            acknowledged: Vec::new(),
        };
        let requests = tokio_stream::iter([request]);
        let answers = ReplicaClient::new(channel).report(requests).await;
        match answers {
            Ok(answers) => answers
                .into_inner()
                .message()
                .await
                .map(drop)
                .map_err(|status| status.code()),
            Err(status) => Err(status.code()),
        }
    };
    let lease = bed.cluster.wait_for("a leader", |cluster| {
        cluster.get(
            crate::support::LEASES,
            "sidegate-system",
            "sidegate-controller",
        )
    });
    let holder = lease.await["spec"]["holderIdentity"]
        .as_str()
        .unwrap()
        .to_owned();
    let as_web = bed.mesh.store(&id("shop", "web"));
    assert_eq!(
        report(&as_web, &holder, 0).await,
        Err(Code::PermissionDenied)
    );
    let replica = bed.mesh.store(&controller_id());
    assert_eq!(
        report(&replica, &holder, 7).await,
        Err(Code::FailedPrecondition)
    );
    assert_eq!(
        report(&replica, "another/127.0.0.1:1", 0).await,
        Err(Code::FailedPrecondition)
    );
    assert_eq!(report(&replica, &holder, 0).await, Ok(()));
    controller.shutdown().await;
}

#[tokio::test]
async fn status_and_events_say_what_became_of_a_policy() {
    let bed = Bed::new();
    bed.policy("mine", "web", "/1");
    bed.policy("nobody", "nobody", "/1");
    let controller = bed.start("a").await;
    let mut web = bed.sidecar("web", controller.address()).await;
    let uid = web.answer().await.updated[0]
        .reference
        .as_ref()
        .unwrap()
        .uid
        .clone();
    let status = async |name: &'static str, wanted: &'static [(&str, &str, &str)]| {
        let found = bed.cluster.wait_for(name, |cluster| {
            let object = cluster.get(POLICIES, "shop", name)?;
            let status = object.get("status")?.clone();
            let conditions = status["conditions"].as_array()?;
            let is_so = |(name, value, reason): &(&str, &str, &str)| {
                conditions.iter().any(|one| {
                    one["type"] == *name && one["status"] == *value && one["reason"] == *reason
                })
            };
            let is_current = status["observedGeneration"] == object["metadata"]["generation"];
            (is_current && wanted.iter().all(is_so)).then_some(status)
        });
        found.await
    };
    let pending = status(
        "mine",
        &[
            ("Accepted", "True", "Accepted"),
            ("Live", "False", "Pending"),
        ],
    )
    .await;
    assert_eq!(pending["live"], "0 of 1");
    let nobody = status("nobody", &[("Live", "True", "NoSidecars")]).await;
    assert_eq!(nobody["live"], "0 of 0");
    web.acknowledge(&uid, 1, "").await;
    let live = status("mine", &[("Live", "True", "Live")]).await;
    assert_eq!(
        live["sidecars"],
        json!({ "selected": 1, "live": 1, "refused": 0 })
    );
    let accepted =
        |status: &serde_json::Value| status["conditions"][0]["lastTransitionTime"].clone();
    assert_eq!(
        accepted(&live),
        accepted(&pending),
        "what did not change keeps its time"
    );
    let mut broken = policy("mine", "web", "/2");
    broken["spec"]["rules"][0]["form"] = json!([]);
    bed.cluster.put(POLICIES, broken);
    let refused = status(
        "mine",
        &[
            ("Accepted", "False", "Invalid"),
            ("Live", "False", "NotAccepted"),
        ],
    )
    .await;
    let message = refused["conditions"][0]["message"].as_str().unwrap();
    assert!(
        message.starts_with("spec.rules[0].form: unknown field") && message.contains("from"),
        "{message}"
    );
    assert!(web.is_silent().await, "the last good version stays");
    let event = bed.cluster.wait_for("an event", |cluster| {
        cluster
            .list("apis/events.k8s.io/v1/events")
            .into_iter()
            .find(|event| event["reason"] == "Refused")
    });
    let event = event.await;
    assert_eq!(
        event["regarding"]["kind"],
        Kind::AuthorizationPolicy.as_str()
    );
    assert!(
        event["note"]
            .as_str()
            .unwrap()
            .contains("spec.rules[0].form"),
        "{event}"
    );
    bed.policy("mine", "web", "/3");
    assert_eq!(updates(&web.answer().await), ["mine@3"]);
    web.say(Message::Acknowledge(Acknowledge {
        uid,
        generation: 3,
        refusal: "no such field here".to_owned(),
    }))
    .await;
    let refused = status(
        "mine",
        &[
            ("Accepted", "True", "Accepted"),
            ("Live", "False", "Refused"),
        ],
    )
    .await;
    assert!(
        refused["conditions"][1]["message"]
            .as_str()
            .unwrap()
            .contains("shop/web-1: no such field here")
    );
    controller.shutdown().await;
}

#[tokio::test]
async fn a_status_is_not_written_more_often_than_once_an_interval() {
    let bed = Bed::new();
    bed.policy("mine", "web", "/0");
    let controller = bed.start("a").await;
    let written = "authorizationpolicies/mine/status";
    bed.cluster
        .wait_for("a status", |cluster| {
            (cluster.writes(written) > 0).then_some(())
        })
        .await;
    let (started, before) = (Instant::now(), bed.cluster.writes(written));
    for change in 1..200 {
        bed.policy("mine", "web", &format!("/{change}"));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bed.cluster
        .wait_for("the last status", |cluster| {
            let object = cluster.get(POLICIES, "shop", "mine")?;
            (object["status"]["observedGeneration"] == object["metadata"]["generation"])
                .then_some(())
        })
        .await;
    let writes = bed.cluster.writes(written) - before;
    let intervals = started.elapsed().as_millis() / 300;
    assert!(
        writes as u128 <= intervals + 1,
        "{writes} writes in {intervals} intervals"
    );
    controller.shutdown().await;
}
