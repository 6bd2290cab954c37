//! Every class of bad certificate, over real handshakes: presented by a client and by a server,
//! before and after the credentials of the refusing end were swapped. Each has its own reason.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::too_many_lines,
    missing_docs,
    dead_code,
    unreachable_pub,
    reason = "tests"
)]

#[path = "support/ca.rs"]
mod ca;
#[path = "support/hostile.rs"]
mod hostile;

use std::sync::Arc;
use std::time::Duration;

use ca::{Authority, id, leaf_params, moment, start, trust_of, uri};
use hostile::{hostile_client, hostile_server};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use sidegate_mesh::clock::ManualClock;
use sidegate_mtls::{
    ALPN, Acceptor, Connector, CredentialStore, HandshakeError, Peer, Revocations, Serial, Trust,
    Verifier, VerifyLimits, WorkloadKey,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const TIMEOUT: Duration = Duration::from_hours(1);
const SAN: &[u64] = &[2, 5, 29, 17];
const KEY_USAGE: &[u64] = &[2, 5, 29, 15];
const UNKNOWN: &[u64] = &[1, 3, 6, 1, 4, 1, 55555, 1];
const NAME_CONSTRAINTS: &[u64] = &[2, 5, 29, 30];

/// What a hostile peer presents.
struct Bad {
    name: &'static str,
    reason: &'static str,
    chain: Vec<CertificateDer<'static>>,
    /// PKCS#8.
    key: Vec<u8>,
}

/// The authorities of the world in which the tests happen.
struct World {
    root: Authority,
    issuer: Authority,
    next_root: Authority,
    partner: Authority,
    expired: Authority,
    revoked_issuer: Authority,
    clock: ManualClock,
}

impl World {
    fn new() -> Self {
        let root = Authority::root("mesh.local");
        Self {
            issuer: root.intermediate(),
            revoked_issuer: root
                .intermediate_with(|params| params.serial_number = Some(SerialNumber::from(666))),
            next_root: Authority::root("mesh.local"),
            partner: Authority::root("partner.example"),
            expired: Authority::root_with("old.example", |params| {
                params.not_before = moment(start() - Duration::from_hours(48));
                params.not_after = moment(start() - Duration::from_secs(1));
            }),
            root,
            clock: ManualClock::new(start()),
        }
    }

    fn trust(&self, sequence: u64, roots: &[&Authority]) -> Trust {
        let trust = trust_of(
            sequence,
            &[
                ("mesh.local", roots),
                ("partner.example", &[&self.partner]),
                ("old.example", &[&self.expired]),
                ("gone.example", &[]),
            ],
        );
        let serials = ["ba", "029a"].map(|serial| serial.parse::<Serial>().unwrap());
        Trust {
            revocations: Arc::new(Revocations::new([id("shop/thief")], serials)),
            ..trust
        }
    }

    /// Our end, before any swap.
    fn fresh(&self) -> Arc<CredentialStore> {
        let store = ca::empty_store(Arc::new(self.clock.clone()));
        let svid = self.issuer.svid(&id("shop/orders"));
        store.publish(svid, self.trust(1, &[&self.root])).unwrap();
        store
    }

    /// Our end, after its SVID, its key and its trust were replaced while it runs.
    fn swapped(&self) -> Arc<CredentialStore> {
        let store = self.fresh();
        let both = [&self.root, &self.next_root];
        store.publish_trust(self.trust(2, &both)).unwrap();
        let svid = self.next_root.intermediate().svid(&id("shop/orders"));
        store.publish_svid(svid).unwrap();
        store
    }

    fn leaf(
        &self,
        name: &'static str,
        reason: &'static str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Bad {
        let (leaf, key) = self.issuer.leaf_with(&id("shop/web"), change);
        Bad::new(name, reason, vec![leaf, self.issuer.der.clone()], &key)
    }

    fn uris(&self, name: &'static str, reason: &'static str, uris: &[&str]) -> Bad {
        self.leaf(name, reason, |params| {
            params.subject_alt_names = uris.iter().map(|text| uri(text)).collect();
        })
    }

    fn issued_by(name: &'static str, reason: &'static str, issuer: &Authority) -> Bad {
        let (leaf, key) = issuer.leaf_with(&id("shop/web"), |_| {});
        Bad::new(name, reason, vec![leaf, issuer.der.clone()], &key)
    }

    fn intermediate(
        &self,
        name: &'static str,
        reason: &'static str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Bad {
        Self::issued_by(name, reason, &self.root.intermediate_with(change))
    }
}

impl Bad {
    fn new(
        name: &'static str,
        reason: &'static str,
        chain: Vec<CertificateDer<'static>>,
        key: &WorkloadKey,
    ) -> Self {
        Self {
            name,
            reason,
            chain,
            key: key.pkcs8().to_vec(),
        }
    }

    fn certified(&self) -> Arc<CertifiedKey> {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.as_slice()));
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).unwrap();
        Arc::new(CertifiedKey::new(self.chain.clone(), key))
    }
}

