//! Who a service account token speaks for: a live pod, looked at anew each time.
//!
//! token's own words › limit per address › TokenReview › limit per pod › the pod and its service
//! account, read from the API server's store and not from a cache
//!
//! The address that the caller comes from must be one of its pod's. Two cases are let pass: a pod
//! so young that its addresses are not written down yet, which its sidecar is when it asks for the
//! first time; and a network that hides the addresses of pods, where `checkSourceAddress: false`
//! says so.
//!
//! Invariant: every check that is left out, or cannot be made, refuses; each refusal has its code.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::api::PostParams;
use kube::{Api, Client};
use sidegate_mesh::clock::Clock;
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::Code;

use crate::config::{Kubernetes, Limits};
use crate::issuance::{Attested, Refusal};
use crate::kubernetes::{ApiError, ask, token};
use crate::ledger::{Evidence, PodEvidence};
use crate::limits::Buckets;
use crate::registry::CONTROL_PLANE;

const USER_PREFIX: &str = "system:serviceaccount:";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
/// The label by which a pod leaves the mesh.
const INJECT: &str = "sidegate.dev/inject";
/// The CA's own service account; its identity is never given away.
const CA: &str = "sidegate-ca";
/// Service accounts of the control plane whose certificates carry DNS names, since the API server
/// calls them as webhooks.
const WEBHOOKS: [&str; 1] = ["sidegate-injector"];

/// Addresses, and pods, that are remembered for their limits.
const REMEMBERED_MAX: usize = 65_536;

/// Why a service account token proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unattested {
    /// It is longer than any token of Kubernetes.
    #[error(
        "the token has {bytes} bytes, more than a service account token has; mount a projected one"
    )]
    Size {
        /// Its length.
        bytes: usize,
    },
    /// It is no JWT.
    #[error("this is no service account token; mount a projected one")]
    Malformed,
    /// It has neither end nor audience.
    #[error("this is a token from a Secret, without audience and end; mount a projected one")]
    Legacy,
    /// It is for somebody else.
    #[error(
        "the token is not for the audience {expected}; project one with `audience: {expected}`"
    )]
    Audience {
        /// What it should be for.
        expected: String,
    },
    /// Its time is over.
    #[error("the token has expired; read the projected file again, which kubelet renews")]
    Expired,
    /// The API server does not know it.
    #[error(
        "the Kubernetes API does not accept the token: it is forged, expired, or its pod or service account is gone"
    )]
    Rejected,
    /// The API server does not say that it looked at the audience.
    #[error(
        "the Kubernetes API did not confirm the audience {expected}; `sidegate check` says which versions do"
    )]
    AudienceNotConfirmed {
        /// What it should have confirmed.
        expected: String,
    },
    /// It is a person's, or a node's.
    #[error("the token is not a service account's; mount a projected one")]
    NotAServiceAccount,
    /// It was made without a pod, with `kubectl create token` for example.
    #[error("the token is not bound to a pod; mount a projected one instead of making it by hand")]
    Unbound,
    /// The pod is not there.
    #[error("the token's pod {pod} is gone")]
    PodGone {
        /// Namespace and name.
        pod: String,
    },
    /// Another pod has its name now.
    #[error("the token's pod {pod} is gone, and another one has its name")]
    PodReplaced {
        /// Namespace and name.
        pod: String,
    },
    /// The pod runs as somebody else.
    #[error("the token's pod {pod} does not run as the token's service account")]
    PodServiceAccount {
        /// Namespace and name.
        pod: String,
    },
    /// The pod is being deleted.
    #[error("the token's pod {pod} is being deleted; its certificate lasts until its end")]
    PodTerminating {
        /// Namespace and name.
        pod: String,
    },
    /// The pod has run to its end.
    #[error("the token's pod {pod} has finished")]
    PodFinished {
        /// Namespace and name.
        pod: String,
    },
    /// The pod is on no node, or on another one.
    #[error("the token's pod {pod} is not on the node that the token names")]
    PodNode {
        /// Namespace and name.
        pod: String,
    },
    /// The pod has left the mesh by its label.
    #[error(
        "the pod {pod} says `sidegate.dev/inject: disabled`, so it has no identity; remove the label"
    )]
    PodOptedOut {
        /// Namespace and name.
        pod: String,
    },
    /// The token comes from somewhere else.
    #[error(
        "the token of pod {pod} came from {address}, which is none of its addresses; if the network hides them, say `kubernetes.checkSourceAddress: false` in the CA's configuration"
    )]
    SourceAddress {
        /// Namespace and name.
        pod: String,
        /// From where it came.
        address: IpAddr,
    },
    /// There is no such service account any more.
    #[error("the token's service account is gone")]
    ServiceAccountGone,
    /// It was made anew, and inherits nothing.
    #[error("the token's service account was deleted and made again; restart the pod")]
    ServiceAccountReplaced,
    /// Namespace and name do not make an identity.
    #[error("{0} cannot be an identity; choose another name for the service account")]
    Name(String),
    /// The CA's own name is never given away.
    #[error("the CA's own identity is not issued to anybody; use another service account")]
    CaItself,
    /// Too many tokens from one place.
    #[error("too many tokens from {address}; try again in {} s", wait.as_secs() + 1)]
    AddressLimit {
        /// From where.
        address: IpAddr,
        /// How long it takes.
        wait: Duration,
    },
    /// Too many certificates for one pod.
    #[error("too many certificates for pod {pod}; try again in {} s", wait.as_secs() + 1)]
    PodLimit {
        /// Namespace and name.
        pod: String,
        /// How long it takes.
        wait: Duration,
    },
    /// As many tokens are under review as there may be.
    #[error("too many tokens are being reviewed; try again")]
    Busy,
    /// The API server does not answer.
    #[error("{0}; the certificate in use lasts until its end")]
    Api(String),
}

