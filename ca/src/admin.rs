//! The administration: gRPC over a Unix socket that only the CA's own user may open.
//!
//! Invariant: the socket has mode 0600 in a folder of mode 0700, and each connection's peer must be
//! our own user or root. A token's secret crosses it once, in the answer that makes the token.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sidegate_api::ca::admin_server::{Admin, AdminServer};
use sidegate_api::ca::{
    ActivateRootRequest, AddRootRequest, BundleState, CreateTokenRequest, CreateTokenResponse,
    Issued, ListIssuedRequest, ListTokensRequest, ListTokensResponse, PrepareRootRequest,
    ReinstateRequest, RemoveRootRequest, RetireRootRequest, RevokeRequest, RevokeResponse,
    RevokeTokenRequest, RevokeTokenResponse, Root, StatusRequest, StatusResponse, Token,
    VerifyLedgerRequest, VerifyLedgerResponse, Watcher, revoke_request,
};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::authority::unix_seconds;
use crate::issued::{Listing, State};
use crate::issuer::Issuer;
use crate::ledger::LedgerError;
use crate::operations::OperationError;

/// Largest request message: a root in PEM.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// Connections that wait to be served.
const BACKLOG: usize = 16;

/// Opens the socket. A socket that a former CA left behind is replaced; the state folder's lock
/// says that it is a former one.
///
/// # Errors
///
/// What the operating system says; also when something else than a socket is there.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    // The folder keeps others out until this has happened.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves the administration until `cancel`.
///
/// # Errors
///
/// What gRPC's transport says.
pub(crate) async fn serve(
    listener: UnixListener,
    issuer: Arc<Issuer>,
    cancel: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let (accepted, incoming) = mpsc::channel(BACKLOG);
    let accepting = accept(listener, Arc::clone(&issuer), accepted, cancel.clone());
    issuer.tracker.spawn(accepting);
    let service =
        AdminServer::new(AdminService { issuer }).max_decoding_message_size(MESSAGE_BYTES_MAX);
    Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), cancel.cancelled_owned())
        .await
}

