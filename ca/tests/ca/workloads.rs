//! Real workloads on the real clock: they renew, and a root is changed under them.

use std::sync::Arc;
use std::time::Duration;

use sidegate_ca::{Ca, Config, OperationError, RunningCa};
use sidegate_mesh::clock::Clock;
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};
use sidegate_mtls::{
    CaClient, CaClientConfig, CredentialStore, Evidence, IdentityConfig, JoinToken, RenewalPolicy,
    SystemClock, VerifyLimits, WorkloadIdentity, crypto_provider,
};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::harness::until;

fn config(folder: &tempfile::TempDir) -> Config {
    let mut config = Config::new(folder.path().join("ca"));
    config.address = "127.0.0.1:0".parse().unwrap();
    config.metrics_address = "127.0.0.1:0".parse().unwrap();
    config.leaf_lifetime = Duration::from_secs(6);
    config.allow_short_leaf_lifetime = true;
    config
}

fn clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock)
}

async fn join(
    ca: &RunningCa,
    service_account: &str,
    (tracker, cancel): (&TaskTracker, &CancellationToken),
) -> WorkloadIdentity {
    let token = ca.create_token("shop", service_account).await.unwrap();
    let trust_domain: TrustDomain = ca.trust_domain().clone();
    let evidence = Evidence::JoinToken(JoinToken::new(token.token.to_string()));
    let address = ca.address().to_string();
    let client = CaClientConfig::new(&trust_domain, address, evidence).unwrap();
    let client = CaClient::new(client, crypto_provider(), clock());
    let store = CredentialStore::new(VerifyLimits::default(), crypto_provider(), clock());
    let config = IdentityConfig {
        id: SpiffeId::for_workload(&trust_domain, "shop", service_account).unwrap(),
        trust_domain,
        root_file: ca.root_path(),
        state_dir: None,
        renewal: RenewalPolicy::default(),
    };
    let issuer = Arc::new(client);
    let (tracker, cancel) = (tracker, cancel.clone());
    WorkloadIdentity::start(config, issuer, store, tracker, cancel).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_is_changed_under_renewing_workloads_and_none_is_ever_without_trust() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Ca::start(config(&folder), clock()).await.unwrap();
    let (tracker, cancel) = (TaskTracker::new(), CancellationToken::new());
    let mut workloads = Vec::new();
    for name in ["web", "orders", "ledger"] {
        workloads.push(join(&ca, name, (&tracker, &cancel)).await);
    }
    let all = |renewals: u64| {
        let workloads = &workloads;
        move || async move {
            for workload in workloads {
                if workload.store().is_ready() {
                    workload.store().own_svid_is_trusted().unwrap();
                }
            }
            let renewed =
                |workload: &WorkloadIdentity| workload.status().snapshot().renewals_ok >= renewals;
            workloads.iter().all(renewed)
        }
    };
    until("all have joined", all(1)).await;
    let before = std::fs::read(ca.root_path()).unwrap();
    ca.issuer().prepare_root().await.unwrap();
    until("every workload has acknowledged the next root", || async {
        match ca.issuer().activate_root(false).await {
            Ok(_) => true,
            Err(OperationError::Precondition(_)) => false,
            Err(error) => panic!("{error}"),
        }
    })
    .await;
    until("the former root is in use no more", || async {
        match ca.issuer().retire_root(false).await {
            Ok(_) => true,
            Err(OperationError::Precondition(_)) => false,
            Err(error) => panic!("{error}"),
        }
    })
    .await;
    let done = workloads[0].status().snapshot().renewals_ok;
    until("they go on renewing", all(done + 2)).await;
    assert_ne!(std::fs::read(ca.root_path()).unwrap(), before);
    for workload in &workloads {
        let status = workload.status().snapshot();
        assert_eq!(status.renewals_failed, 0, "{status:?}");
        assert_eq!(status.bundles_refused, 0, "{status:?}");
    }
    cancel.cancel();
    tracker.close();
    tracker.wait().await;
    ca.shutdown().await;
}