impl Unattested {
    /// The reason's code, as log and metrics show it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Size { .. } => "token_size",
            Self::Malformed => "token_malformed",
            Self::Legacy => "token_legacy",
            Self::Audience { .. } => "token_audience",
            Self::Expired => "token_expired",
            Self::Rejected => "token_rejected",
            Self::AudienceNotConfirmed { .. } => "token_audience_not_confirmed",
            Self::NotAServiceAccount => "token_not_a_service_account",
            Self::Unbound => "token_unbound",
            Self::PodGone { .. } => "pod_gone",
            Self::PodReplaced { .. } => "pod_replaced",
            Self::PodServiceAccount { .. } => "pod_service_account",
            Self::PodTerminating { .. } => "pod_terminating",
            Self::PodFinished { .. } => "pod_finished",
            Self::PodNode { .. } => "pod_node",
            Self::PodOptedOut { .. } => "pod_opted_out",
            Self::SourceAddress { .. } => "source_address",
            Self::ServiceAccountGone => "service_account_gone",
            Self::ServiceAccountReplaced => "service_account_replaced",
            Self::Name(_) => "identity_name",
            Self::CaItself => "identity_of_the_ca",
            Self::AddressLimit { .. } => "limit_address",
            Self::PodLimit { .. } => "limit_pod",
            Self::Busy => "reviews_max",
            Self::Api(_) => "kubernetes_api",
        }
    }

    /// The gRPC code; every variant is listed so a new one must choose.
    pub(crate) fn grpc(&self) -> Code {
        match self {
            Self::Size { .. }
            | Self::Malformed
            | Self::Legacy
            | Self::Audience { .. }
            | Self::Expired
            | Self::Rejected
            | Self::AudienceNotConfirmed { .. }
            | Self::NotAServiceAccount
            | Self::Unbound
            | Self::PodGone { .. }
            | Self::PodReplaced { .. }
            | Self::PodServiceAccount { .. }
            | Self::PodNode { .. }
            | Self::SourceAddress { .. }
            | Self::ServiceAccountGone
            | Self::ServiceAccountReplaced => Code::Unauthenticated,
            Self::PodTerminating { .. }
            | Self::PodFinished { .. }
            | Self::PodOptedOut { .. }
            | Self::Name(_)
            | Self::CaItself => Code::PermissionDenied,
            Self::AddressLimit { .. } | Self::PodLimit { .. } => Code::ResourceExhausted,
            Self::Busy | Self::Api(_) => Code::Unavailable,
        }
    }
}

