//! Against a real API server, when `SIDEGATE_E2E` says so and `KUBECONFIG` names one; else these say
//! SKIPPED.
//!
//! The sidecar's pod is an object that no node runs, with an address of this machine: everything
//! else is as in a cluster.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use sidegate_controller::{Controller, Surroundings, crd};
use sidegate_mesh::resource::Kind;
use sidegate_mtls::SystemClock;

use crate::mesh::{Mesh, controller_id, id};
use crate::support::{Bed, Sidecar, source_of, updates};

const NAMESPACE: &str = "controller-e2e";

struct Real {
    client: Client,
    policies: Api<DynamicObject>,
    definitions: Api<DynamicObject>,
}

impl Real {
    fn of(client: &Client) -> Self {
        let resource = |group: &str, version: &str, kind: &str, plural: &str| ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version: format!("{group}/{version}"),
            kind: kind.to_owned(),
            plural: plural.to_owned(),
        };
        let kind = Kind::AuthorizationPolicy;
        let policies = resource(crd::GROUP, crd::VERSION, kind.as_str(), crd::plural(kind));
        let (group, plural) = ("apiextensions.k8s.io", "customresourcedefinitions");
        let definitions = resource(group, "v1", "CustomResourceDefinition", plural);
        Self {
            policies: Api::namespaced_with(client.clone(), NAMESPACE, &policies),
            definitions: Api::all_with(client.clone(), &definitions),
            client: client.clone(),
        }
    }

    async fn new() -> Option<Self> {
        if std::env::var_os("SIDEGATE_E2E").is_none() || std::env::var_os("KUBECONFIG").is_none() {
            println!("SKIPPED: set SIDEGATE_E2E and KUBECONFIG to try a real API server");
            return None;
        }
        let real = Self::of(&Client::try_default().await.unwrap());
        let first = crd::definition_name(Kind::AuthorizationPolicy);
        if real.definitions.get_opt(&first).await.unwrap().is_some() {
            println!("SKIPPED: Sidegate is installed there already");
            return None;
        }
        real.install().await;
        Some(real)
    }

    async fn install(&self) {
        for crd in crd::crds() {
            let crd: DynamicObject = serde_json::from_value(crd).unwrap();
            self.definitions
                .create(&PostParams::default(), &crd)
                .await
                .unwrap();
        }
        for kind in Kind::ALL {
            self.established(&crd::definition_name(kind)).await;
        }
        let namespace = json!({ "metadata": { "name": NAMESPACE, "labels": { "sidegate.dev/inject": "enabled" } } });
        let namespace: Namespace = serde_json::from_value(namespace).unwrap();
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces
            .create(&PostParams::default(), &namespace)
            .await
            .unwrap();
        self.pod("web").await;
    }

    async fn established(&self, name: &str) {
        loop {
            let found = self.definitions.get(name).await.unwrap();
            let conditions = found.data["status"]["conditions"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            if conditions
                .iter()
                .any(|one| one["type"] == "Established" && one["status"] == "True")
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A pod that no scheduler and no node looks after.
    async fn pod(&self, app: &str) -> String {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        let accounts = Api::<k8s_openapi::api::core::v1::ServiceAccount>::namespaced(
            self.client.clone(),
            NAMESPACE,
        );
        let account = serde_json::from_value(json!({ "metadata": { "name": app } })).unwrap();
        accounts
            .create(&PostParams::default(), &account)
            .await
            .unwrap();
        let container = |name: &str| json!({ "name": name, "image": "kube.local/busybox:1" });
        let mut sidecar = container("sidegate-proxy");
        sidecar["restartPolicy"] = json!("Always");
        let pod = json!({
            "metadata": { "name": format!("{app}-1"), "labels": { "app": app }, "annotations": { "sidegate.dev/injected": "test" } },
            "spec": { "schedulerName": "nobody", "serviceAccountName": app, "containers": [container("app")], "initContainers": [sidecar] },
        });
        let made = pods
            .create(
                &PostParams::default(),
                &serde_json::from_value(pod).unwrap(),
            )
            .await
            .unwrap();
        let address = source_of(app).to_string();
        let status = json!({ "status": { "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }] } });
        pods.patch_status(
            &format!("{app}-1"),
            &PatchParams::default(),
            &Patch::Merge(&status),
        )
        .await
        .unwrap();
        made.metadata.uid.unwrap()
    }

    async fn apply(&self, policy: &Value) {
        let name = policy["metadata"]["name"].as_str().unwrap();
        let parameters = PatchParams::apply("test").force();
        self.policies
            .patch(name, &parameters, &Patch::Apply(policy))
            .await
            .unwrap();
    }

    async fn status(&self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let found = self.policies.get(name).await.unwrap();
            let status = found.data["status"].clone();
            if wanted(&status) && status["observedGeneration"] == json!(found.metadata.generation) {
                return status;
            }
            assert!(started.elapsed() < crate::PATIENCE, "{status}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn clean(self) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces
            .delete(NAMESPACE, &DeleteParams::background())
            .await
            .unwrap();
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        pods.delete("web-1", &DeleteParams::default().grace_period(0))
            .await
            .ok();
        for kind in Kind::ALL {
            self.definitions
                .delete(&crd::definition_name(kind), &DeleteParams::default())
                .await
                .ok();
        }
    }
}

fn policy(path: &str) -> Value {
    let mut policy = crate::support::policy("mine", "web", path);
    policy["metadata"]["namespace"] = json!(NAMESPACE);
    policy
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_real_api_server_a_policy_is_heard_within_a_second_and_its_status_written() {
    let Some(real) = Real::new().await else {
        return;
    };
    // What was made is removed again, also when something does not hold.
    let outcome = tokio::spawn(try_real(real.client.clone(), Mesh::new())).await;
    real.clean().await;
    outcome.unwrap();
}

async fn try_real(client: Client, mesh: Mesh) {
    let real = Real::of(&client);
    real.apply(&policy("/1")).await;
    let mut config = Bed::config();
    NAMESPACE.clone_into(&mut config.namespace);
    let surroundings = Surroundings {
        client: client.clone(),
        name: "test".to_owned(),
        address: None,
        clock: std::sync::Arc::new(SystemClock),
    };
    let controller = Controller::start_as(config, surroundings, mesh.store(&controller_id()))
        .await
        .unwrap();
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let uid = pods.get("web-1").await.unwrap().metadata.uid.unwrap();
    let hello = sidegate_api::control::Hello {
        version: "test".to_owned(),
        pod: "web-1".to_owned(),
        pod_uid: uid,
    };
    let store = mesh.store(&id(NAMESPACE, "web"));
    let first = sidegate_api::control::watch_request::Message::Hello(hello);
    let mut web = Sidecar::begin(&store, source_of("web"), controller.address(), first)
        .await
        .unwrap();
    let answer = web.answer().await;
    assert_eq!(updates(&answer), ["mine@1"]);
    let uid = answer.updated[0].reference.as_ref().unwrap().uid.clone();
    let mut slowest = Duration::ZERO;
    for number in 2..=20 {
        let applied = Instant::now();
        real.apply(&policy(&format!("/{number}"))).await;
        assert_eq!(updates(&web.answer().await), [format!("mine@{number}")]);
        slowest = slowest.max(applied.elapsed());
    }
    println!("slowest from apply to heard: {slowest:?}");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    web.acknowledge(&uid, 20, "").await;
    real.status("mine", |status| status["live"] == "1 of 1")
        .await;
    // Without the webhook, a misspelt field is kept by the API server and refused here.
    let mut misspelt = policy("/21");
    misspelt["spec"]["rules"][0]["form"] = json!([{ "anyone": {} }]);
    real.apply(&misspelt).await;
    let refused = real
        .status("mine", |status| {
            status["conditions"][0]["status"] == "False"
        })
        .await;
    let message = refused["conditions"][0]["message"].as_str().unwrap();
    assert!(
        message.starts_with("spec.rules[0].form: unknown field"),
        "{message}"
    );
    web.subscribe("10.96.0.1:443").await;
    let answer = web.answer().await;
    let external = Some(sidegate_api::control::destination::Kind::External(
        sidegate_api::control::External::default(),
    ));
    assert_eq!(answer.destinations[0].kind, external);
    let events: Api<k8s_openapi::api::events::v1::Event> =
        Api::namespaced(client.clone(), NAMESPACE);
    let started = Instant::now();
    while !events
        .list(&kube::api::ListParams::default())
        .await
        .unwrap()
        .items
        .iter()
        .any(|event| event.reason.as_deref() == Some("Refused"))
    {
        assert!(started.elapsed() < crate::PATIENCE, "no event");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    controller.shutdown().await;
}
