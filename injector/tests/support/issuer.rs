//! A CA that issues as in a cluster: for attested evidence, with the webhook's DNS names.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{CertificateSigningRequestParams, SanType, SerialNumber};
use rustls_pki_types::CertificateDer;
use sidegate_api::identity as proto;
use sidegate_mesh::clock::Clock as _;
use sidegate_mesh::clock::ManualClock;
use sidegate_mtls::{
    BoxFuture, BundleStream, BundleWatch, Issue, IssueError, IssueRequest, TrustUpdate,
};
use tokio::sync::{mpsc, watch};

use crate::ca::{Authority, leaf_params, moment};

pub const DNS_NAME: &str = "sidegate-injector.sidegate-system.svc";

#[derive(Clone)]
pub struct ClusterIssuer {
    state: Arc<Mutex<State>>,
    bundle: watch::Sender<proto::WatchBundleResponse>,
    clock: ManualClock,
}

struct State {
    intermediate: Authority,
    is_down: bool,
    life: Duration,
    serial: u64,
}

impl ClusterIssuer {
    pub fn new(
        root: &Authority,
        life: Duration,
        clock: ManualClock,
        bundle: proto::WatchBundleResponse,
    ) -> Self {
        let state = State {
            intermediate: root.intermediate(),
            is_down: false,
            life,
            serial: 0,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            bundle: watch::Sender::new(bundle),
            clock,
        }
    }

    pub fn set_down(&self, is_down: bool) {
        self.state.lock().unwrap().is_down = is_down;
    }

    pub fn publish(&self, bundle: proto::WatchBundleResponse) {
        self.bundle.send_replace(bundle);
    }

    fn chain(&self, request: &IssueRequest) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let mut state = self.state.lock().unwrap();
        if state.is_down {
            return Err(IssueError::Failed("the CA is down".into()));
        }
        state.serial += 1;
        let csr =
            CertificateSigningRequestParams::from_der(&request.csr.as_slice().into()).unwrap();
        let now = self.clock.now();
        let id = "spiffe://cluster.local/ns/sidegate-system/sa/sidegate-injector";
        let mut params = leaf_params(id, now, state.life);
        let names = [DNS_NAME.to_owned(), format!("{DNS_NAME}.cluster.local")];
        params
            .subject_alt_names
            .extend(names.map(|name| SanType::DnsName(name.try_into().unwrap())));
        params.not_before = moment(now);
        params.serial_number = Some(SerialNumber::from(state.serial));
        let leaf = state.intermediate.sign(&params, &csr.public_key);
        Ok(vec![leaf, state.intermediate.der.clone()])
    }
}

impl Issue for ClusterIssuer {
    fn issue(
        &self,
        request: IssueRequest,
    ) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, IssueError>> {
        Box::pin(async move { self.chain(&request) })
    }

    fn watch_bundle(&self, _: BundleWatch) -> BoxFuture<'_, Result<BundleStream, IssueError>> {
        let mut changes = self.bundle.subscribe();
        changes.mark_changed();
        let changes = tokio_stream::wrappers::WatchStream::from_changes(changes);
        let updates =
            tokio_stream::StreamExt::map(changes, |message| Ok(TrustUpdate::new(message)));
        let (acknowledgements, mut receiver) = mpsc::channel(16);
        tokio::task::spawn(async move { while receiver.recv().await.is_some() {} });
        Box::pin(async move {
            Ok(BundleStream {
                updates: Box::pin(updates),
                acknowledgements,
            })
        })
    }
}
