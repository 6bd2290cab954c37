//! Two whole sidecars with their threads, a caller's and a called application's, and what they
//! stand between.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use sidegate_proxy::sidecar::Sidecar;
use tokio::net::TcpListener;

use crate::mesh::Mesh;

const POLICY: &str = "\
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: orders, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  action: Allow
  rules:
    - name: web
      from: [{ workload: { serviceAccount: web } }]
      to:
        - http: { methods: [\"*\"], paths: [\"/open/**\"] }
        - http: { methods: [GET], paths: [\"/open/**\"], upgrades: [websocket] }
        - grpc: { service: shop.v1.Test, methods: [\"*\"] }
";

const OPAQUE: &str = "\
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: ledger, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  ports: [8080]
  action: Allow
  rules:
    - name: web
      from: [{ workload: { serviceAccount: web } }]
      to: [{ tcp: {} }]
";

/// `shop/web` and one or more sidecars of `shop/orders`, all ready.
pub struct Pair {
    pub mesh: Mesh,
    pub web: Sidecar,
    pub orders: Vec<Sidecar>,
    pub outbound: SocketAddr,
}

impl Pair {
    /// In front of these applications, one sidecar each.
    pub async fn http(applications: &[SocketAddr]) -> Self {
        Self::start(applications, POLICY, "auto", ("", "")).await
    }

    /// As [`Self::http`], for gRPC.
    pub async fn grpc(application: SocketAddr) -> Self {
        Self::start(&[application], POLICY, "grpc", ("", "")).await
    }

    /// For opaque bytes; the port that leads there comes first of `upstreams`.
    pub async fn tcp(application: SocketAddr) -> Self {
        let more = "upstreams: [{ service: 'orders.shop:80', address: '127.0.0.1:0' }]";
        Self::start(&[application], OPAQUE, "tcp", (more, "")).await
    }

    /// As [`Self::http`], with a called sidecar that drains for a moment only.
    pub async fn hasty(application: SocketAddr) -> Self {
        let drain = "\ndrainTimeout: 100ms";
        Self::start(&[application], POLICY, "auto", ("", drain)).await
    }

    /// `of_web` and `of_orders` are further YAML of their configurations.
    async fn start(
        apps: &[SocketAddr],
        policy: &str,
        protocol: &str,
        (of_web, of_orders): (&str, &str),
    ) -> Self {
        let mesh = Mesh::new();
        mesh.resource("policy.yaml", policy);
        let mut orders = Vec::new();
        let mut endpoints = String::new();
        for address in apps {
            let ports = format!(
                "ports: [{{ name: http, port: 8080, address: '{address}', protocol: {protocol} }}]{of_orders}"
            );
            let sidecar = mesh.start(mesh.config("shop", "orders", &ports)).unwrap();
            sidecar.ready().await.unwrap();
            endpoints += &format!(
                "    - {{ address: \"{}\", identity: {{ workload: {{ serviceAccount: orders }} }} }}\n",
                sidecar.addresses().inbound
            );
            orders.push(sidecar);
        }
        mesh.resource(
            "service.yaml",
            &format!(
                "apiVersion: sidegate.dev/v1alpha1\nkind: StaticService\n\
                 metadata: {{ name: orders, namespace: shop }}\nspec:\n  \
                 ports: [{{ name: http, port: 80, targetPort: 8080, protocol: {protocol} }}]\n  \
                 endpoints:\n{endpoints}"
            ),
        );
        let web = mesh.start(mesh.config("shop", "web", of_web)).unwrap();
        web.ready().await.unwrap();
        let outbound = web.addresses().outbound;
        Self {
            mesh,
            web,
            orders,
            outbound,
        }
    }

    /// The first record of `workload`'s log that `is` the one, once it is written.
    pub async fn record(
        &self,
        workload: &str,
        is: impl Fn(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        let path = self.mesh.path().join(format!("{workload}.jsonl"));
        let begin = Instant::now();
        loop {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let mut records = text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok());
            if let Some(record) = records.find(&is) {
                return record;
            }
            assert!(
                begin.elapsed() < Duration::from_secs(30),
                "no such record in {text}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

pub type AppBody = UnsyncBoxBody<Bytes, std::io::Error>;

fn text(text: impl Into<Bytes>) -> AppBody {
    http_body_util::Full::new(text.into())
        .map_err(|never: Infallible| match never {})
        .boxed_unsync()
}

/// A real HTTP/1.1 application.
pub async fn application() -> SocketAddr {
    application_of("").await
}

/// As [`application`]; `/open/name` answers with `name`.
pub async fn application_of(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let service = service_fn(move |request| async move {
                    Ok::<_, Infallible>(answer(request, name).await)
                });
                let serve = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                drop(serve.await);
            });
        }
    });
    address
}

async fn answer(request: Request<Incoming>, name: &'static str) -> Response<AppBody> {
    let path = request.uri().path().to_owned();
    let head = Response::builder();
    match path.strip_prefix("/open/").unwrap_or_default() {
        "hello" => head
            .header("connection", "close, x-hop")
            .header("x-hop", "1")
            .body(text("hello")),
        "name" => head.body(text(name)),
        "slow" => {
            tokio::time::sleep(Duration::from_millis(2)).await;
            head.body(text("slow"))
        }
        "headers" => head.body(text(format!("{:?}", request.headers()))),
        "echo" => {
            let body = request
                .into_body()
                .map_err(std::io::Error::other)
                .boxed_unsync();
            return head.header("trailer", "x-sum").body(body).unwrap();
        }
        "204" => head.status(204).body(text("")),
        "304" => head.status(304).body(text("")),
        "cut" => {
            let frames = [
                Ok(Frame::data(Bytes::from_static(b"half"))),
                Err(std::io::Error::other("cut")),
            ];
            // The pause lets the first half leave before the connection breaks.
            let frames = futures_util::stream::iter(frames).then(|frame| async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                frame
            });
            head.body(StreamBody::new(frames).boxed_unsync())
        }
        bytes => {
            let length: usize = bytes.parse().unwrap_or_default();
            let chunk = Bytes::from(vec![7; 64 * 1024]);
            let chunks = futures_util::stream::iter(0..length / chunk.len())
                .map(move |_| Ok(Frame::data(chunk.clone())));
            head.body(StreamBody::new(chunks).boxed_unsync())
        }
    }
    .unwrap()
}

/// The fields of a trailer section.
pub fn trailers(name: &'static str, value: &'static str) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert(name, value.parse().unwrap());
    trailers
}
