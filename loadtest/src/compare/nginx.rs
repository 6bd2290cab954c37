//! nginx as a target: a pair with mutual TLS, at its best.
//!
//! One process each, without a master; TLS 1.3 with P-256 and no tickets; both ends verified, the
//! called by its name, the caller by its subject, since nginx reads no SPIFFE ID. Twenty locations,
//! of which one admits the caller; prefixes are a tree, so their order costs nothing. A JSON access
//! log in a buffer; connections to upstream are kept, and never end by their number of requests.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use http::HeaderMap;
use tokio::process::Command;

use super::RULES;
use super::certificates;
use super::peer::{Inbound, Peer};
use super::process::{Process, free_address, output_of_both};
use crate::target::{Protocol, TlsFiles};

/// The target's name, and that of binary and package.
pub(crate) const NAME: &str = "nginx";

/// Starts a pair in front of `backend`.
///
/// # Errors
///
/// When one of them does not become ready.
pub(crate) async fn start(
    binary: &Path,
    folder: &Path,
    backend: SocketAddr,
) -> anyhow::Result<Peer> {
    fs::create_dir_all(folder)?;
    certificates::write(folder, &["caller", "called"])?;
    let (outbound, inbound) = (free_address()?, free_address()?);
    let mut peer = Peer {
        name: NAME.to_owned(),
        authority: outbound.to_string(),
        inbound: Some(Inbound {
            address: inbound,
            protocol: Protocol::Http1,
            headers: HeaderMap::new(),
            tls: TlsFiles {
                // The certificate's name is `called`, not an address; the generator only has to be let in.
                insecure: true,
                cert: Some(folder.join("caller.pem")),
                key: Some(folder.join("caller.key")),
                ..TlsFiles::default()
            },
        }),
        ..Peer::default()
    };
    let mut version = Command::new(binary);
    version.arg("-v");
    let version = output_of_both(version).await?;
    peer.versions.insert(NAME.into(), version);
    let ends = [
        ("caller", outbound, caller(folder, outbound, inbound)),
        ("called", inbound, called(folder, inbound, backend)),
    ];
    for (name, address, text) in ends {
        let file = folder.join(format!("{name}.conf"));
        fs::write(&file, &text)?;
        peer.configurations
            .insert(format!("{NAME}: {name}.conf"), text);
        let mut command = Command::new(binary);
        command.arg("-p").arg(folder).arg("-c").arg(&file);
        command.args(["-e", "stderr"]);
        let mut process = Process::start(name, command, folder)?;
        process.listening(address).await?;
        peer.hops.push(process);
    }
    Ok(peer)
}

fn caller(folder: &Path, listen: SocketAddr, called: SocketAddr) -> String {
    let folder_text = folder.display();
    let server = format!(
        "    upstream called {{ server {called}; keepalive 1024; keepalive_requests 1000000000; keepalive_time 1h; }}
    server {{
        listen {listen} backlog=4096;
        location / {{
            proxy_pass https://called;
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_certificate {folder_text}/caller.pem;
            proxy_ssl_certificate_key {folder_text}/caller.key;
            proxy_ssl_trusted_certificate {folder_text}/root.pem;
            proxy_ssl_verify on;
            proxy_ssl_name called;
        }}
    }}
"
    );
    config(folder, "caller", &server)
}

fn called(folder: &Path, listen: SocketAddr, backend: SocketAddr) -> String {
    let folder_text = folder.display();
    let location = |prefix: &str, account: &str| {
        format!(
            "        location {prefix} {{
            if ($ssl_client_s_dn != \"CN={account}\") {{ return 403; }}
            if ($request_method !~ ^(GET|POST)$) {{ return 403; }}
            proxy_pass http://backend;
        }}
"
        )
    };
    let others =
        (1..RULES).map(|number| location(&format!("/other-{number}/"), &format!("other-{number}")));
    let others: String = others.collect();
    let server = format!(
        "    upstream backend {{ server {backend}; keepalive 1024; keepalive_requests 1000000000; keepalive_time 1h; }}
    server {{
        listen {listen} ssl backlog=4096;
        ssl_protocols TLSv1.3;
        ssl_session_tickets off;
        ssl_certificate {folder_text}/called.pem;
        ssl_certificate_key {folder_text}/called.key;
        ssl_client_certificate {folder_text}/root.pem;
        ssl_verify_client on;
        location / {{ return 403; }}
{others}{}    }}
",
        location("/bytes/", "caller")
    );
    config(folder, "called", &server)
}

fn config(folder: &Path, name: &str, server: &str) -> String {
    let folder = folder.display();
    format!(
        "daemon off;
master_process off;
worker_processes 1;
pid {folder}/{name}.pid;
events {{ worker_connections 16384; multi_accept on; }}
http {{
    log_format json escape=json '{{\"time\":\"$time_iso8601\",\"duration_s\":$request_time,\"protocol\":\"$server_protocol\",\"source\":\"$ssl_client_s_dn\",\"source_address\":\"$remote_addr\",\"destination_address\":\"$upstream_addr\",\"method\":\"$request_method\",\"authority\":\"$http_host\",\"path\":\"$uri\",\"status\":$status,\"request_bytes\":$request_length,\"response_bytes\":$body_bytes_sent,\"tls_version\":\"$ssl_protocol\"}}';
    access_log {folder}/{name}.log json buffer=64k flush=1s;
    client_body_temp_path {folder}/{name}-body;
    proxy_temp_path {folder}/{name}-proxy;
    fastcgi_temp_path {folder}/{name}-fastcgi;
    uwsgi_temp_path {folder}/{name}-uwsgi;
    scgi_temp_path {folder}/{name}-scgi;
    keepalive_requests 1000000000;
    keepalive_time 1h;
    keepalive_timeout 1h;
    tcp_nodelay on;
    proxy_http_version 1.1;
    proxy_set_header Connection \"\";
    proxy_set_header Host $http_host;
{server}}}
"
    )
}