fn extension(oid: &[u64], critical: bool, content: &[u8]) -> CustomExtension {
    let mut extension = CustomExtension::from_oid_content(oid, content.to_vec());
    extension.set_criticality(critical);
    extension
}

fn bad_times(world: &World) -> Vec<Bad> {
    let hour = Duration::from_hours(1);
    vec![
        world.leaf("expired a second ago", "expired", |params| {
            params.not_after = moment(start() - Duration::from_secs(1));
        }),
        world.leaf("valid in a second", "not_yet_valid", |params| {
            params.not_before = moment(start() + Duration::from_secs(1));
        }),
        world.leaf("a month long", "lifetime_too_long", |params| {
            params.not_after = moment(start() + 720 * hour);
        }),
        world.intermediate("intermediate expired", "issuer_expired", |params| {
            params.not_before = moment(start() - 2 * hour);
            params.not_after = moment(start() - Duration::from_secs(1));
        }),
        world.intermediate("intermediate not yet valid", "issuer_expired", |params| {
            params.not_before = moment(start() + Duration::from_secs(1));
        }),
        {
            let (leaf, key) = world.expired.leaf_with(
                &"spiffe://old.example/ns/shop/sa/web".parse().unwrap(),
                |_| {},
            );
            Bad::new("root expired", "root_expired", vec![leaf], &key)
        },
    ]
}

fn bad_names(world: &World) -> Vec<Bad> {
    let web = "spiffe://mesh.local/ns/shop/sa/web";
    vec![
        world.leaf("no alternative name", "no_uri_san", |params| {
            params.subject_alt_names.clear();
        }),
        world.leaf("a DNS name only", "no_uri_san", |params| {
            params.subject_alt_names = vec![SanType::DnsName("web.shop".try_into().unwrap())];
        }),
        world.uris(
            "two URIs",
            "several_uri_sans",
            &[web, "spiffe://mesh.local/ns/shop/sa/admin"],
        ),
        world.uris("the same URI twice", "several_uri_sans", &[web, web]),
        world.uris(
            "an http URI beside ours",
            "several_uri_sans",
            &["http://x/", web],
        ),
        world.uris(
            "an http URI",
            "bad_spiffe_id",
            &["http://mesh.local/ns/shop/sa/web"],
        ),
        world.uris(
            "upper-case scheme",
            "bad_spiffe_id",
            &["SPIFFE://mesh.local/a"],
        ),
        world.uris(
            "upper-case trust domain",
            "bad_spiffe_id",
            &["spiffe://Mesh.local/a"],
        ),
        world.uris(
            "trailing slash",
            "bad_spiffe_id",
            &["spiffe://mesh.local/ns/shop/"],
        ),
        world.uris(
            "empty segment",
            "bad_spiffe_id",
            &["spiffe://mesh.local/ns//web"],
        ),
        world.uris(
            "dot segments",
            "bad_spiffe_id",
            &["spiffe://mesh.local/ns/../web"],
        ),
        world.uris(
            "percent encoding",
            "bad_spiffe_id",
            &["spiffe://mesh.local/n%73/web"],
        ),
        world.uris(
            "a query",
            "bad_spiffe_id",
            &["spiffe://mesh.local/ns/web?x=1"],
        ),
        world.uris(
            "a fragment",
            "bad_spiffe_id",
            &["spiffe://mesh.local/ns/web#x"],
        ),
        world.uris(
            "a port",
            "bad_spiffe_id",
            &["spiffe://mesh.local:80/ns/web"],
        ),
        world.uris(
            "user information",
            "bad_spiffe_id",
            &["spiffe://me@mesh.local/ns/web"],
        ),
        world.uris(
            "a NUL",
            "bad_spiffe_id",
            &["spiffe://mesh.local/ns/shop/sa/web\0x"],
        ),
        world.uris("no path", "id_without_path", &["spiffe://mesh.local"]),
        world.leaf("a second URI that is not text", "invalid_san", |params| {
            params.subject_alt_names.clear();
            let mut names = vec![0x86, u8::try_from(web.len()).unwrap()];
            names.extend_from_slice(web.as_bytes());
            names.extend_from_slice(&[0x86, 2, 0xff, 0xfe]);
            let mut content = vec![0x30, u8::try_from(names.len()).unwrap()];
            content.extend_from_slice(&names);
            params.custom_extensions = vec![extension(SAN, true, &content)];
        }),
        world.leaf(
            "empty subject, names not critical",
            "san_not_critical",
            |params| {
                params.subject_alt_names.clear();
                let mut content = vec![
                    0x30,
                    u8::try_from(web.len() + 2).unwrap(),
                    0x86,
                    u8::try_from(web.len()).unwrap(),
                ];
                content.extend_from_slice(web.as_bytes());
                params.custom_extensions = vec![extension(SAN, false, &content)];
            },
        ),
        world.leaf(
            "alternative names twice",
            "malformed_certificate",
            |params| {
                let content = [0x30, 4, 0x82, 2, b'a', b'b'];
                params.custom_extensions = vec![extension(SAN, true, &content)];
            },
        ),
    ]
}