impl From<ApiError> for Unattested {
    fn from(error: ApiError) -> Self {
        Self::Api(error.to_string())
    }
}

/// What a review said.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reviewed {
    namespace: String,
    service_account: String,
    service_account_uid: String,
    pod: String,
    pod_uid: String,
    /// Since Kubernetes 1.32.
    node: Option<String>,
}

impl Reviewed {
    fn place(&self) -> String {
        format!("{}/{}", self.namespace, self.pod)
    }
}

/// Turns tokens into identities.
pub(crate) struct Attestor {
    client: Client,
    settings: Kubernetes,
    trust_domain: TrustDomain,
    clock: Arc<dyn Clock>,
    reviews: Semaphore,
    waiting: Semaphore,
    addresses: Mutex<Buckets<IpAddr>>,
    pods: Mutex<Buckets<String>>,
}

impl Attestor {
    pub(crate) fn new(
        client: Client,
        settings: Kubernetes,
        trust_domain: TrustDomain,
        limits: &Limits,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let now = clock.now();
        let buckets = |per_minute| Buckets::new(per_minute, REMEMBERED_MAX, now);
        Self {
            reviews: Semaphore::new(limits.reviews_max),
            waiting: Semaphore::new(limits.reviews_waiting_max),
            addresses: Mutex::new(buckets(limits.tokens_per_address_per_minute)),
            pods: Mutex::new(Buckets::new(
                limits.issuances_per_pod_per_minute,
                REMEMBERED_MAX,
                now,
            )),
            client,
            settings,
            trust_domain,
            clock,
        }
    }

    /// What `token`, sent from `caller`, proves.
    ///
    /// # Errors
    ///
    /// [`Unattested`], as a [`Refusal`].
    pub(crate) async fn attest(
        &self,
        token: &str,
        caller: SocketAddr,
    ) -> Result<Attested, Refusal> {
        let now = self.clock.now();
        let address = caller.ip().to_canonical();
        token::check(token, &self.settings.token_audience, now)?;
        let admitted = lock(&self.addresses).take(&address, now);
        admitted.map_err(|wait| Unattested::AddressLimit { address, wait })?;
        let _permit = self.turn().await?;
        let reviewed = self.review(token).await?;
        let admitted = lock(&self.pods).take(&reviewed.pod_uid, now);
        admitted.map_err(|wait| Unattested::PodLimit {
            pod: reviewed.place(),
            wait,
        })?;
        let (pod, service_account) =
            tokio::try_join!(self.pod(&reviewed), self.service_account(&reviewed))?;
        let source = self.settings.check_source_address.then_some(address);
        let node = check_pod(&pod, &reviewed, source)?;
        if service_account.metadata.uid.as_ref() != Some(&reviewed.service_account_uid) {
            return Err(Unattested::ServiceAccountReplaced.into());
        }
        let id = self.identity(&reviewed)?;
        Ok(Attested {
            dns_names: dns_names(&id, &self.settings),
            id,
            evidence: Evidence::Pod(PodEvidence {
                uid: reviewed.pod_uid,
                name: reviewed.pod,
                node,
            }),
            lineage: None,
            key: None,
        })
    }

