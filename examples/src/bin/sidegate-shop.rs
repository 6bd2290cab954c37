//! One service of the sample shop as a process, for `examples/standalone` and for containers; and
//! a client for looking at it from inside a pod.

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use axum::http::{Method, Uri};
use clap::{Parser, Subcommand};
use sidegate_examples::ask::{Call, Told, ask};
use sidegate_examples::calls::Kind;
use sidegate_examples::shop::{Running, inventory, ledger, orders, web};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// Between two calls of `--watch`.
const WATCH_EVERY: Duration = Duration::from_millis(20);

/// Runs one service of the sample shop until SIGTERM or Ctrl-C, or makes one call.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  sidegate-shop orders --listen 127.0.0.1:8081\n  sidegate-shop call http http://orders.shop/orders/7"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// REST and WebSocket.
    Orders(Listen),
    /// gRPC with server reflection and health.
    Inventory(Listen),
    /// Opaque TCP; the server speaks first.
    Ledger(Listen),
    /// Calls the three others.
    Web(Web),
    /// Calls orders and web once, says how that went, and ends.
    Batch {
        /// Where orders is called.
        #[arg(long, value_name = "HOST:PORT", default_value = "orders.shop:80")]
        orders: String,
        /// Where web is called.
        #[arg(long, value_name = "HOST:PORT", default_value = "web.shop:80")]
        web: String,
    },
    /// Makes one call and prints what it came to, as JSON; exits with 1 when nothing answered.
    Call {
        /// Call again and again; print the first outcome and each that differs from the one before.
        #[arg(long)]
        watch: bool,
        #[command(subcommand)]
        call: Ask,
    },
}

#[derive(clap::Args)]
struct Listen {
    /// Where to listen; port 0 takes a free one, which is printed.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

#[derive(clap::Args)]
struct Web {
    #[command(flatten)]
    listen: Listen,
    /// The outbound listener of its sidecar, where the sidecar does not take every connection
    /// by itself; replaces --orders and --inventory.
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["orders", "inventory"])]
    outbound: Option<SocketAddr>,
    /// Where orders is called.
    #[arg(long, value_name = "HOST:PORT", default_value = "orders.shop:80")]
    orders: String,
    /// Where inventory is called.
    #[arg(long, value_name = "HOST:PORT", default_value = "inventory.shop:80")]
    inventory: String,
    /// Where ledger is called; beside --outbound, the port of the sidecar that is bound to it.
    #[arg(long, value_name = "HOST:PORT", default_value = "ledger.shop:6379")]
    ledger: String,
}

#[derive(Subcommand)]
enum Ask {
    /// HTTP/1.1.
    Http {
        /// `http://HOST[:PORT]/PATH`
        url: Uri,
        /// Method.
        #[arg(long, short = 'X', default_value = "GET")]
        method: Method,
        /// A header, `name: value`; may be repeated. `host` replaces the URL's.
        #[arg(long = "header", short = 'H', value_name = "NAME: VALUE", value_parser = header)]
        headers: Vec<(String, String)>,
        /// The body.
        #[arg(long, default_value = "")]
        body: String,
    },
    /// One method of the inventory.
    Grpc {
        /// Where, and the authority.
        #[arg(value_name = "HOST:PORT")]
        address: String,
        /// Which.
        #[arg(value_enum)]
        kind: Kind,
    },
    /// One message over a WebSocket, and its echo.
    Websocket {
        /// `ws://HOST[:PORT]/PATH`
        url: Uri,
        /// What is sent.
        message: String,
    },
    /// A conversation in which the server speaks first.
    Tcp {
        /// Where.
        #[arg(value_name = "HOST:PORT")]
        address: String,
        /// What is said, each line after the answer to the one before.
        lines: Vec<String>,
    },
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("a header is `name: value`")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().command {
        Command::Call { watch: true, call } => watch(&call.into()).await,
        Command::Call { call, .. } => once(&call.into()).await,
        Command::Batch { orders, web } => batch(&orders, &web).await,
        Command::Orders(at) => run(orders::serve(at.listen).await).await,
        Command::Inventory(at) => run(inventory::serve(at.listen).await).await,
        Command::Ledger(at) => run(ledger::serve(at.listen).await).await,
        Command::Web(web) => run(serve_web(web).await).await,
    }
}

async fn serve_web(web: Web) -> std::io::Result<Running> {
    let listener = TcpListener::bind(web.listen.listen).await?;
    let outbound = web.outbound.map(|address| address.to_string());
    let reach = web::Reach {
        orders: outbound.clone().unwrap_or(web.orders),
        inventory: outbound.unwrap_or(web.inventory),
        ledger: web.ledger,
    };
    web::serve(listener, reach)
}

async fn run(started: std::io::Result<Running>) -> anyhow::Result<ExitCode> {
    let running = started.context("could not listen")?;
    say(&format!("listening on {}", running.address))?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _asked = terminate.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    running.stop().await;
    Ok(ExitCode::SUCCESS)
}

impl From<Ask> for Call {
    fn from(ask: Ask) -> Self {
        match ask {
            Ask::Http {
                url,
                method,
                headers,
                body,
            } => Self::Http {
                url,
                method,
                headers,
                body,
            },
            Ask::Grpc { address, kind } => Self::Grpc { address, kind },
            Ask::Websocket { url, message } => Self::WebSocket { url, message },
            Ask::Tcp { address, lines } => Self::Tcp { address, lines },
        }
    }
}

async fn once(call: &Call) -> anyhow::Result<ExitCode> {
    let told = ask(call).await;
    say(&serde_json::to_string(&told)?)?;
    Ok(code(told.error.is_none()))
}

async fn watch(call: &Call) -> anyhow::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut before = None;
    let mut interval = tokio::time::interval(WATCH_EVERY);
    loop {
        tokio::select! {
            _asked = terminate.recv() => return Ok(ExitCode::SUCCESS),
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                return Ok(ExitCode::SUCCESS);
            }
            _due = interval.tick() => {}
        }
        let told: Told = ask(call).await;
        let outcome = Some(told.outcome());
        if outcome != before {
            say(&serde_json::to_string(&told)?)?;
            before = outcome;
        }
    }
}

/// What a nightly job does: some of it is allowed.
async fn batch(orders: &str, web: &str) -> anyhow::Result<ExitCode> {
    let mut answered = true;
    for url in [
        format!("http://{orders}/healthz"),
        format!("http://{web}/checkout/7"),
        format!("http://{orders}/orders/7"),
    ] {
        let told = ask(&Call::Http {
            url: url.parse()?,
            method: Method::GET,
            headers: Vec::new(),
            body: String::new(),
        })
        .await;
        answered &= told.error.is_none();
        say(&serde_json::json!({ "url": url, "outcome": told.outcome() }).to_string())?;
    }
    Ok(code(answered))
}

fn code(good: bool) -> ExitCode {
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn say(line: &str) -> std::io::Result<()> {
    writeln!(std::io::stdout(), "{line}")
}