fn bad_usages(world: &World) -> Vec<Bad> {
    let digital_signature = [0x03, 0x02, 0x07, 0x80];
    vec![
        world.leaf("a leaf that is a CA", "leaf_is_ca", |params| {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }),
        world.leaf("no key usage", "key_usage", |params| {
            params.key_usages.clear();
        }),
        world.leaf("may sign certificates", "key_usage", |params| {
            params.key_usages.push(KeyUsagePurpose::KeyCertSign);
        }),
        world.leaf("may sign CRLs", "key_usage", |params| {
            params.key_usages.push(KeyUsagePurpose::CrlSign);
        }),
        world.leaf("no digitalSignature", "key_usage", |params| {
            params.key_usages = vec![KeyUsagePurpose::KeyAgreement];
        }),
        world.leaf("key usage not critical", "key_usage", |params| {
            params.key_usages.clear();
            params.custom_extensions = vec![extension(KEY_USAGE, false, &digital_signature)];
        }),
        world.leaf("for servers only", "ext_key_usage", |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        }),
        world.leaf("for clients only", "ext_key_usage", |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        }),
        world.leaf("for code signing", "ext_key_usage", |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
        }),
        world.leaf(
            "an unknown critical extension",
            "critical_extension",
            |params| {
                params.custom_extensions = vec![extension(UNKNOWN, true, &[5, 0])];
            },
        ),
        world.leaf("serial number zero", "malformed_certificate", |params| {
            params.serial_number = Some(SerialNumber::from_slice(&[0]));
        }),
        world.leaf(
            "serial number of 21 bytes",
            "malformed_certificate",
            |params| {
                params.serial_number = Some(SerialNumber::from_slice(&[0x11; 21]));
            },
        ),
    ]
}