async fn accept(
    listener: UnixListener,
    issuer: Arc<Issuer>,
    accepted: mpsc::Sender<io::Result<UnixStream>>,
    cancel: CancellationToken,
) {
    loop {
        let stream = tokio::select! {
            () = cancel.cancelled() => return,
            next = listener.accept() => next.map(|(stream, _)| stream),
        };
        match stream {
            Ok(stream) if is_ours(&stream) => {
                if accepted.send(Ok(stream)).await.is_err() {
                    return;
                }
            }
            Ok(_stranger) => {
                issuer.metrics.connection_refused("admin_uid");
                tracing::warn!("administration refused: the caller is another user");
            }
            Err(error) => {
                tracing::warn!(error = %error, "administration cannot accept");
                issuer.clock.sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn is_ours(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    let peer = stream.peer_cred().map(|peer| peer.uid());
    peer.is_ok_and(|peer| peer == own || peer == 0)
}

struct AdminService {
    issuer: Arc<Issuer>,
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let wish = request.into_inner();
        let lifetime = Some(wish.lifetime_seconds).filter(|seconds| *seconds > 0);
        let created = self
            .issuer
            .create_token(
                &wish.namespace,
                &wish.service_account,
                lifetime.map(Duration::from_secs),
            )
            .await
            .map_err(|error| refused(&error))?;
        Ok(Response::new(CreateTokenResponse {
            token: created.token.to_string(),
            id: created.id,
            spiffe_id: created.spiffe_id.to_string(),
            expires_unix_seconds: unix_seconds(created.expires),
        }))
    }

    async fn list_tokens(
        &self,
        _request: Request<ListTokensRequest>,
    ) -> Result<Response<ListTokensResponse>, Status> {
        let tokens = self.issuer.registry().tokens(self.issuer.clock.now());
        let valid = tokens.into_iter().filter(|(state, _)| !state.revoked);
        let tokens = valid.map(|(state, used)| Token {
            id: state.token.token,
            spiffe_id: state.token.spiffe_id.to_string(),
            expires_unix_seconds: state.token.expires,
            used,
        });
        Ok(Response::new(ListTokensResponse {
            tokens: tokens.collect(),
        }))
    }

    async fn revoke_token(
        &self,
        request: Request<RevokeTokenRequest>,
    ) -> Result<Response<RevokeTokenResponse>, Status> {
        let revoked = self.issuer.revoke_token(&request.into_inner().id).await;
        revoked.map_err(|error| refused(&error))?;
        Ok(Response::new(RevokeTokenResponse {}))
    }

    type ListIssuedStream = ReceiverStream<Result<Issued, Status>>;

    async fn list_issued(
        &self,
        request: Request<ListIssuedRequest>,
    ) -> Result<Response<Self::ListIssuedStream>, Status> {
        let only = Some(request.into_inner().spiffe_id).filter(|id| !id.is_empty());
        let (sender, receiver) = mpsc::channel(64);
        let issuer = Arc::clone(&self.issuer);
        self.issuer.tracker.spawn_blocking(move || {
            let mut listing = Listing::new(only, |issued| {
                // A reader that has gone hears no more; the file is read to its end all the same.
                drop(sender.blocking_send(Ok(issued_message(&issued))));
            });
            let read = issuer.ledger.read(&mut |entry| listing.take(entry));
            listing.finish();
            if let Err(error) = read {
                drop(sender.blocking_send(Err(Status::data_loss(error.to_string()))));
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn verify_ledger(
        &self,
        _request: Request<VerifyLedgerRequest>,
    ) -> Result<Response<VerifyLedgerResponse>, Status> {
        let issuer = Arc::clone(&self.issuer);
        let verify = move || issuer.ledger.read(&mut |_| {});
        let verified = self.issuer.tracker.spawn_blocking(verify).await;
        let verified = verified.map_err(|error| Status::internal(error.to_string()))?;
        let answer = match verified {
            Ok(head) => VerifyLedgerResponse {
                entries: head.entries,
                intact: true,
                problem: String::new(),
            },
            Err(error) => VerifyLedgerResponse {
                entries: match &error {
                    LedgerError::Broken { line, .. } => line.saturating_sub(1),
                    _ => 0,
                },
                intact: false,
                problem: error.to_string(),
            },
        };
        Ok(Response::new(answer))
    }

    async fn revoke(
        &self,
        request: Request<RevokeRequest>,
    ) -> Result<Response<RevokeResponse>, Status> {
        let sequence = match request.into_inner().subject {
            Some(revoke_request::Subject::SpiffeId(id)) => self.issuer.revoke_identity(&id).await,
            Some(revoke_request::Subject::Serial(serial)) => {
                self.issuer.revoke_serial(&serial).await
            }
            None => Err(OperationError::Invalid(
                "name an identity or a serial number".to_owned(),
            )),
        };
        sequence
            .map(revoke_response)
            .map_err(|error| refused(&error))
    }

    async fn reinstate(
        &self,
        request: Request<ReinstateRequest>,
    ) -> Result<Response<RevokeResponse>, Status> {
        let sequence = self.issuer.reinstate(&request.into_inner().spiffe_id).await;
        sequence
            .map(revoke_response)
            .map_err(|error| refused(&error))
    }

    async fn add_root(
        &self,
        request: Request<AddRootRequest>,
    ) -> Result<Response<BundleState>, Status> {
        let sequence = self.issuer.add_root(&request.into_inner().root_pem).await;
        self.bundle_state(sequence)
    }

    async fn remove_root(
        &self,
        request: Request<RemoveRootRequest>,
    ) -> Result<Response<BundleState>, Status> {
        let sequence = self.issuer.remove_root(&request.into_inner().sha256).await;
        self.bundle_state(sequence)
    }

    async fn prepare_root(
        &self,
        _request: Request<PrepareRootRequest>,
    ) -> Result<Response<BundleState>, Status> {
        let sequence = self.issuer.prepare_root().await;
        self.bundle_state(sequence)
    }

    async fn activate_root(
        &self,
        request: Request<ActivateRootRequest>,
    ) -> Result<Response<BundleState>, Status> {
        let sequence = self.issuer.activate_root(request.into_inner().force).await;
        self.bundle_state(sequence)
    }

    async fn retire_root(
        &self,
        request: Request<RetireRootRequest>,
    ) -> Result<Response<BundleState>, Status> {
        let sequence = self.issuer.retire_root(request.into_inner().force).await;
        self.bundle_state(sequence)
    }

    async fn status(
        &self,
        _request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(status(&self.issuer)))
    }
}

impl AdminService {
    fn bundle_state(
        &self,
        sequence: Result<u64, OperationError>,
    ) -> Result<Response<BundleState>, Status> {
        let sequence = sequence.map_err(|error| refused(&error))?;
        let roots = self.issuer.registry().roots();
        Ok(Response::new(BundleState {
            sequence,
            root_sha256: roots
                .iter()
                .map(|known| known.root.sha256.to_string())
                .collect(),
        }))
    }
}

fn status(issuer: &Issuer) -> StatusResponse {
    let now = issuer.clock.now();
    let mut registry = issuer.registry();
    registry.prune(now);
    let watchers = issuer.watchers();
    let sequence = registry.sequence();
    let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    let workloads = registry
        .certificates()
        .filter(|certificate| certificate.evidence != crate::ledger::Evidence::Own);
    let missing = watchers.missing(&registry, sequence, None);
    StatusResponse {
        trust_domain: registry.trust_domain().to_string(),
        bundle_sequence: sequence,
        roots: registry.roots().iter().map(root_message).collect(),
        intermediate_not_after_unix_seconds: unix_seconds(issuer.intermediate().not_after),
        ledger_entries: issuer.ledger.head().entries,
        tokens: count(registry.tokens(now).len()),
        certificates: count(workloads.count()),
        revoked_spiffe_ids: registry
            .revoked_ids()
            .keys()
            .map(ToString::to_string)
            .collect(),
        revoked_serials: registry
            .revoked_serials()
            .map(ToString::to_string)
            .collect(),
        frozen_lineages: registry.frozen().iter().map(ToString::to_string).collect(),
        watchers: watchers.streams().map(watcher_message).collect(),
        unacknowledged_spiffe_ids: missing.iter().map(ToString::to_string).collect(),
    }
}

fn root_message(known: &crate::registry::TrustedRoot) -> Root {
    Root {
        sha256: known.root.sha256.to_string(),
        state: known.state.as_str().to_owned(),
        not_after_unix_seconds: unix_seconds(known.root.not_after),
    }
}

fn watcher_message(watcher: &crate::watchers::Watcher) -> Watcher {
    let caller = watcher.caller.as_ref();
    Watcher {
        spiffe_id: caller.map(|(id, _)| id.to_string()).unwrap_or_default(),
        address: watcher.address.to_string(),
        acknowledged_sequence: watcher.acknowledged.sequence,
        refusal: watcher.refusal.clone(),
    }
}

fn issued_message(issued: &crate::issued::Issued) -> Issued {
    let issuance = &issued.issuance;
    Issued {
        index: issued.index,
        spiffe_id: issuance.spiffe_id.to_string(),
        serial: issuance.serial.to_string(),
        public_key_sha256: issuance.public_key_sha256.to_string(),
        recorded_unix_seconds: issued.time / 1000,
        not_after_unix_seconds: issuance.not_after,
        evidence: issuance.evidence.to_string(),
        state: match issued.state {
            State::Intended => "intended",
            State::Issued => "issued",
            State::Refused => "refused",
        }
        .to_owned(),
    }
}

fn revoke_response(bundle_sequence: u64) -> Response<RevokeResponse> {
    Response::new(RevokeResponse { bundle_sequence })
}

fn refused(error: &OperationError) -> Status {
    tracing::warn!(error = %error, "administration refused a request");
    error.status()
}
