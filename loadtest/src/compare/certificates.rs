//! Certificates for peers: one root, and a P-256 leaf for each end with its SPIFFE ID.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

/// The SPIFFE ID of one end.
pub(crate) fn spiffe_id(account: &str) -> String {
    format!("spiffe://mesh.local/ns/bench/sa/{account}")
}

/// Writes `root.pem`, and for each account `ACCOUNT.pem` and `ACCOUNT.key`, into `folder`.
///
/// # Errors
///
/// When a file cannot be written.
pub(crate) fn write(folder: &Path, accounts: &[&str]) -> anyhow::Result<()> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let key = KeyPair::generate()?;
    let root = params.self_signed(&key)?;
    fs::write(folder.join("root.pem"), root.pem())?;
    let issuer = Issuer::new(params, key);
    for account in accounts {
        let mut params = CertificateParams::default();
        // By name and subject for peers that read no SPIFFE ID.
        params.subject_alt_names = vec![
            SanType::URI(spiffe_id(account).as_str().try_into()?),
            SanType::DnsName((*account).try_into()?),
        ];
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, *account);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &issuer)?;
        fs::write(folder.join(format!("{account}.pem")), leaf.pem())?;
        fs::write(folder.join(format!("{account}.key")), key.serialize_pem())?;
    }
    Ok(())
}