fn bad_issuers(world: &World) -> Vec<Bad> {
    let stranger = Authority::root("mesh.local");
    let (leaf_as_issuer, leaf_key) = world.issuer.leaf_with(&id("shop/web"), |_| {});
    let forged_by_leaf = {
        let key = KeyPair::try_from(leaf_key.pkcs8().as_slice()).unwrap();
        let mut params = leaf_params("spiffe://mesh.local/ns/shop/sa/web", start(), TIMEOUT);
        params.subject_alt_names.clear();
        Authority {
            params,
            key,
            der: leaf_as_issuer,
        }
    };
    let deep = world.issuer.intermediate().intermediate();
    let short = world.root.intermediate_with(|params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name.push(DnType::CommonName, "short");
    });
    let below_short = short.intermediate_with(|params| {
        params
            .distinguished_name
            .push(DnType::CommonName, "below short");
    });
    let mut bad = vec![
        World::issued_by(
            "an unknown CA of the same name",
            "unknown_issuer",
            &stranger.intermediate(),
        ),
        World::issued_by(
            "another trust domain's CA",
            "unknown_issuer",
            &world.partner.intermediate(),
        ),
        World::issued_by("issued by a leaf", "issuer_is_not_ca", &forged_by_leaf),
        World::issued_by("a revoked intermediate", "revoked", &world.revoked_issuer),
        world.intermediate("intermediate with cA=false", "issuer_is_not_ca", |params| {
            params.is_ca = IsCa::ExplicitNoCa;
        }),
        world.intermediate(
            "intermediate without keyCertSign",
            "issuer_key_usage",
            |params| {
                params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            },
        ),
        world.intermediate(
            "intermediate without key usage",
            "issuer_key_usage",
            |params| {
                params.key_usages.clear();
            },
        ),
        world.intermediate(
            "intermediate for servers only",
            "issuer_key_usage",
            |params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            },
        ),
        world.intermediate("intermediate with a workload's ID", "issuer_id", |params| {
            params.subject_alt_names = vec![uri("spiffe://mesh.local/ns/shop/sa/web")];
        }),
        world.intermediate(
            "intermediate of another trust domain",
            "issuer_id",
            |params| {
                params.subject_alt_names = vec![uri("spiffe://partner.example")];
            },
        ),
        world.intermediate(
            "intermediate with a critical unknown",
            "critical_extension",
            |params| {
                params.custom_extensions = vec![extension(UNKNOWN, true, &[5, 0])];
            },
        ),
        world.intermediate("a URI name constraint", "constraint", |params| {
            // permittedSubtrees: [6] ".other.example"
            let name = b".other.example";
            let length = u8::try_from(name.len()).unwrap();
            let mut content = vec![
                0x30,
                length + 6,
                0xa0,
                length + 4,
                0x30,
                length + 2,
                0x86,
                length,
            ];
            content.extend_from_slice(name);
            params.custom_extensions = vec![extension(NAME_CONSTRAINTS, true, &content)];
        }),
    ];
    let (leaf, key) = below_short.leaf_with(&id("shop/web"), |_| {});
    let chain = vec![leaf, below_short.der.clone(), short.der.clone()];
    bad.push(Bad::new("path length exceeded", "constraint", chain, &key));
    let (leaf, key) = deep.leaf_with(&id("shop/web"), |_| {});
    let chain = vec![
        leaf,
        deep.der.clone(),
        deep.der.clone(),
        world.issuer.der.clone(),
    ];
    bad.push(Bad::new("four certificates", "chain_too_long", chain, &key));
    bad
}

fn bad_keys_and_bytes(world: &World) -> Vec<Bad> {
    let web = id("shop/web");
    let good = || world.issuer.leaf_with(&web, |_| {});
    let mut bad = Vec::new();

    let (leaf, key) = good();
    bad.push(Bad::new(
        "intermediate missing",
        "unknown_issuer",
        vec![leaf],
        &key,
    ));

    let (leaf, key) = good();
    let mut bytes = leaf.to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let chain = vec![bytes.into(), world.issuer.der.clone()];
    bad.push(Bad::new(
        "a flipped bit in the signature",
        "bad_signature",
        chain,
        &key,
    ));

    let (leaf, _) = good();
    let thief = WorkloadKey::generate().unwrap();
    let chain = vec![leaf, world.issuer.der.clone()];
    bad.push(Bad::new(
        "somebody else's certificate",
        "bad_signature",
        chain,
        &thief,
    ));

    let (leaf, key) = good();
    let mut bytes = leaf.to_vec();
    bytes.push(0);
    let chain = vec![bytes.into(), world.issuer.der.clone()];
    bad.push(Bad::new(
        "a byte behind the certificate",
        "malformed_certificate",
        chain,
        &key,
    ));

    let (leaf, key) = good();
    let chain = vec![leaf, CertificateDer::from(vec![0x30, 0x03, 1, 1, 0])];
    bad.push(Bad::new(
        "an intermediate of garbage",
        "malformed_certificate",
        chain,
        &key,
    ));

    let rsa = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    let rsa = world.root.intermediate_of(rsa, |_| {});
    bad.push(World::issued_by("an RSA intermediate", "algorithm", &rsa));

    let p521 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
    let p521 = world.root.intermediate_of(p521, |_| {});
    bad.push(World::issued_by("a P-521 intermediate", "algorithm", &p521));

    let own = WorkloadKey::generate().unwrap();
    let mut params = leaf_params(web.as_str(), start(), TIMEOUT);
    params.distinguished_name.push(DnType::CommonName, "web");
    let own_pair = KeyPair::try_from(own.pkcs8().as_slice()).unwrap();
    let leaf = params.self_signed(&own_pair).unwrap().der().clone();
    bad.push(Bad::new("self-signed", "unknown_issuer", vec![leaf], &own));

    let root_key = WorkloadKey::from_pkcs8(world.root.key.serialize_der().into()).unwrap();
    let chain = vec![world.root.der.clone()];
    bad.push(Bad::new(
        "the root itself",
        "id_without_path",
        chain,
        &root_key,
    ));
    bad
}

