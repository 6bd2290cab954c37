//! What two ends agree on, and what they never do: old versions, resumption, waiting for ever.
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

use ca::{Authority, id, start, trust_of};
use hostile::{contrary_client, hostile_client};
use rustls::HandshakeKind;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use sidegate_mesh::clock::ManualClock;
use sidegate_mtls::{
    ALPN, ALPN_H2, Acceptor, Connector, CredentialStore, Door, DoorLimits, Doorkeeper,
    HandshakeError, Hello, HelloReader, PublishError, Revocations, Svid, Trust,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected as _;

const TIMEOUT: Duration = Duration::from_secs(5);

struct World {
    clock: ManualClock,
    root: Authority,
    issuer: Authority,
}

impl World {
    fn new() -> Self {
        let root = Authority::root("mesh.local");
        Self {
            clock: ManualClock::new(start()),
            issuer: root.intermediate(),
            root,
        }
    }

    fn trust(&self, sequence: u64) -> Trust {
        trust_of(sequence, &[("mesh.local", &[&self.root])])
    }

    fn store(&self, name: &str) -> Arc<CredentialStore> {
        let store = ca::empty_store(Arc::new(self.clock.clone()));
        store
            .publish(self.issuer.svid(&id(name)), self.trust(1))
            .unwrap();
        store
    }

    fn acceptor(&self, store: &Arc<CredentialStore>) -> Acceptor {
        Acceptor::new(Arc::clone(store), TIMEOUT, Arc::new(self.clock.clone()))
    }

    fn connector(&self, store: &Arc<CredentialStore>) -> Connector {
        Connector::new(Arc::clone(store), TIMEOUT, Arc::new(self.clock.clone()))
    }
}

fn pipe() -> (DuplexStream, DuplexStream) {
    tokio::io::duplex(64 * 1024)
}

fn certified(svid: &Svid) -> Arc<CertifiedKey> {
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(svid.key().pkcs8().as_slice()));
    let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&der).unwrap();
    Arc::new(CertifiedKey::new(svid.chain.clone(), key))
}

#[tokio::test]
async fn two_sidecars_agree_on_tls13_aes_128_gcm_and_a_hybrid_key_exchange() {
    let world = World::new();
    let (web, orders) = (world.store("shop/web"), world.store("shop/orders"));
    let (near, far) = pipe();
    let expected = id("shop/orders");
    let (connector, acceptor) = (world.connector(&web), world.acceptor(&orders));
    let (connected, accepted) =
        tokio::join!(connector.connect(near, &expected), acceptor.accept(far));
    let ((stream, server), (_, client)) = (connected.unwrap(), accepted.unwrap());
    assert_eq!((&server.id, &client.id), (&expected, &id("shop/web")));
    assert_eq!(
        (server.tls_version, client.tls_version),
        ("TLSv1.3", "TLSv1.3")
    );
    assert_eq!((server.epoch, client.epoch), (1, 1));
    let (_, connection) = stream.get_ref();
    let suite = connection.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    let group = connection.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    assert_eq!(connection.alpn_protocol(), Some(ALPN));
}

#[tokio::test]
async fn the_accepting_end_chooses_the_suite() {
    let world = World::new();
    let acceptor = world.acceptor(&world.store("shop/orders"));
    let web = world.issuer.svid(&id("shop/web"));
    let (near, far) = pipe();
    let name = ServerName::try_from("x.invalid").unwrap();
    let connector = TlsConnector::from(Arc::new(contrary_client(certified(&web), &[ALPN])));
    let (connected, accepted) = tokio::join!(connector.connect(name, near), acceptor.accept(far));
    accepted.unwrap();
    let connected = connected.unwrap();
    let (_, connection) = connected.get_ref();
    let suite = connection.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
}

