//! What counts as a success, and who is answered.

use std::convert::Infallible;
use std::io::Cursor;

use ::http::{HeaderMap, Request, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use prometheus_client::metrics::counter::Counter;
use sidegate_mtls::SystemClock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::*;
use crate::config::{GrpcProbe, HttpHeader, HttpProbe, HttpScheme, TcpProbe};

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// An application, the requests that it has seen, and probes of it.
struct Fixture {
    port: u16,
    _tasks: JoinSet<()>,
}

impl Fixture {
    /// Answers each path as `answer` says; `seen` gets every request's line and headers.
    async fn http(answer: fn(&str, u16) -> Response<Full<Bytes>>) -> (Self, Seen) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Seen::default();
        let told = Arc::clone(&seen);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let told = Arc::clone(&told);
                let service = service_fn(move |request: Request<Incoming>| {
                    let (head, _) = request.into_parts();
                    let answer = answer(head.uri.path(), port);
                    told.lock()
                        .unwrap()
                        .push((head.uri.to_string(), head.headers));
                    std::future::ready(Ok::<_, Infallible>(answer))
                });
                let http = hyper::server::conn::http1::Builder::new();
                drop(http.serve_connection(TokioIo::new(stream), service).await);
            }
        });
        let at = Self {
            port,
            _tasks: tasks,
        };
        (at, seen)
    }

    async fn ask(&self, kind: ProbeKind, config: ProbeConfig) -> Result<(), Failure> {
        asker().ask(&probe(kind, config)).await
    }

    async fn get(&self, path: &str) -> Result<(), Failure> {
        self.ask(ProbeKind::Liveness, http(self.port, path)).await
    }
}

type Seen = Arc<std::sync::Mutex<Vec<(String, HeaderMap)>>>;

fn asker() -> Asker {
    Asker {
        ip: Ipv4Addr::LOCALHOST.into(),
        own: own(),
        tls: http::Tls::new(),
        clock: Arc::new(SystemClock),
    }
}

/// The pod is at 127.0.0.1.
fn own() -> Own {
    let text = "
workload: { namespace: shop, serviceAccount: orders }
ca: { root: root.pem, tokenFile: token }
controller: { address: 'controller:19012' }
destination: original
pod: { name: orders-1, uid: '1', ips: [127.0.0.1] }
";
    Own::of(&crate::config::Config::from_yaml("test", text).unwrap())
}

fn probe(kind: ProbeKind, config: ProbeConfig) -> Probe {
    Probe {
        entry: format!("app/{kind}"),
        kind,
        timeout: config.timeout.unwrap_or(Duration::from_mins(1)),
        config,
        last: AtomicU8::new(UNASKED),
    }
}

fn http(port: u16, path: &str) -> ProbeConfig {
    ProbeConfig {
        http: Some(HttpProbe {
            scheme: HttpScheme::Http,
            port,
            path: path.to_owned(),
            headers: vec![],
        }),
        ..ProbeConfig::default()
    }
}

fn grpc(port: u16, service: &str) -> ProbeConfig {
    ProbeConfig {
        grpc: Some(GrpcProbe {
            port,
            service: service.to_owned(),
        }),
        ..ProbeConfig::default()
    }
}

fn tcp(port: u16) -> ProbeConfig {
    ProbeConfig {
        tcp: Some(TcpProbe { port }),
        ..ProbeConfig::default()
    }
}

fn status(path: &str, port: u16) -> Response<Full<Bytes>> {
    let answer = Response::builder();
    let answer = match path {
        "/to-good" => answer.status(302).header("location", "/200"),
        "/to-bad" => answer
            .status(301)
            .header("location", format!("http://127.0.0.1:{port}/500")),
        "/a/relative" => answer.status(307).header("location", "../200?x"),
        "/away" => answer
            .status(302)
            .header("location", "http://elsewhere.example/500"),
        "/round" => answer.status(302).header("location", "/round"),
        "/own" => answer
            .status(302)
            .header("location", "http://127.0.0.1:19021/metrics"),
        "/lost" => answer.status(302).header("location", "http://[/"),
        path => answer.status(path.trim_start_matches('/').parse::<u16>().unwrap_or(200)),
    };
    answer.body(Full::new(Bytes::from("words"))).unwrap()
}

#[tokio::test]
async fn a_status_from_200_to_399_is_a_success() {
    let (at, _) = Fixture::http(status).await;
    for good in ["/200", "/204", "/302", "/304", "/399"] {
        at.get(good).await.unwrap();
    }
    for bad in ["/400", "/404", "/500", "/503"] {
        assert!(
            matches!(at.get(bad).await, Err(Failure::Status(_))),
            "{bad}"
        );
    }
}

