//! The client's side of TLS.
//!
//! Invariant: a server is verified unless `--insecure` says otherwise, and every handshake is a full
//! one: a resumed session would not cost what a new caller's does.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::kx_group;
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::target::{KeyExchange, TlsFiles, read};

/// Where distributions keep the public roots.
const SYSTEM_ROOTS: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// What connections are made with; `alpn` is the one protocol offered.
///
/// # Errors
///
/// When a file cannot be read or holds nothing usable.
pub(crate) fn client(files: &TlsFiles, alpn: &str) -> anyhow::Result<ClientConfig> {
    let provider = Arc::new(CryptoProvider {
        kx_groups: match files.key_exchange {
            KeyExchange::Hybrid => vec![
                kx_group::X25519MLKEM768,
                kx_group::X25519,
                kx_group::SECP256R1,
                kx_group::SECP384R1,
            ],
            KeyExchange::X25519 => vec![kx_group::X25519],
        },
        ..aws_lc_rs::default_provider()
    });
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?;
    let builder = if files.insecure {
        let anyone = Arc::new(Anyone { provider });
        builder.dangerous().with_custom_certificate_verifier(anyone)
    } else {
        builder.with_root_certificates(roots(files.ca.as_deref())?)
    };
    let mut config = match (&files.cert, &files.key) {
        (Some(cert), Some(key)) => {
            let key = PrivateKeyDer::from_pem_slice(&read(key)?)
                .with_context(|| format!("{} holds no private key", key.display()))?;
            builder.with_client_auth_cert(certificates(cert)?, key)?
        }
        _ => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    Ok(config)
}

fn roots(ca: Option<&Path>) -> anyhow::Result<RootCertStore> {
    let file = match ca {
        Some(file) => file,
        None => SYSTEM_ROOTS
            .iter()
            .map(Path::new)
            .find(|file| file.exists())
            .context("this system has no file of trusted roots; name one with --ca")?,
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates(file)?);
    anyhow::ensure!(
        !roots.is_empty(),
        "{} holds no usable certificate",
        file.display()
    );
    Ok(roots)
}

fn certificates(file: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let pem = read(file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.with_context(|| format!("{} is not PEM", file.display()))?;
    anyhow::ensure!(!found.is_empty(), "{} holds no certificate", file.display());
    Ok(found)
}

/// `--insecure`: any certificate will do; signatures are verified all the same.
#[derive(Debug)]
struct Anyone {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let schemes = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, schemes)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let schemes = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, schemes)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