fn revoked_and_foreign(world: &World) -> Vec<Bad> {
    let in_domain = |name, reason, authority: &Authority, text: &str| {
        let (leaf, key) = authority.leaf_with(&text.parse().unwrap(), |_| {});
        Bad::new(name, reason, vec![leaf, authority.der.clone()], &key)
    };
    let gone = Authority::root("gone.example").intermediate();
    let elsewhere = Authority::root("elsewhere.example").intermediate();
    vec![
        world.uris(
            "a revoked identity",
            "revoked",
            &["spiffe://mesh.local/ns/shop/sa/thief"],
        ),
        world.leaf("a revoked serial number", "revoked", |params| {
            params.serial_number = Some(SerialNumber::from_slice(&[0xba]));
        }),
        in_domain(
            "a trust domain without a bundle",
            "wrong_trust_domain",
            &elsewhere,
            "spiffe://elsewhere.example/ns/shop/sa/web",
        ),
        in_domain(
            "a trust domain with an empty bundle",
            "unknown_issuer",
            &gone,
            "spiffe://gone.example/ns/shop/sa/web",
        ),
        in_domain(
            "our CA for the partner's trust domain",
            "unknown_issuer",
            &world.issuer,
            "spiffe://partner.example/ns/shop/sa/web",
        ),
    ]
}

fn every_class(world: &World) -> Vec<Bad> {
    let mut bad = bad_times(world);
    bad.extend(bad_names(world));
    bad.extend(bad_usages(world));
    bad.extend(bad_issuers(world));
    bad.extend(bad_keys_and_bytes(world));
    bad.extend(revoked_and_foreign(world));
    bad
}

/// A hostile client calls us; returns our end's refusal and the alert that the client saw.
async fn refused_client(
    store: &Arc<CredentialStore>,
    config: rustls::ClientConfig,
) -> (Result<Peer, HandshakeError>, String) {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let clock = Arc::clone(store.clock());
    let acceptor = Acceptor::new(Arc::clone(store), TIMEOUT, clock);
    let client = async {
        let name = ServerName::try_from("x.invalid").unwrap();
        let connected = TlsConnector::from(Arc::new(config))
            .connect(name, theirs)
            .await;
        match connected {
            Err(error) => error.to_string(),
            // TLS 1.3: a client learns of its refusal when it reads.
            Ok(mut stream) => {
                let mut byte = [0];
                let read = stream.read(&mut byte).await;
                read.map_or_else(|error| error.to_string(), |count| format!("{count} bytes"))
            }
        }
    };
    let server = async { acceptor.accept(ours).await.map(|(_, peer)| peer) };
    tokio::join!(server, client)
}

/// We call a hostile server; returns our refusal and how many bytes of ours it received.
async fn refused_server(
    store: &Arc<CredentialStore>,
    config: rustls::ServerConfig,
    expected: &str,
) -> (Result<Peer, HandshakeError>, Result<usize, String>) {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let clock = Arc::clone(store.clock());
    let connector = Connector::new(Arc::clone(store), TIMEOUT, clock);
    let expected = expected.parse().unwrap();
    let client = async {
        let (mut stream, peer) = connector.connect(ours, &expected).await?;
        stream.write_all(b"request").await.unwrap();
        stream.shutdown().await.unwrap();
        Ok(peer)
    };
    let server = async {
        let mut stream = TlsAcceptor::from(Arc::new(config))
            .accept(theirs)
            .await
            .map_err(|error| error.to_string())?;
        let mut received = Vec::new();
        let read = stream.read_to_end(&mut received).await;
        read.map_err(|error| error.to_string())?;
        Ok(received.len())
    };
    tokio::join!(client, server)
}

fn expected_of(bad: &Bad) -> &'static str {
    match bad.name {
        "root expired" => "spiffe://old.example/ns/shop/sa/web",
        _ => "spiffe://mesh.local/ns/shop/sa/web",
    }
}