#[tokio::test]
async fn a_redirection_within_the_host_is_followed_and_one_away_is_a_success() {
    let (at, seen) = Fixture::http(status).await;
    at.get("/to-good").await.unwrap();
    at.get("/a/relative").await.unwrap();
    at.get("/away").await.unwrap();
    let paths = |seen: &Seen| -> Vec<String> {
        seen.lock()
            .unwrap()
            .iter()
            .map(|(path, _)| path.clone())
            .collect()
    };
    let expected = ["/to-good", "/200", "/a/relative", "/200?x", "/away"];
    assert_eq!(paths(&seen), expected);
    assert!(matches!(at.get("/to-bad").await, Err(Failure::Status(_))));
    assert!(matches!(
        at.get("/round").await,
        Err(Failure::Redirects(10))
    ));
    assert!(matches!(at.get("/own").await, Err(Failure::Own(_))));
    assert!(matches!(at.get("/lost").await, Err(Failure::Location(_))));
}

#[tokio::test]
async fn path_query_and_headers_are_the_configured_ones() {
    let (at, seen) = Fixture::http(status).await;
    let mut config = http(at.port, "healthz?a=b c&d=é");
    let header = |name: &str, value: &str| HttpHeader {
        name: name.to_owned(),
        value: value.to_owned(),
    };
    config.http.as_mut().unwrap().headers = vec![
        header("Host", "orders.example"),
        header("x-two", "1"),
        header("X-Two", "2"),
        header("Accept", "text/plain"),
    ];
    at.ask(ProbeKind::Readiness, config).await.unwrap();
    at.get("").await.unwrap();
    let seen = seen.lock().unwrap();
    let (path, headers) = &seen[0];
    assert_eq!(path, "/healthz?a=b%20c&d=%C3%A9");
    assert_eq!(headers["host"], "orders.example");
    assert_eq!(headers["accept"], "text/plain");
    let two: Vec<_> = headers.get_all("x-two").iter().collect();
    assert_eq!(two, ["1", "2"]);
    let (path, headers) = &seen[1];
    assert_eq!(path, "/");
    assert_eq!(headers["host"], format!("127.0.0.1:{}", at.port).as_str());
    assert!(
        headers["user-agent"]
            .to_str()
            .unwrap()
            .starts_with("kube-probe/")
    );
}

#[tokio::test]
async fn a_probe_ends_at_its_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    for mut config in [http(port, "/"), grpc(port, "")] {
        config.timeout = Some(Duration::from_millis(50));
        let probe = probe(ProbeKind::Liveness, config);
        let failed = asker().ask(&probe).await;
        assert!(matches!(failed, Err(Failure::Timeout(_))), "{failed:?}");
    }
    asker()
        .ask(&probe(ProbeKind::Liveness, tcp(port)))
        .await
        .unwrap();
    drop(listener);
    for config in [http(port, "/"), grpc(port, ""), tcp(port)] {
        let failed = asker().ask(&probe(ProbeKind::Liveness, config)).await;
        assert!(matches!(failed, Err(Failure::Connect { .. })), "{failed:?}");
    }
}

#[tokio::test]
async fn no_port_of_the_sidecar_itself_is_asked() {
    for port in [19000, 19001, 19006, 19021] {
        let failed = asker().ask(&probe(ProbeKind::Liveness, tcp(port))).await;
        assert!(matches!(failed, Err(Failure::Own(_))), "{failed:?}");
    }
}

#[tokio::test]
async fn a_hook_succeeds_with_any_answer_and_fails_without_one() {
    let (at, _) = Fixture::http(status).await;
    for kind in [ProbeKind::PostStart, ProbeKind::PreStop] {
        at.ask(kind, http(at.port, "/500")).await.unwrap();
        let probe = probe(kind, http(at.port, "/500"));
        let gone = Failure::Timeout(Duration::ZERO);
        assert!(
            probe.answer(&Err(gone)).is_none(),
            "the kubelet reads no status"
        );
        assert_eq!(probe.answer(&Ok(())).unwrap().status(), 200);
    }
    let probe = probe(ProbeKind::Startup, tcp(1));
    let gone = Failure::Timeout(Duration::ZERO);
    assert_eq!(probe.answer(&Err(gone)).unwrap().status(), 503);
}

#[tokio::test]
async fn over_tls_any_certificate_will_do() {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["wrong.example".into()]).unwrap();
    params.not_after = rcgen::date_time_ymd(2001, 1, 1);
    let certificate = params.self_signed(&key).unwrap();
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut config = http(port, "/healthz");
        config.http.as_mut().unwrap().scheme = HttpScheme::Https;
        let server = async {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(stream).await.unwrap();
            let mut head = [0; 1024];
            let read = stream.read(&mut head).await.unwrap();
            assert!(head[..read].starts_with(b"GET /healthz HTTP/1.1\r\n"));
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
            stream.write_all(answer).await.unwrap();
        };
        let probe = probe(ProbeKind::Liveness, config);
        let asker = asker();
        let (outcome, ()) = tokio::join!(asker.ask(&probe), server);
        outcome.unwrap();
    }
}

