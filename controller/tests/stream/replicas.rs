//! Two replicas: either may die.

use std::net::SocketAddr;
use std::sync::mpsc;

use serde_json::Value;
use sidegate_controller::Controller;

use crate::cluster::Cluster;
use crate::mesh::controller_id;
use crate::support::{Bed, LEASES, POLICIES, updates};

fn lease(cluster: &Cluster) -> Option<Value> {
    cluster.get(LEASES, "sidegate-system", "sidegate-controller")
}

fn holder(cluster: &Cluster) -> String {
    let lease = lease(cluster).unwrap_or_default();
    lease["spec"]["holderIdentity"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

async fn live(bed: &Bed, wanted: &str) {
    let what = format!("`{wanted}`");
    bed.cluster
        .wait_for(&what, |cluster| {
            let object = cluster.get(POLICIES, "shop", "all")?;
            let is_current =
                object["status"]["observedGeneration"] == object["metadata"]["generation"];
            (is_current && object["status"]["live"] == wanted).then_some(())
        })
        .await;
}

fn policy_for_all(bed: &Bed, path: &str) {
    let mut policy = crate::support::policy("all", "any", path);
    policy["spec"]["selector"] = serde_json::json!({});
    bed.cluster.put(POLICIES, policy);
}

/// A replica in a runtime of its own, which can be killed.
struct Killable {
    runtime: Option<tokio::runtime::Runtime>,
    address: SocketAddr,
}

impl Killable {
    fn start(bed: &Bed, name: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (config, surroundings) = (Bed::config(), bed.surroundings(name));
        let store = bed.mesh.store(&controller_id());
        let (sender, receiver) = mpsc::channel();
        runtime.spawn(async move {
            let controller = Controller::start_as(config, surroundings, store)
                .await
                .unwrap();
            sender.send(controller.address()).unwrap();
            std::future::pending::<()>().await;
        });
        let address = receiver.recv().unwrap();
        Self {
            runtime: Some(runtime),
            address,
        }
    }

    /// As `kill -9` does: no word to anybody.
    fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_tells_the_leader_and_the_other_one_goes_on_when_either_dies() {
    let bed = Bed::new();
    policy_for_all(&bed, "/1");
    let mut first = Killable::start(&bed, "first");
    bed.cluster
        .wait_for("a leader", |cluster| {
            holder(cluster).starts_with("first/").then_some(())
        })
        .await;
    let mut second = Killable::start(&bed, "second");
    let mut web = bed.sidecar("web", first.address).await;
    let mut orders = bed.sidecar("orders", second.address).await;
    for sidecar in [&mut web, &mut orders] {
        assert_eq!(updates(&sidecar.answer().await), ["all@1"]);
        sidecar.acknowledge("uid-all", 1, "").await;
    }
    live(&bed, "2 of 2").await;
    // The leader dies without a word: the other one takes over, and its sidecars notice nothing.
    first.kill();
    bed.cluster
        .wait_for("another leader", |cluster| {
            holder(cluster).starts_with("second/").then_some(())
        })
        .await;
    assert_eq!(lease(&bed.cluster).unwrap()["spec"]["leaseTransitions"], 1);
    drop(web);
    let mut web = bed.sidecar("web", second.address).await;
    assert_eq!(updates(&web.answer().await), ["all@1"]);
    policy_for_all(&bed, "/2");
    for sidecar in [&mut web, &mut orders] {
        assert_eq!(updates(&sidecar.answer().await), ["all@2"]);
        sidecar.acknowledge("uid-all", 2, "").await;
    }
    live(&bed, "2 of 2").await;
    // A new follower dies: nothing changes for the leader.
    let mut third = Killable::start(&bed, "third");
    drop(orders);
    let mut orders = bed.sidecar("orders", third.address).await;
    assert_eq!(updates(&orders.answer().await), ["all@2"]);
    policy_for_all(&bed, "/3");
    for sidecar in [&mut web, &mut orders] {
        assert_eq!(updates(&sidecar.answer().await), ["all@3"]);
        sidecar.acknowledge("uid-all", 3, "").await;
    }
    live(&bed, "2 of 2").await;
    third.kill();
    drop(orders);
    policy_for_all(&bed, "/4");
    assert_eq!(updates(&web.answer().await), ["all@4"]);
    web.acknowledge("uid-all", 4, "").await;
    live(&bed, "1 of 2").await;
    assert!(holder(&bed.cluster).starts_with("second/"));
    second.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_told_to_stop_ends_its_streams_and_gives_the_lease_back() {
    let bed = Bed::new();
    let first = bed.start("first").await;
    bed.cluster
        .wait_for("a leader", |cluster| {
            holder(cluster).starts_with("first/").then_some(())
        })
        .await;
    let second = bed.start("second").await;
    let mut web = bed.sidecar("web", first.address()).await;
    assert!(web.answer().await.complete);
    let address = first.address();
    let stopping = std::time::Instant::now();
    first.shutdown().await;
    web.end().await.ok();
    assert!(
        stopping.elapsed() < std::time::Duration::from_secs(9),
        "it does not wait for its bound"
    );
    bed.cluster
        .wait_for("another leader", |cluster| {
            holder(cluster).starts_with("second/").then_some(())
        })
        .await;
    assert!(
        tokio::net::TcpStream::connect(address).await.is_err(),
        "nobody listens any more"
    );
    let mut web = bed.sidecar("web", second.address()).await;
    assert!(web.answer().await.complete);
    second.shutdown().await;
}