#[tokio::test]
async fn nothing_is_ever_resumed() {
    let world = World::new();
    let orders = world.store("shop/orders");
    let acceptor = world.acceptor(&orders);
    let web = world.issuer.svid(&id("shop/web"));
    // A client that would love to resume: one configuration, one session store.
    let config = Arc::new(hostile_client(Some(certified(&web)), &[ALPN]));
    for _ in 0..3 {
        let (near, far) = pipe();
        let client = async {
            let name = ServerName::try_from("x.invalid").unwrap();
            let connector = TlsConnector::from(Arc::clone(&config));
            let mut stream = connector.connect(name, near).await.unwrap();
            let mut answer = [0; 2];
            stream.read_exact(&mut answer).await.unwrap();
            let (_, connection) = stream.get_ref();
            assert_ne!(connection.handshake_kind(), Some(HandshakeKind::Resumed));
            assert_eq!(connection.tls13_tickets_received(), 0);
            assert!(!connection.is_early_data_accepted());
        };
        let server = async {
            let (mut stream, _) = acceptor.accept(far).await.unwrap();
            stream.write_all(b"ok").await.unwrap();
            stream.flush().await.unwrap();
        };
        tokio::join!(client, server);
    }
    // So a revoked client, who was welcome a moment ago, has no way back in.
    let revocations = Arc::new(Revocations::new([], [web.serial.clone()]));
    let trust = Trust {
        revocations,
        ..world.trust(2)
    };
    orders.publish_trust(trust).unwrap();
    let (near, far) = pipe();
    let name = ServerName::try_from("x.invalid").unwrap();
    let connector = TlsConnector::from(config);
    let (_, accepted) = tokio::join!(connector.connect(name, near), acceptor.accept(far));
    assert_eq!(accepted.unwrap_err().code(), "revoked");
}

#[tokio::test]
async fn a_tls_1_2_client_is_refused_with_the_alert_that_says_so() {
    let world = World::new();
    let orders = world.store("shop/orders");
    let (mut near, far) = pipe();
    // A ClientHello for TLS 1.2: ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, P-256, no supported_versions.
    let mut hello = vec![3, 3];
    hello.extend_from_slice(&[7; 32]);
    hello.extend_from_slice(&[0, 0, 2, 0xc0, 0x2b, 1, 0]);
    let extensions = [
        0, 10, 0, 4, 0, 2, 0, 23, // supported_groups
        0, 11, 0, 2, 1, 0, // ec_point_formats
        0, 13, 0, 4, 0, 2, 4, 3, // signature_algorithms
    ];
    hello.extend_from_slice(&u16::try_from(extensions.len()).unwrap().to_be_bytes());
    hello.extend_from_slice(&extensions);
    let length = u16::try_from(hello.len()).unwrap();
    let mut record = vec![22, 3, 1];
    record.extend_from_slice(&(length + 4).to_be_bytes());
    record.extend_from_slice(&[1, 0]);
    record.extend_from_slice(&length.to_be_bytes());
    record.extend_from_slice(&hello);
    near.write_all(&record).await.unwrap();
    let refused = world.acceptor(&orders).accept(far).await.unwrap_err();
    assert_eq!(refused.code(), "tls", "{refused:?}");
    let mut alert = Vec::new();
    near.read_to_end(&mut alert).await.unwrap();
    // Fatal, protocol_version.
    assert_eq!(alert.get(5..), Some(&[2, 70][..]), "{alert:?}");
}

#[tokio::test]
async fn plaintext_and_a_lost_connection_have_reasons_of_their_own() {
    let world = World::new();
    let orders = world.store("shop/orders");
    let (mut near, far) = pipe();
    near.write_all(b"GET / HTTP/1.1\r\nhost: orders.shop\r\n\r\n")
        .await
        .unwrap();
    let refused = world.acceptor(&orders).accept(far).await.unwrap_err();
    assert_eq!((refused.code(), refused.claimed()), ("tls", None));
    let (near, far) = pipe();
    drop(near);
    let refused = world.acceptor(&orders).accept(far).await.unwrap_err();
    assert_eq!(refused.code(), "connection_lost");
}

#[tokio::test]
async fn a_silent_peer_is_given_up_in_time_on_both_sides() {
    let world = World::new();
    let (web, orders) = (world.store("shop/web"), world.store("shop/orders"));
    let advance = async {
        // Both wait in this task for the same moment, which counts as one.
        while world.clock.sleepers() == 0 {
            tokio::task::yield_now().await;
        }
        world
            .clock
            .advance(TIMEOUT.saturating_sub(Duration::from_millis(1)));
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(world.clock.sleepers(), 1, "given up too early");
        world.clock.advance(Duration::from_millis(1));
    };
    let ((near, _silent), (far, _mute)) = (pipe(), pipe());
    let expected = id("shop/orders");
    let (connector, acceptor) = (world.connector(&web), world.acceptor(&orders));
    let (connected, accepted, ()) = tokio::join!(
        connector.connect(near, &expected),
        acceptor.accept(far),
        advance
    );
    assert_eq!(connected.unwrap_err().code(), "handshake_timeout");
    assert_eq!(accepted.unwrap_err().code(), "handshake_timeout");
}