#[track_caller]
fn check(bad: &Bad, side: &str, result: Result<Peer, HandshakeError>) {
    let refusal = match result {
        Ok(peer) => panic!("{side}: {:?} was believed as {}", bad.name, peer.id),
        Err(refusal) => refusal,
    };
    assert_eq!(
        refusal.code(),
        bad.reason,
        "{side}: {:?}: {refusal:?}",
        bad.name
    );
}

#[tokio::test]
async fn every_class_is_refused_on_both_sides_before_and_after_a_swap() {
    let world = World::new();
    let classes = every_class(&world);
    assert!(classes.len() >= 30, "only {} classes", classes.len());
    for (when, store) in [("before", world.fresh()), ("after", world.swapped())] {
        for bad in &classes {
            let client = hostile_client(Some(bad.certified()), &[ALPN]);
            let (result, alert) = refused_client(&store, client).await;
            check(bad, &format!("client, {when}"), result);
            assert!(
                alert.contains("alert"),
                "{when}: {:?}: client saw {alert}",
                bad.name
            );

            let server = hostile_server(bad.certified(), &[ALPN]);
            let (result, received) = refused_server(&store, server, expected_of(bad)).await;
            check(bad, &format!("server, {when}"), result);
            assert!(
                received.is_err(),
                "{when}: {:?} received {received:?}",
                bad.name
            );
        }
    }
}

#[tokio::test]
async fn a_good_certificate_passes_on_both_sides_before_and_after_a_swap() {
    let world = World::new();
    let (leaf, key) = world.issuer.leaf_with(&id("shop/web"), |_| {});
    let good = Bad::new("good", "", vec![leaf, world.issuer.der.clone()], &key);
    for store in [world.fresh(), world.swapped()] {
        let client = hostile_client(Some(good.certified()), &[ALPN]);
        let (result, _) = refused_client(&store, client).await;
        let peer = result.unwrap();
        assert_eq!(peer.id, id("shop/web"));
        assert_eq!(peer.tls_version, "TLSv1.3");
        let server = hostile_server(good.certified(), &[ALPN]);
        let (result, received) = refused_server(&store, server, id("shop/web").as_str()).await;
        assert_eq!(result.unwrap().id, id("shop/web"));
        assert_eq!(received, Ok(7));
    }
}