    /// Waits for a review to become free, unless too many wait already.
    async fn turn(&self) -> Result<SemaphorePermit<'_>, Unattested> {
        let _waiting = self
            .waiting
            .try_acquire()
            .map_err(|_full| Unattested::Busy)?;
        let turn = self.reviews.acquire().await;
        turn.map_err(|_closed| Unattested::Busy)
    }

    async fn review(&self, token: &str) -> Result<Reviewed, Unattested> {
        let audience = &self.settings.token_audience;
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![audience.clone()]),
                token: Some(token.to_owned()),
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let params = PostParams::default();
        let answer = ask("review a token", api.create(&params, &review)).await?;
        reviewed(answer.status.unwrap_or_default(), audience)
    }

    /// Without a resource version, so that the API server reads it from its store.
    async fn pod(&self, reviewed: &Reviewed) -> Result<Pod, Unattested> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &reviewed.namespace);
        let found = ask("read a pod", api.get_opt(&reviewed.pod)).await?;
        found.ok_or_else(|| Unattested::PodGone {
            pod: reviewed.place(),
        })
    }

    async fn service_account(&self, reviewed: &Reviewed) -> Result<ServiceAccount, Unattested> {
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &reviewed.namespace);
        let found = ask(
            "read a service account",
            api.get_opt(&reviewed.service_account),
        )
        .await?;
        found.ok_or(Unattested::ServiceAccountGone)
    }

    fn identity(&self, reviewed: &Reviewed) -> Result<SpiffeId, Unattested> {
        let (namespace, name) = (&reviewed.namespace, &reviewed.service_account);
        if namespace == CONTROL_PLANE && name == CA {
            return Err(Unattested::CaItself);
        }
        SpiffeId::for_workload(&self.trust_domain, namespace, name)
            .map_err(|error| Unattested::Name(format!("{namespace}/{name}: {error}")))
    }
}

/// The only table of DNS names, by attested identity.
fn dns_names(id: &SpiffeId, settings: &Kubernetes) -> Vec<String> {
    match id.workload() {
        Some((CONTROL_PLANE, name)) if WEBHOOKS.contains(&name) => {
            let service = format!("{name}.{CONTROL_PLANE}.svc");
            let full = format!("{service}.{}", settings.cluster_domain);
            vec![service, full]
        }
        _ => Vec::new(),
    }
}

fn reviewed(status: TokenReviewStatus, audience: &str) -> Result<Reviewed, Unattested> {
    if status.authenticated != Some(true) || status.error.as_deref().is_some_and(|e| !e.is_empty())
    {
        tracing::debug!(error = status.error, "token rejected by the Kubernetes API");
        return Err(Unattested::Rejected);
    }
    let audiences = status.audiences.unwrap_or_default();
    if !audiences.iter().any(|confirmed| confirmed == audience) {
        return Err(Unattested::AudienceNotConfirmed {
            expected: audience.to_owned(),
        });
    }
    let user = status.user.unwrap_or_default();
    let name = user.username.unwrap_or_default();
    let parts = name
        .strip_prefix(USER_PREFIX)
        .and_then(|name| name.split_once(':'))
        .filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty())
        .filter(|(_, name)| !name.contains(':'));
    let (namespace, service_account) = parts.ok_or(Unattested::NotAServiceAccount)?;
    let uid = user.uid.filter(|uid| !uid.is_empty());
    let extra = user.extra.unwrap_or_default();
    let (Some(pod), Some(pod_uid)) = (only(&extra, POD_NAME), only(&extra, POD_UID)) else {
        return Err(Unattested::Unbound);
    };
    Ok(Reviewed {
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        service_account_uid: uid.ok_or(Unattested::NotAServiceAccount)?,
        pod,
        pod_uid,
        node: only(&extra, NODE_NAME),
    })
}

/// The value of a fact that has exactly one.
fn only(extra: &BTreeMap<String, Vec<String>>, name: &str) -> Option<String> {
    match extra.get(name)?.as_slice() {
        [value] if !value.is_empty() => Some(value.clone()),
        _ => None,
    }
}