#[tokio::test]
async fn without_an_svid_nothing_is_accepted_or_called() {
    let world = World::new();
    let empty = ca::empty_store(Arc::new(world.clock.clone()));
    let (near, far) = pipe();
    let refused = world.acceptor(&empty).accept(far).await.unwrap_err();
    assert!(matches!(refused, HandshakeError::NotReady));
    let refused = world.connector(&empty).connect(near, &id("shop/web")).await;
    assert_eq!(refused.unwrap_err().code(), "not_ready");
    assert!(!empty.is_ready());
    assert!(matches!(
        empty.publish_trust(world.trust(1)),
        Err(PublishError::NoSvid)
    ));
}

#[tokio::test]
async fn the_control_plane_lets_in_who_has_no_svid_yet_but_nobody_with_a_bad_one() {
    let world = World::new();
    let store = world.store("sidegate-system/sidegate-ca");
    let clock = Arc::new(world.clock.clone());
    let acceptor = Acceptor::control_plane(Arc::clone(&store), TIMEOUT, clock);
    let connect = |config: rustls::ClientConfig| {
        let acceptor = acceptor.clone();
        async move {
            let (near, far) = pipe();
            let name = ServerName::try_from("x.invalid").unwrap();
            let connector = TlsConnector::from(Arc::new(config));
            let (connected, accepted) =
                tokio::join!(connector.connect(name, near), acceptor.accept_optional(far));
            drop(connected);
            accepted.map(|(_, peer)| peer)
        }
    };
    assert!(
        connect(hostile_client(None, &[ALPN_H2]))
            .await
            .unwrap()
            .is_none()
    );
    let good = world.issuer.svid(&id("shop/web"));
    let peer = connect(hostile_client(Some(certified(&good)), &[ALPN_H2]))
        .await
        .unwrap();
    let peer = peer.unwrap();
    assert_eq!(
        (peer.id, peer.serial),
        (id("shop/web"), good.serial.clone())
    );
    let stranger = Authority::root("mesh.local")
        .intermediate()
        .svid(&id("shop/web"));
    let refused = connect(hostile_client(Some(certified(&stranger)), &[ALPN_H2])).await;
    assert_eq!(refused.unwrap_err().code(), "unknown_issuer");
    let refused = connect(hostile_client(None, &[ALPN])).await;
    assert_eq!(refused.unwrap_err().code(), "alpn");
}

#[tokio::test]
async fn an_older_bundle_or_an_svid_that_nobody_believes_is_not_published() {
    let world = World::new();
    let store = world.store("shop/web");
    let serial = || store.current().unwrap().svid().serial.clone();
    let before = serial();
    store.publish_trust(world.trust(5)).unwrap();
    let svid = world.issuer.svid(&id("shop/web"));
    let older = store.publish(Arc::clone(&svid), world.trust(4));
    assert!(matches!(
        older,
        Err(PublishError::Stale {
            sequence: 4,
            current: 5
        })
    ));
    assert!(matches!(
        store.publish_trust(world.trust(4)),
        Err(PublishError::Stale { .. })
    ));
    let stranger = Authority::root("mesh.local")
        .intermediate()
        .svid(&id("shop/web"));
    assert!(matches!(
        store.publish_svid(stranger),
        Err(PublishError::Svid(_))
    ));
    assert_eq!((serial(), store.current().unwrap().epoch()), (before, 2));
    assert_eq!(store.publish_svid(svid).unwrap(), 3);
}

/// The first bytes of a client that speaks to nobody.
async fn first_bytes(client: impl Future<Output = ()>, mut far: DuplexStream) -> Vec<u8> {
    let mut bytes = vec![0; 64 * 1024];
    let read = tokio::select! {
        read = far.read(&mut bytes) => read.unwrap(),
        () = client => panic!("nobody answers it"),
    };
    bytes.truncate(read);
    bytes
}