#[tokio::test]
async fn a_valid_peer_that_is_not_the_expected_one_receives_nothing() {
    let world = World::new();
    let (leaf, key) = world.issuer.leaf_with(&id("jobs/batch"), |_| {});
    let other = Bad::new("other", "", vec![leaf, world.issuer.der.clone()], &key);
    for store in [world.fresh(), world.swapped()] {
        let server = hostile_server(other.certified(), &[ALPN]);
        let (result, received) = refused_server(&store, server, id("shop/web").as_str()).await;
        let refusal = result.unwrap_err();
        assert_eq!(refusal.code(), "unexpected_identity");
        assert_eq!(refusal.claimed(), Some(id("jobs/batch").as_str()));
        assert!(received.unwrap_err().contains("AccessDenied"));
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let world = World::new();
    for store in [world.fresh(), world.swapped()] {
        let (result, alert) = refused_client(&store, hostile_client(None, &[ALPN])).await;
        assert_eq!(result.unwrap_err().code(), "no_certificate");
        assert!(alert.contains("alert"), "{alert}");
    }
}

#[tokio::test]
async fn the_refused_peers_claim_is_known_and_the_alert_fits() {
    let world = World::new();
    let store = world.fresh();
    for (reason, alert) in [
        ("expired", "CertificateExpired"),
        ("unknown_issuer", "UnknownCA"),
        ("revoked", "CertificateRevoked"),
        ("key_usage", "UnsupportedCertificate"),
        ("several_uri_sans", "BadCertificate"),
    ] {
        let classes = every_class(&world);
        let bad = classes.iter().find(|bad| bad.reason == reason).unwrap();
        let client = hostile_client(Some(bad.certified()), &[ALPN]);
        let (result, seen) = refused_client(&store, client).await;
        let refusal = result.unwrap_err();
        assert!(seen.contains(alert), "{reason}: {seen}");
        let claimed = refusal.claimed().unwrap();
        assert!(
            claimed.starts_with("spiffe://mesh.local/"),
            "{reason}: {claimed}"
        );
    }
}

#[tokio::test]
async fn both_ends_must_name_our_protocol() {
    let world = World::new();
    let (leaf, key) = world.issuer.leaf_with(&id("shop/web"), |_| {});
    let good = Bad::new("good", "", vec![leaf, world.issuer.der.clone()], &key);
    let store = world.fresh();
    for alpn in [
        &[][..],
        &[b"h2".as_slice()][..],
        &[b"sidegate/2".as_slice()][..],
    ] {
        let client = hostile_client(Some(good.certified()), alpn);
        let (result, _) = refused_client(&store, client).await;
        assert_eq!(result.unwrap_err().code(), "alpn", "{alpn:?}");
        let server = hostile_server(good.certified(), alpn);
        let (result, received) = refused_server(&store, server, id("shop/web").as_str()).await;
        assert_eq!(result.unwrap_err().code(), "alpn", "{alpn:?}");
        assert_ne!(received, Ok(7));
    }
}

#[tokio::test]
async fn a_root_that_may_not_sign_never_enters_a_bundle() {
    let refuse = |change: &dyn Fn(&mut CertificateParams)| {
        let root = Authority::root_with("mesh.local", change);
        let mut bundles = sidegate_mtls::BundleSet::new(1);
        let error = bundles
            .insert(&ca::trust_domain("mesh.local"), vec![root.der])
            .unwrap_err();
        match error {
            sidegate_mtls::BundleError::Root { reason, .. } => reason.code(),
            other => panic!("{other}"),
        }
    };
    assert_eq!(
        refuse(&|params| params.is_ca = IsCa::NoCa),
        "issuer_is_not_ca"
    );
    assert_eq!(
        refuse(&|params| params.key_usages.clear()),
        "issuer_key_usage"
    );
    let unknown = |params: &mut CertificateParams| {
        params.custom_extensions = vec![extension(UNKNOWN, true, &[5, 0])];
    };
    assert_eq!(refuse(&unknown), "critical_extension");
    let workload = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![uri("spiffe://mesh.local/ns/shop/sa/web")];
    };
    assert_eq!(refuse(&workload), "issuer_id");
    let foreign = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![uri("spiffe://partner.example")];
    };
    assert_eq!(refuse(&foreign), "issuer_id");
    let world = World::new();
    let (leaf, _) = world.issuer.leaf_with(&id("shop/web"), |_| {});
    let mut bundles = sidegate_mtls::BundleSet::new(1);
    assert!(
        bundles
            .insert(&ca::trust_domain("mesh.local"), vec![leaf])
            .is_err()
    );
}

#[tokio::test]
async fn one_root_never_serves_two_trust_domains() {
    let root = Authority::root_with("mesh.local", |params| params.subject_alt_names.clear());
    let mut bundles = sidegate_mtls::BundleSet::new(1);
    bundles
        .insert(&ca::trust_domain("mesh.local"), vec![root.der.clone()])
        .unwrap();
    let again = bundles.insert(&ca::trust_domain("partner.example"), vec![root.der]);
    assert!(matches!(
        again,
        Err(sidegate_mtls::BundleError::SharedRoot { .. })
    ));
}

#[test]
fn a_chain_whose_signatures_are_known_is_judged_anew() {
    let world = World::new();
    let svid = world.issuer.svid(&id("shop/web"));
    let verifier = Verifier::from_trust(world.trust(1, &[&world.root]), VerifyLimits::default());
    let code = |chain: &[CertificateDer<'_>], now, expected| {
        let judged = verifier.verify(chain, now, expected);
        judged.err().map(|refusal| refusal.code())
    };
    for _ in 0..2 {
        assert_eq!(code(&svid.chain, start(), None), None);
    }
    let over = svid.not_after + Duration::from_secs(1);
    assert_eq!(code(&svid.chain, over, None), Some("expired"));
    let other = id("shop/orders");
    let expected = Some(&other);
    assert_eq!(
        code(&svid.chain, start(), expected),
        Some("unexpected_identity")
    );
    // The account's first letter, and the signature's last byte.
    let leaf = svid.chain[0].as_ref();
    let name = leaf
        .windows(8)
        .position(|bytes| bytes == b"shop/sa/")
        .unwrap()
        + 8;
    for at in [name, leaf.len() - 1] {
        let mut forged = leaf.to_vec();
        forged[at] ^= 1;
        let mut chain = svid.chain.clone();
        chain[0] = forged.into();
        assert_eq!(code(&chain, start(), None), Some("bad_signature"), "{at}");
    }
}
