//! The command line: `serve`, and what an administrator asks of a running CA.
//!
//! Invariant: only `serve` opens the state folder. Everything else goes through the socket, so two
//! processes never write to one ledger. Data goes to standard output, all else to standard error.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, Parser, Subcommand, ValueEnum};
use hyper_util::rt::TokioIo;
use sidegate_api::ca::admin_client::AdminClient;
use sidegate_api::ca::{
    ActivateRootRequest, AddRootRequest, CreateTokenRequest, ListIssuedRequest, ListTokensRequest,
    PrepareRootRequest, ReinstateRequest, RemoveRootRequest, RetireRootRequest, RevokeRequest,
    RevokeTokenRequest, StatusRequest, VerifyLedgerRequest, revoke_request,
};
use sidegate_ca::Config;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::cli::output::{Output, Row};

pub(crate) mod output;

/// Longest wait for the CA's answer, long listings apart.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Configuration that is used when neither socket nor configuration is named.
const DEFAULT_CONFIG: &str = "ca.yaml";

/// Where the configuration is in the CA's own pod, so that `kubectl exec` need not name it.
const POD_CONFIG: &str = "/etc/sidegate/ca.yaml";

/// Sidegate's certificate authority.
#[derive(Parser)]
#[command(name = "sidegate-ca", version, about, long_about = None)]
#[command(after_help = "Example:\n  sidegate-ca serve --config ca.yaml\n  \
    sidegate-ca token create --namespace shop --service-account orders")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Runs the CA; makes its root the first time.
    #[command(after_help = "Example:\n  sidegate-ca serve --config ca.yaml")]
    Serve(Serve),
    /// Join tokens: what a new workload proves its identity with.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Lists the certificates that were issued, or verifies the ledger.
    #[command(
        after_help = "Example:\n  sidegate-ca issued --id spiffe://mesh.local/ns/shop/sa/web\n  \
        sidegate-ca issued --verify"
    )]
    Issued {
        /// Verifies the hash chain of the whole ledger instead; exits with 1 when it is broken.
        #[arg(long, conflicts_with = "id")]
        verify: bool,
        /// Only this SPIFFE ID.
        #[arg(long)]
        id: Option<String>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Revokes an identity or one certificate; live connections end within seconds.
    #[command(
        after_help = "Example:\n  sidegate-ca revoke spiffe://mesh.local/ns/shop/sa/web\n  \
        sidegate-ca revoke 4f6a…"
    )]
    Revoke {
        /// SPIFFE ID, or serial number in hexadecimal.
        subject: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Accepts a revoked identity again. Certificates from before stay revoked.
    #[command(after_help = "Example:\n  sidegate-ca reinstate spiffe://mesh.local/ns/shop/sa/web")]
    Reinstate {
        /// SPIFFE ID.
        id: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Roots in the bundle, and the change from one to the next.
    #[command(subcommand)]
    Root(RootCommand),
    /// Shows roots, ledger, and what each watching sidecar has acknowledged.
    #[command(after_help = "Example:\n  sidegate-ca status -o json")]
    Status {
        #[command(flatten)]
        ask: Ask,
    },
}

#[derive(Args)]
pub(crate) struct Serve {
    /// Configuration file.
    #[arg(long, default_value = DEFAULT_CONFIG)]
    pub(crate) config: PathBuf,
    /// Prints the configuration with its defaults, and ends.
    #[arg(long)]
    pub(crate) print_config: bool,
}

#[derive(Subcommand)]
pub(crate) enum TokenCommand {
    /// Makes a join token for one identity. It is shown once.
    #[command(after_help = "Example:\n  sidegate-ca token create --namespace shop \
        --service-account orders")]
    Create {
        /// Namespace of the workload.
        #[arg(long, short)]
        namespace: String,
        /// Service account of the workload.
        #[arg(long, short)]
        service_account: String,
        /// Life of the token, such as `10m`; the CA's default when absent.
        #[arg(long, value_parser = humantime::parse_duration)]
        lifetime: Option<Duration>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Lists tokens that are not expired, without their secrets.
    #[command(after_help = "Example:\n  sidegate-ca token list")]
    List {
        #[command(flatten)]
        ask: Ask,
    },
    /// Makes a token unusable.
    #[command(after_help = "Example:\n  sidegate-ca token revoke 1f2e3d4c5b6a7988")]
    Revoke {
        /// The token's id: the part between the two underscores.
        id: String,
        #[command(flatten)]
        ask: Ask,
    },
}

#[derive(Subcommand)]
pub(crate) enum RootCommand {
    /// Lists the roots in the bundle.
    #[command(after_help = "Example:\n  sidegate-ca root list")]
    List {
        #[command(flatten)]
        ask: Ask,
    },
    /// Puts a root whose key is elsewhere into the bundle.
    #[command(after_help = "Example:\n  sidegate-ca root add other-root.pem")]
    Add {
        /// PEM file of a self-signed root.
        file: PathBuf,
        #[command(flatten)]
        ask: Ask,
    },
    /// Takes a root out of the bundle.
    #[command(after_help = "Example:\n  sidegate-ca root remove SHA256")]
    Remove {
        /// SHA-256 of the certificate, as `root list` shows it.
        sha256: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Step 1 of a change: makes the next root and publishes it beside the active one.
    #[command(after_help = "Example:\n  sidegate-ca root prepare")]
    Prepare {
        #[command(flatten)]
        ask: Ask,
    },
    /// Step 2: signs under the prepared root, once every sidecar has acknowledged it.
    #[command(after_help = "Example:\n  sidegate-ca root activate")]
    Activate {
        /// Does not wait for acknowledgements. Sidecars without the new root stop being understood.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        ask: Ask,
    },
    /// Step 3: takes the former root out, once no certificate under it is in date.
    #[command(after_help = "Example:\n  sidegate-ca root retire")]
    Retire {
        /// Does not wait for certificates to end. They are refused from then on.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        ask: Ask,
    },
}

/// Where the CA is, and how to print.
#[derive(Args)]
pub(crate) struct Ask {
    /// The CA's administration socket.
    #[arg(long, env = "SIDEGATE_CA_SOCKET")]
    socket: Option<PathBuf>,
    /// The CA's configuration, to find its socket; `ca.yaml` here, or `/etc/sidegate/ca.yaml`, when
    /// nothing is named.
    #[arg(long, conflicts_with = "socket")]
    config: Option<PathBuf>,
    /// How to print.
    #[arg(long, short, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Yaml,
}

impl Ask {
    /// The named socket, or the configuration's.
    fn socket(&self) -> anyhow::Result<PathBuf> {
        if let Some(socket) = &self.socket {
            return Ok(socket.clone());
        }
        let defaults = [DEFAULT_CONFIG, POD_CONFIG].map(Path::new);
        let there = || defaults.into_iter().find(|path| path.exists());
        let Some(config) = self.config.as_deref().or_else(there) else {
            return Err(crate::Usage(anyhow!(
                "which CA? There is no {DEFAULT_CONFIG} here; name one with --config FILE, or its \
                 socket with --socket PATH or SIDEGATE_CA_SOCKET"
            ))
            .into());
        };
        let config = Config::load(config).map_err(|error| crate::Usage(error.into()))?;
        Ok(config.admin_socket())
    }

    async fn connect(&self) -> anyhow::Result<AdminClient<Channel>> {
        let socket = self.socket()?;
        let stream = UnixStream::connect(&socket).await;
        let stream = stream.with_context(|| hint(&socket))?;
        let mut ready = Some(TokioIo::new(stream));
        let connector = tower::service_fn(move |_uri: http::Uri| {
            let stream = ready
                .take()
                .ok_or(io::Error::from(io::ErrorKind::BrokenPipe));
            std::future::ready(stream)
        });
        let endpoint = Endpoint::from_static("http://sidegate-ca");
        let channel = endpoint.connect_with_connector(connector).await;
        Ok(AdminClient::new(channel.with_context(|| hint(&socket))?))
    }

    fn print(&self, output: &Output) -> anyhow::Result<()> {
        write_out(&output.render(self.output)?)
    }
}

fn hint(socket: &Path) -> String {
    let why = match socket.metadata() {
        Ok(_) => "start it with `sidegate-ca serve`, or run this as the CA's user",
        Err(_) => "no CA is running there; start it with `sidegate-ca serve --config ca.yaml`",
    };
    format!("no CA answers at {}: {why}", socket.display())
}

/// Runs everything but `serve`.
pub(crate) async fn run(command: Command) -> anyhow::Result<()> {
    let asking = async {
        match command {
            Command::Serve(_) => Ok(()),
            Command::Token(command) => token(command).await,
            Command::Issued {
                verify: true, ask, ..
            } => verify(&ask).await,
            Command::Issued { id, ask, .. } => return issued(&ask, id).await,
            Command::Revoke { subject, ask } => revoke(&ask, subject).await,
            Command::Reinstate { id, ask } => reinstate(&ask, id).await,
            Command::Root(command) => root(command).await,
            Command::Status { ask } => status(&ask).await,
        }
    };
    asking.await.map_err(explain)
}

/// A refusal in the CA's own words; a transport's failure with its cause.
fn explain(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<tonic::Status>() {
        Some(status) => anyhow!("{}", status.message()),
        None => error,
    }
}

async fn within<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, call).await;
    let answer = answer.context("the CA does not answer")?;
    Ok(answer?.into_inner())
}

async fn token(command: TokenCommand) -> anyhow::Result<()> {
    match command {
        TokenCommand::Create {
            namespace,
            service_account,
            lifetime,
            ask,
        } => {
            let mut client = ask.connect().await?;
            let request = CreateTokenRequest {
                namespace,
                service_account,
                lifetime_seconds: lifetime.map_or(0, |life| life.as_secs().max(1)),
            };
            let created = within(client.create_token(request)).await?;
            if ask.output == Format::Table {
                // The bare token, so that a script can take it as it is.
                return write_out(&format!("{}\n", created.token));
            }
            let row = Row::new()
                .text("id", created.id)
                .text("token", created.token)
                .text("spiffe_id", created.spiffe_id)
                .time("expires", created.expires_unix_seconds);
            ask.print(&Output::One(row))
        }
        TokenCommand::List { ask } => {
            let mut client = ask.connect().await?;
            let listed = within(client.list_tokens(ListTokensRequest {})).await?;
            let rows = listed.tokens.into_iter().map(|token| {
                Row::new()
                    .text("id", token.id)
                    .text("spiffe_id", token.spiffe_id)
                    .time("expires", token.expires_unix_seconds)
                    .flag("used", token.used)
            });
            ask.print(&Output::Many(rows.collect()))
        }
        TokenCommand::Revoke { id, ask } => {
            let mut client = ask.connect().await?;
            let request = RevokeTokenRequest { id: id.clone() };
            within(client.revoke_token(request)).await?;
            ask.print(&Output::One(Row::new().text("revoked", id)))
        }
    }
}

async fn issued(ask: &Ask, id: Option<String>) -> anyhow::Result<()> {
    let mut client = ask.connect().await?;
    let request = ListIssuedRequest {
        spiffe_id: id.unwrap_or_default(),
    };
    let mut stream = within(client.list_issued(request)).await?;
    let mut rows = Vec::new();
    while let Some(issued) = stream.message().await? {
        rows.push(
            Row::new()
                .number("index", issued.index)
                .time("recorded", issued.recorded_unix_seconds)
                .text("spiffe_id", issued.spiffe_id)
                .text("serial", issued.serial)
                .time("not_after", issued.not_after_unix_seconds)
                .text("evidence", issued.evidence)
                .text("state", issued.state)
                .detail("public_key_sha256", issued.public_key_sha256),
        );
    }
    ask.print(&Output::Many(rows))
}

async fn verify(ask: &Ask) -> anyhow::Result<()> {
    let mut client = ask.connect().await?;
    let verified = client
        .verify_ledger(VerifyLedgerRequest {})
        .await?
        .into_inner();
    if verified.intact {
        let row = Row::new()
            .flag("intact", true)
            .number("entries", verified.entries);
        return ask.print(&Output::One(row));
    }
    Err(anyhow!(
        "the ledger is broken after {} entries: {}; keep the file as evidence and restore the \
         state folder from a backup",
        verified.entries,
        verified.problem
    ))
}

async fn revoke(ask: &Ask, subject: String) -> anyhow::Result<()> {
    let mut client = ask.connect().await?;
    let what = if subject.contains("://") {
        revoke_request::Subject::SpiffeId(subject.clone())
    } else {
        revoke_request::Subject::Serial(subject.clone())
    };
    let request = RevokeRequest {
        subject: Some(what),
    };
    let answer = within(client.revoke(request)).await?;
    let row = Row::new()
        .text("revoked", subject)
        .number("bundle_sequence", answer.bundle_sequence);
    ask.print(&Output::One(row))
}

async fn reinstate(ask: &Ask, id: String) -> anyhow::Result<()> {
    let mut client = ask.connect().await?;
    let request = ReinstateRequest {
        spiffe_id: id.clone(),
    };
    let answer = within(client.reinstate(request)).await?;
    let row = Row::new()
        .text("reinstated", id)
        .number("bundle_sequence", answer.bundle_sequence);
    ask.print(&Output::One(row))
}

async fn root(command: RootCommand) -> anyhow::Result<()> {
    let (ask, state) = match command {
        RootCommand::List { ask } => return list_roots(&ask).await,
        RootCommand::Add { file, ask } => {
            let root_pem = std::fs::read_to_string(&file)
                .with_context(|| format!("cannot read {}", file.display()))?;
            let mut client = ask.connect().await?;
            let added = within(client.add_root(AddRootRequest { root_pem })).await?;
            (ask, added)
        }
        RootCommand::Remove { sha256, ask } => {
            let mut client = ask.connect().await?;
            let removed = within(client.remove_root(RemoveRootRequest { sha256 })).await?;
            (ask, removed)
        }
        RootCommand::Prepare { ask } => {
            let mut client = ask.connect().await?;
            let prepared = within(client.prepare_root(PrepareRootRequest {})).await?;
            (ask, prepared)
        }
        RootCommand::Activate { force, ask } => {
            let mut client = ask.connect().await?;
            let activated = within(client.activate_root(ActivateRootRequest { force })).await?;
            (ask, activated)
        }
        RootCommand::Retire { force, ask } => {
            let mut client = ask.connect().await?;
            let retired = within(client.retire_root(RetireRootRequest { force })).await?;
            (ask, retired)
        }
    };
    let row = Row::new()
        .number("bundle_sequence", state.sequence)
        .list("roots", state.root_sha256);
    ask.print(&Output::One(row))
}

async fn list_roots(ask: &Ask) -> anyhow::Result<()> {
    let mut client = ask.connect().await?;
    let status = within(client.status(StatusRequest {})).await?;
    ask.print(&Output::Many(
        status.roots.into_iter().map(root_row).collect(),
    ))
}

fn root_row(root: sidegate_api::ca::Root) -> Row {
    Row::new()
        .text("sha256", root.sha256)
        .text("state", root.state)
        .time("not_after", root.not_after_unix_seconds)
}

async fn status(ask: &Ask) -> anyhow::Result<()> {
    let mut client = ask.connect().await?;
    let status = within(client.status(StatusRequest {})).await?;
    let roots: Vec<Row> = status.roots.into_iter().map(root_row).collect();
    let watchers = status.watchers.into_iter().map(|watcher| {
        Row::new()
            .text("spiffe_id", watcher.spiffe_id)
            .text("address", watcher.address)
            .number("acknowledged", watcher.acknowledged_sequence)
            .text("refusal", watcher.refusal)
    });
    let row = Row::new()
        .text("trust_domain", status.trust_domain)
        .number("bundle_sequence", status.bundle_sequence)
        .rows("roots", &roots)
        .time(
            "intermediate_not_after",
            status.intermediate_not_after_unix_seconds,
        )
        .number("ledger_entries", status.ledger_entries)
        .number("tokens", status.tokens)
        .number("certificates", status.certificates)
        .list("revoked_spiffe_ids", status.revoked_spiffe_ids)
        .list("revoked_serials", status.revoked_serials)
        .list("frozen_lineages", status.frozen_lineages)
        .rows("watchers", &watchers.collect::<Vec<_>>())
        .list(
            "unacknowledged_spiffe_ids",
            status.unacknowledged_spiffe_ids,
        );
    ask.print(&Output::One(row))
}

/// Writes to standard output; a reader that has gone (`| head`) is no error.
pub(crate) fn write_out(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}