#[tokio::test]
async fn a_sidecars_hello_is_told_from_any_other_however_it_is_cut() {
    let world = World::new();
    let store = world.store("shop/web");
    let (near, far) = pipe();
    let expected = id("shop/orders");
    let connector = world.connector(&store);
    let sidecar = async {
        drop(connector.connect(near, &expected).await);
    };
    let mesh = first_bytes(sidecar, far).await;
    let (near, far) = pipe();
    let config = Arc::new(hostile_client(None, &[ALPN_H2]));
    let name = ServerName::try_from("shop.example").unwrap();
    let other = async {
        drop(TlsConnector::from(config).connect(name, near).await);
    };
    let foreign = first_bytes(other, far).await;
    for (bytes, said) in [(mesh, Hello::Mesh), (foreign, Hello::Foreign)] {
        let mut reader = HelloReader::default();
        let (last, begin) = bytes.split_last().unwrap();
        for byte in begin {
            assert_eq!(reader.read(&[*byte]), Hello::Incomplete);
        }
        assert_eq!(reader.read(&[*last]), said);
        assert_eq!(HelloReader::default().read(&bytes), said);
    }
}

#[test]
fn what_is_no_hello_or_never_ends_is_not_a_sidecars() {
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"\x16\x03\x01\x00\x05hello",
        b"\0\0\0\0\0\0",
    ] {
        assert_eq!(HelloReader::default().read(bytes), Hello::Foreign);
    }
    // A record that promises more than anybody waits for.
    let mut reader = HelloReader::default();
    let mut said = reader.read(b"\x16\x03\x01\x40\x00\x01\x00\xff\xff");
    let mut read = 0;
    while said == Hello::Incomplete {
        said = reader.read(&[0; 512]);
        read += 512;
        assert!(read <= HelloReader::BYTES_MAX + 512, "it waits for ever");
    }
    assert_eq!(said, Hello::Foreign);
}

/// Says each thing that happens at a door.
struct Keeper(mpsc::UnboundedSender<&'static str>);

impl Doorkeeper for Keeper {
    fn refused(&self, reason: &'static str) {
        self.0.send(reason).unwrap();
    }

    fn handshake_failed(&self, reason: &'static str) {
        self.0.send(reason).unwrap();
    }

    fn opened(&self) {
        self.0.send("opened").unwrap();
    }

    fn closed(&self) {
        self.0.send("closed").unwrap();
    }
}

#[tokio::test]
async fn a_door_bounds_who_comes_in_and_apart_those_who_show_nothing() {
    let world = World::new();
    let svid = world.issuer.svid(&id("shop/web"));
    let nobody = Arc::new(hostile_client(None, &[ALPN_H2]));
    let web = Arc::new(hostile_client(Some(certified(&svid)), &[ALPN_H2]));
    for anonymous_max in [Some(1), None] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let come = async |config: &Arc<rustls::ClientConfig>| {
            let name = ServerName::try_from("x.invalid").unwrap();
            let stream = TcpStream::connect(address).await.unwrap();
            TlsConnector::from(Arc::clone(config))
                .connect(name, stream)
                .await
        };
        let (tracker, cancel) = (TaskTracker::new(), CancellationToken::new());
        let (events, mut heard) = mpsc::unbounded_channel();
        let limits = DoorLimits {
            connections_max: 2,
            anonymous_max,
            handshakes_max: 4,
            handshake_timeout: TIMEOUT,
        };
        let door = Door::new(world.store("shop/orders"), limits, Arc::new(Keeper(events)));
        let mut incoming = door.open(listener, &tracker, cancel.clone());
        let mut clients = vec![come(&nobody).await];
        let mut served = Vec::new();
        if anonymous_max.is_some() {
            assert_eq!(heard.recv().await, Some("opened"));
            served.push(incoming.next().await.unwrap().unwrap());
            assert!(served[0].connect_info().peer.is_none());
            clients.push(come(&nobody).await);
            assert_eq!(heard.recv().await, Some("anonymous_connections_max"));
        } else {
            assert_eq!(heard.recv().await, Some("no_certificate"));
            clients.push(come(&web).await);
            assert_eq!(heard.recv().await, Some("opened"));
            served.push(incoming.next().await.unwrap().unwrap());
        }
        clients.push(come(&web).await);
        assert_eq!(heard.recv().await, Some("opened"));
        served.push(incoming.next().await.unwrap().unwrap());
        let caller = served[1].connect_info();
        assert_eq!(caller.peer.unwrap().id, id("shop/web"));
        assert!(caller.address.ip().is_loopback());
        // Nobody more, before a place is free again.
        assert!(come(&web).await.is_err());
        assert_eq!(heard.recv().await, Some("connections_max"));
        drop(served.pop());
        assert_eq!(heard.recv().await, Some("closed"));
        clients.push(come(&web).await);
        assert_eq!(heard.recv().await, Some("opened"));
        cancel.cancel();
        tracker.close();
        tracker.wait().await;
    }
}