/// Whether the pod is the one that was reviewed and may have an identity; returns its node.
fn check_pod(pod: &Pod, reviewed: &Reviewed, source: Option<IpAddr>) -> Result<String, Unattested> {
    let place = || reviewed.place();
    if pod.metadata.uid.as_ref() != Some(&reviewed.pod_uid) {
        return Err(Unattested::PodReplaced { pod: place() });
    }
    let spec = pod.spec.clone().unwrap_or_default();
    if spec.service_account_name.as_ref() != Some(&reviewed.service_account) {
        return Err(Unattested::PodServiceAccount { pod: place() });
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return Err(Unattested::PodTerminating { pod: place() });
    }
    let status = pod.status.clone().unwrap_or_default();
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return Err(Unattested::PodFinished { pod: place() });
    }
    let labels = pod.metadata.labels.as_ref();
    if labels
        .and_then(|labels| labels.get(INJECT))
        .map(String::as_str)
        == Some("disabled")
    {
        return Err(Unattested::PodOptedOut { pod: place() });
    }
    let node = spec.node_name.filter(|node| !node.is_empty());
    let node = node.filter(|node| reviewed.node.as_ref().is_none_or(|named| named == node));
    let node = node.ok_or_else(|| Unattested::PodNode { pod: place() })?;
    let listed = status.pod_ips.unwrap_or_default().into_iter();
    let texts: Vec<String> = listed
        .map(|listed| listed.ip)
        .chain(status.pod_ip)
        .collect();
    let known = |source: &IpAddr| {
        let addresses = texts.iter().filter_map(|text| text.parse::<IpAddr>().ok());
        texts.is_empty() || addresses.map(|a| a.to_canonical()).any(|a| a == *source)
    };
    match source.filter(|source| !known(source)) {
        Some(address) => Err(Unattested::SourceAddress {
            pod: place(),
            address,
        }),
        None => Ok(node),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn status() -> Value {
        json!({
            "authenticated": true,
            "audiences": ["sidegate-ca"],
            "user": {
                "username": "system:serviceaccount:shop:web",
                "uid": "sa-uid",
                "extra": {
                    POD_NAME: ["web-1"],
                    POD_UID: ["pod-uid"],
                    NODE_NAME: ["node1"],
                },
            },
        })
    }

    fn pod() -> Value {
        json!({
            "metadata": { "name": "web-1", "namespace": "shop", "uid": "pod-uid" },
            "spec": { "serviceAccountName": "web", "nodeName": "node1", "containers": [] },
            "status": { "phase": "Running", "podIP": "10.1.2.3", "podIPs": [{ "ip": "10.1.2.3" }, { "ip": "fd00::3" }] },
        })
    }

    /// `value` at `pointer`, made where it is missing; null takes away.
    fn with(mut object: Value, pointer: &str, value: Value) -> Value {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        let parent = object.pointer_mut(parent).unwrap().as_object_mut().unwrap();
        let name = name.replace("~1", "/");
        if value.is_null() {
            parent.remove(&name);
        } else {
            parent.insert(name, value);
        }
        object
    }

    #[track_caller]
    fn check_review(pointer: &str, value: Value, expected: Result<(), &'static str>) {
        let status = serde_json::from_value(with(status(), pointer, value)).unwrap();
        let seen = reviewed(status, "sidegate-ca").map(drop);
        assert_eq!(seen.map_err(|error| error.code()), expected, "{pointer}");
    }

    #[track_caller]
    fn check_live(pointer: &str, value: Value, expected: Result<&str, &'static str>) {
        check_from("10.1.2.3", pointer, value, expected);
    }

    #[track_caller]
    fn check_from(source: &str, pointer: &str, value: Value, expected: Result<&str, &'static str>) {
        let status = serde_json::from_value(status()).unwrap();
        let reviewed = reviewed(status, "sidegate-ca").unwrap();
        let pod = serde_json::from_value(with(pod(), pointer, value)).unwrap();
        let seen = check_pod(&pod, &reviewed, Some(source.parse().unwrap()));
        let seen = seen.as_deref().map_err(Unattested::code);
        assert_eq!(seen, expected, "{source} {pointer}");
    }

    #[test]
    fn a_review_that_leaves_anything_open_refuses() {
        check_review("/authenticated", json!(true), Ok(()));
        check_review("/authenticated", json!(false), Err("token_rejected"));
        check_review("/authenticated", Value::Null, Err("token_rejected"));
        check_review("/error", json!("late"), Err("token_rejected"));
        let unconfirmed = Err("token_audience_not_confirmed");
        check_review("/audiences", Value::Null, unconfirmed);
        check_review("/audiences", json!([]), unconfirmed);
        check_review("/audiences", json!(["https://api"]), unconfirmed);
        for name in [
            "",
            "alice",
            "system:serviceaccount:shop",
            "system:serviceaccount::web",
        ] {
            check_review(
                "/user/username",
                json!(name),
                Err("token_not_a_service_account"),
            );
        }
        let nested = json!("system:serviceaccount:shop:web:x");
        check_review("/user/username", nested, Err("token_not_a_service_account"));
        check_review("/user/uid", Value::Null, Err("token_not_a_service_account"));
        check_review("/user/extra", Value::Null, Err("token_unbound"));
        for extra in ["pod-name", "pod-uid"] {
            let pointer = format!("/user/extra/authentication.kubernetes.io~1{extra}");
            check_review(&pointer, Value::Null, Err("token_unbound"));
            check_review(&pointer, json!([]), Err("token_unbound"));
            check_review(&pointer, json!(["a", "b"]), Err("token_unbound"));
        }
    }

    #[test]
    fn only_the_live_pod_itself_is_believed() {
        check_live("/metadata/labels", json!({}), Ok("node1"));
        check_live("/metadata/uid", json!("other"), Err("pod_replaced"));
        check_live("/metadata/uid", Value::Null, Err("pod_replaced"));
        check_live(
            "/spec/serviceAccountName",
            json!("orders"),
            Err("pod_service_account"),
        );
        check_live(
            "/spec/serviceAccountName",
            Value::Null,
            Err("pod_service_account"),
        );
        let deleted = json!("2026-01-01T00:00:00Z");
        check_live(
            "/metadata/deletionTimestamp",
            deleted,
            Err("pod_terminating"),
        );
        check_live("/status/phase", json!("Succeeded"), Err("pod_finished"));
        check_live("/status/phase", json!("Failed"), Err("pod_finished"));
        check_live("/status/phase", json!("Pending"), Ok("node1"));
        check_live("/spec/nodeName", json!("node2"), Err("pod_node"));
        check_live("/spec/nodeName", Value::Null, Err("pod_node"));
        check_live(
            "/metadata/labels",
            json!({ INJECT: "disabled" }),
            Err("pod_opted_out"),
        );
    }

    #[test]
    fn a_token_counts_only_from_an_address_of_its_pod() {
        let same = json!("Running");
        check_from("10.1.2.3", "/status/phase", same.clone(), Ok("node1"));
        check_from("fd00::3", "/status/phase", same.clone(), Ok("node1"));
        check_from(
            "10.1.2.4",
            "/status/phase",
            same.clone(),
            Err("source_address"),
        );
        check_from("127.0.0.1", "/status/phase", same, Err("source_address"));
        // So young that nobody has written down where it is.
        check_from(
            "10.9.9.9",
            "/status",
            json!({ "phase": "Pending" }),
            Ok("node1"),
        );
    }

    #[test]
    fn only_the_injector_of_the_control_plane_has_dns_names() {
        let names = |id: &str| dns_names(&id.parse().unwrap(), &Kubernetes::default());
        let injector = names("spiffe://cluster.local/ns/sidegate-system/sa/sidegate-injector");
        let expected = [
            "sidegate-injector.sidegate-system.svc",
            "sidegate-injector.sidegate-system.svc.cluster.local",
        ];
        assert_eq!(injector, expected);
        for id in [
            "spiffe://cluster.local/ns/sidegate-system/sa/sidegate-controller",
            "spiffe://cluster.local/ns/shop/sa/sidegate-injector",
        ] {
            assert!(names(id).is_empty(), "{id}");
        }
    }
}
