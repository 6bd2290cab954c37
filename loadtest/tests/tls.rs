//! `sidegate-loadtest run` over TLS: who is trusted, and who we say we are.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests"
)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::PrivateKeyDer;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// A root and two leaves of it, as files; returns what a server that asks for certificates needs.
fn certificates(folder: &Path) -> ServerConfig {
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = root.self_signed(&key).unwrap();
    std::fs::write(folder.join("root.pem"), certificate.pem()).unwrap();
    let issuer = Issuer::new(root, key);
    let leaf = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &issuer).unwrap(), key)
    };
    let (client, key) = leaf("client");
    std::fs::write(folder.join("client.pem"), client.pem()).unwrap();
    std::fs::write(folder.join("client.key"), key.serialize_pem()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let (server, key) = leaf("localhost");
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![server.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

fn serve(config: ServerConfig) -> SocketAddr {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            let acceptor = TlsAcceptor::from(Arc::new(config));
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                connections.spawn(async move {
                    let Ok(session) = acceptor.accept(stream).await else {
                        return;
                    };
                    let http2 = session.get_ref().1.alpn_protocol() == Some(b"h2".as_slice());
                    let answer = service_fn(|_| async {
                        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"fine"))))
                    });
                    let io = TokioIo::new(session);
                    if http2 {
                        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        server.serve_connection(io, answer).await.ok();
                    } else {
                        let server = hyper::server::conn::http1::Builder::new();
                        server.serve_connection(io, answer).await.ok();
                    }
                });
            }
        });
    });
    receiver.recv().unwrap()
}

#[test]
fn server_is_verified_and_the_client_shows_its_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let port = serve(certificates(folder.path())).port();
    let check = |host: &str, flags: &str, words: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_sidegate-loadtest"))
            .args(["run", "--url", &format!("https://{host}:{port}/")])
            .args("--duration 500ms --warmup 0s --rate 100 --connections 2".split(' '))
            .args(flags.split_whitespace())
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        let out = String::from_utf8_lossy(&output.stdout);
        assert_eq!(
            output.status.success(),
            words.is_empty(),
            "{flags}: {told}{out}"
        );
        assert!(
            words.is_empty() && out.contains("50 × status 200") || told.contains(words),
            "{flags}: {told}{out}"
        );
    };
    let own = "--cert client.pem --key client.key";
    check("localhost", &format!("--ca root.pem {own}"), "");
    check(
        "localhost",
        &format!("--ca root.pem {own} --protocol http2"),
        "",
    );
    check("127.0.0.1", &format!("--insecure {own}"), "");
    check(
        "localhost",
        &format!("--ca root.pem {own} --alpn sidegate/1"),
        "TLS handshake",
    );
    check(
        "127.0.0.1",
        &format!("--ca root.pem {own}"),
        "TLS handshake",
    );
    check("localhost", own, "TLS handshake");
    // In TLS 1.3 a client hears of its missing certificate with the first answer.
    check("localhost", "--ca root.pem", "calls failed");
}
