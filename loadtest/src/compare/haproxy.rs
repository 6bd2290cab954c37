//! `HAProxy` as a target: a pair with mutual TLS, at its best.
//!
//! One thread each; TLS 1.3 with P-256 and no tickets; both ends verified, the called by its name,
//! the caller by its subject, since `HAProxy` reads no SPIFFE ID. Twenty rules of which the last
//! admits the caller; a JSON access log to standard output, which is a file; connections to the
//! next server are reused always.

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
pub(crate) const NAME: &str = "haproxy";

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
    for account in ["caller", "called"] {
        let part = |kind: &str| fs::read_to_string(folder.join(format!("{account}.{kind}")));
        let both = folder.join(format!("{account}.both"));
        fs::write(both, part("pem")? + &part("key")?)?;
    }
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
    let version = version.lines().next().unwrap_or_default().to_owned();
    peer.versions.insert(NAME.into(), version);
    let ends = [
        ("caller", outbound, caller(folder, outbound, inbound)),
        ("called", inbound, called(folder, inbound, backend)),
    ];
    for (name, address, text) in ends {
        let file = folder.join(format!("{name}.cfg"));
        fs::write(&file, &text)?;
        peer.configurations
            .insert(format!("{NAME}: {name}.cfg"), text);
        let mut command = Command::new(binary);
        command.arg("-db").arg("-f").arg(&file);
        let mut process = Process::start(name, command, folder)?;
        process.listening(address).await?;
        peer.hops.push(process);
    }
    Ok(peer)
}

fn caller(folder: &Path, listen: SocketAddr, called: SocketAddr) -> String {
    let folder = folder.display();
    config(&format!(
        "frontend outbound
    bind {listen} backlog 4096
    default_backend called
backend called
    http-reuse always
    server called {called} ssl verify required ca-file {folder}/root.pem crt {folder}/caller.both verifyhost called pool-max-conn 1024 pool-purge-delay 60s
"
    ))
}

fn called(folder: &Path, listen: SocketAddr, backend: SocketAddr) -> String {
    let folder = folder.display();
    let rule = |account: &str, prefix: &str| {
        format!(
            "    http-request allow if {{ ssl_c_s_dn(CN) -m str {account} }} {{ path_beg {prefix} }} {{ method GET POST }}\n"
        )
    };
    let others =
        (1..RULES).map(|number| rule(&format!("other-{number}"), &format!("/other-{number}/")));
    let others: String = others.collect();
    config(&format!(
        "frontend inbound
    bind {listen} ssl crt {folder}/called.both ca-file {folder}/root.pem verify required alpn http/1.1 backlog 4096
{others}{}    http-request deny deny_status 403
    default_backend application
backend application
    http-reuse always
    server application {backend} pool-max-conn 1024 pool-purge-delay 60s
",
        rule("caller", "/bytes/")
    ))
}

fn config(sections: &str) -> String {
    format!(
        "global
    nbthread 1
    maxconn 8192
    log stdout format raw local0 info
    ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
    ssl-default-server-options ssl-min-ver TLSv1.3 no-tls-tickets
defaults
    mode http
    log global
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout http-keep-alive 1h
    log-format '{{\"time\":\"%[date,ltime(%Y-%m-%dT%H:%M:%S)].%ms\",\"duration_ms\":%Ta,\"protocol\":\"%HV\",\"source\":\"%[ssl_c_s_dn(CN)]\",\"source_address\":\"%ci\",\"destination_address\":\"%si:%sp\",\"method\":\"%HM\",\"path\":\"%HPO\",\"status\":%ST,\"request_bytes\":%U,\"response_bytes\":%B,\"tls_version\":\"%sslv\"}}'
{sections}"
    )
}