/// Serves one health check, and answers it with this message and this status.
async fn health(answer: &'static [u8], grpc_status: &'static str) -> Result<(), Failure> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut http2 = h2::server::handshake(stream).await.unwrap();
        let (request, mut respond) = http2.accept().await.unwrap().unwrap();
        assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
        assert_eq!(request.headers()["content-type"], "application/grpc");
        let answering = async {
            let question = request.into_body().data().await.unwrap().unwrap();
            assert_eq!(&*question, b"\0\0\0\0\x06\x0a\x04shop");
            let head = Response::builder().header("content-type", "application/grpc");
            let head = head.body(()).unwrap();
            let mut body = respond.send_response(head, false).unwrap();
            body.send_data(Bytes::from_static(answer), false).unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", grpc_status.parse().unwrap());
            body.send_trailers(trailers).unwrap();
        };
        let serving = async { while http2.accept().await.is_some() {} };
        tokio::join!(answering, serving);
    };
    let probe = probe(ProbeKind::Readiness, grpc(port, "shop"));
    let asker = asker();
    let (outcome, ()) = tokio::join!(asker.ask(&probe), server);
    outcome
}

#[tokio::test]
async fn a_grpc_server_is_well_when_it_says_that_it_serves() {
    health(b"\0\0\0\0\x02\x08\x01", "0").await.unwrap();
    let not_serving = health(b"\0\0\0\0\x02\x08\x02", "0").await;
    assert!(
        matches!(not_serving, Err(Failure::NotServing(2))),
        "{not_serving:?}"
    );
    let unknown = health(b"\0\0\0\0\0", "0").await;
    assert!(
        matches!(unknown, Err(Failure::NotServing(0))),
        "{unknown:?}"
    );
    let failed = health(b"\0\0\0\0\x02\x08\x01", "5").await;
    assert!(matches!(failed, Err(Failure::Grpc(_))), "{failed:?}");
    let cut = health(b"\0\0\0\0\x09\x08\x01", "0").await;
    assert!(matches!(cut, Err(Failure::Grpc(_))), "{cut:?}");
}

fn probes(entries: &[(&str, ProbeConfig)], max: u32) -> Probes {
    let entries = entries.iter().map(|(entry, config)| {
        let kind = ProbeKind::of_entry(entry).unwrap();
        ((*entry).to_owned(), Arc::new(probe(kind, config.clone())))
    });
    Probes {
        secret: Secret::new(SECRET),
        entries: entries.collect(),
        asker: Arc::new(asker()),
        limit: Limit::new(max, Counter::default()),
    }
}

/// Status and body of the answer; `None` when the connection is closed without one.
async fn respond(probes: &Probes, path: &str, secrets: &[&str]) -> Option<(u16, Vec<u8>)> {
    let mut request = Request::get(path);
    for secret in secrets {
        request = request.header(SECRET_HEADER, *secret);
    }
    let (head, ()) = request.body(()).unwrap().into_parts();
    let answer = match probes.respond(&head).unwrap() {
        Reply::Now(answer) => answer,
        Reply::Later(answer) => answer.await?,
    };
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    Some((status, body.to_vec()))
}

#[tokio::test]
async fn only_who_knows_the_secret_is_answered_and_never_with_a_body() {
    let (at, seen) = Fixture::http(status).await;
    let entries = [
        ("app/liveness", http(at.port, "/200")),
        ("app/readiness", http(at.port, "/500")),
        ("app/pre-stop", tcp(19021)),
    ];
    let probes = probes(&entries, 8);
    for wrong in [&[][..], &[""], &["0"], &[&SECRET[1..]], &[SECRET, SECRET]] {
        let answer = respond(&probes, "/probe/app/liveness", wrong).await;
        assert_eq!(answer, Some((403, vec![])), "{wrong:?}");
    }
    assert!(
        seen.lock().unwrap().is_empty(),
        "the application hears of none"
    );
    let ask = |path| respond(&probes, path, &[SECRET]);
    assert_eq!(ask("/probe/app/liveness").await, Some((200, vec![])));
    assert_eq!(ask("/probe/app/readiness").await, Some((503, vec![])));
    assert_eq!(ask("/probe/app/startup").await, Some((404, vec![])));
    assert_eq!(ask("/probe/app/pre-stop").await, None);
    let (head, ()) = Request::get("/readyz").body(()).unwrap().into_parts();
    assert!(probes.respond(&head).is_none());
}

#[tokio::test]
async fn more_probes_than_may_be_are_turned_away() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let probes = probes(&[("app/liveness", http(port, "/"))], 1);
    let first = respond(&probes, "/probe/app/liveness", &[SECRET]);
    let mut first = std::pin::pin!(first);
    assert!(futures_util::poll!(first.as_mut()).is_pending());
    let second = respond(&probes, "/probe/app/liveness", &[SECRET]).await;
    assert_eq!(second, Some((503, vec![])));
    assert_eq!(probes.limit.refused(), 1);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_a_failure_and_a_long_one_is_not_read() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    for (sent, well) in [(100, false), (20_000, true)] {
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 1024];
            assert!(stream.read(&mut head).await.unwrap() > 0);
            let head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n".to_vec();
            let mut answer = Cursor::new([head, vec![b'x'; sent]].concat());
            drop(tokio::io::copy(&mut answer, &mut stream).await);
        };
        let probe = probe(ProbeKind::Liveness, http(port, "/"));
        let asker = asker();
        let (outcome, ()) = tokio::join!(asker.ask(&probe), server);
        assert_eq!(outcome.is_ok(), well, "{outcome:?}");
    }
}
