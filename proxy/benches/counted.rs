//! What a sidecar does to the headers of one call on each of its two hops: strip, check, add, of
//! the request and of its response. Timed here by criterion, and counted in instructions by
//! `benches/instructions`, which lets callgrind look at what is inside `counted_*`.
//!
//! Always true: a `counted_*` function calls no other one and holds no closure, since callgrind
//! knows it by name and turns counting over at each entry.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a benchmark"
)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use http::{Request, Response, Version, request, response};
use sidegate_mesh::SpiffeId;
use sidegate_proxy::error::RequestError;
use sidegate_proxy::headers::{self, CLIENT_ID, Sender};
use sidegate_proxy::wire::{self, WireLimits};

const WEB: &str = "spiffe://mesh.local/ns/shop/sa/web";
const PORT: u16 = 8080;
/// Calls before the one that counts, so that the allocator has what it needs.
const WARM: usize = 100;

/// What a browser's request brings through a front end.
const FIELDS: &[(&str, &str)] = &[
    (
        "user-agent",
        "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
    ),
    (
        "accept",
        "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    ),
    ("accept-language", "en-GB,en;q=0.5"),
    ("accept-encoding", "gzip, deflate, br"),
    ("cookie", "session=0d4b1c7e9a5f4e0b8c2d; theme=dark"),
    (
        "authorization",
        "Bearer eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ3ZWIifQ.c2lnbmF0dXJl",
    ),
    ("x-request-id", "6f1c1b0e-7a43-4a0b-9f5e-2f7c3a1d9b10"),
    (
        "traceparent",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ),
];

/// The head of a call as it comes to one hop, and that of its answer.
#[derive(Clone)]
struct Exchange {
    request: request::Parts,
    response: response::Parts,
}

/// From the application over HTTP/1.1, with fields of its connection and an identity that it made up.
fn from_application() -> Exchange {
    let fields = [
        ("host", "orders.shop"),
        ("connection", "keep-alive"),
        ("keep-alive", "timeout=5"),
        ("sidegate-client-id", "spiffe://mesh.local/ns/shop/sa/root"),
    ];
    exchange("/api/v1/orders/7?expand=items", &fields, Version::HTTP_11)
}

/// From another sidecar over HTTP/2.
fn from_sidecar() -> Exchange {
    let fields = [("sidegate-protocol", "http/1.1"), ("sidegate-port", "8080")];
    let target = "http://orders.shop/api/v1/orders/7?expand=items";
    exchange(target, &fields, Version::HTTP_2)
}

fn exchange(target: &str, own: &[(&str, &str)], version: Version) -> Exchange {
    let mut request = Request::builder().uri(target).version(version);
    for (name, value) in own.iter().chain(FIELDS) {
        request = request.header(*name, *value);
    }
    let response = Response::builder()
        .header("content-type", "application/json")
        .header("content-length", "412")
        .header("date", "Tue, 14 Nov 2023 22:13:20 GMT")
        .header("cache-control", "no-store")
        .header("etag", "\"33a64df551425fcc\"")
        .header("vary", "accept-encoding");
    Exchange {
        request: request.body(()).unwrap().into_parts().0,
        response: response.body(()).unwrap().into_parts().0,
    }
}

/// What goes on from a hop: the request, and the answer's head on its way back.
type Passed = Result<(Request<()>, response::Parts), RequestError>;

fn outbound(exchange: Exchange, limits: &WireLimits) -> Passed {
    let Exchange {
        mut request,
        mut response,
    } = exchange;
    let mut head = headers::sanitize(&mut request, Sender::Application, limits)?;
    let request = head.to_wire(Some(PORT))?;
    headers::sanitize_response(&mut response, Sender::Sidecar);
    Ok((request, response))
}

fn inbound(exchange: Exchange, limits: &WireLimits, caller: &SpiffeId) -> Passed {
    let Exchange {
        mut request,
        mut response,
    } = exchange;
    let head = headers::sanitize(&mut request, Sender::Sidecar, limits)?;
    let request = head.to_application(Some(caller))?;
    headers::sanitize_response(&mut response, Sender::Application);
    Ok((request, response))
}

#[inline(never)]
fn counted_outbound(exchange: Exchange, limits: &WireLimits) -> Passed {
    outbound(exchange, limits)
}

#[inline(never)]
fn counted_inbound(exchange: Exchange, limits: &WireLimits, caller: &SpiffeId) -> Passed {
    inbound(exchange, limits, caller)
}

fn bench(criterion: &mut Criterion) {
    let limits = WireLimits::default();
    criterion.bench_function("header_pass_outbound", |bencher| {
        let exchange = from_application();
        for _ in 0..WARM {
            let (request, _) = outbound(exchange.clone(), &limits).unwrap();
            assert_eq!(request.headers()[wire::PORT], "8080");
            assert!(!request.headers().contains_key(CLIENT_ID));
        }
        bencher.iter_batched(
            || exchange.clone(),
            |exchange| counted_outbound(exchange, black_box(&limits)),
            BatchSize::SmallInput,
        );
    });
    criterion.bench_function("header_pass_inbound", |bencher| {
        let (exchange, caller) = (from_sidecar(), WEB.parse().unwrap());
        for _ in 0..WARM {
            let (request, _) = inbound(exchange.clone(), &limits, &caller).unwrap();
            assert_eq!(request.headers()[CLIENT_ID], WEB);
            assert!(!request.headers().contains_key(wire::PORT));
        }
        bencher.iter_batched(
            || exchange.clone(),
            |exchange| counted_inbound(exchange, black_box(&limits), black_box(&caller)),
            BatchSize::SmallInput,
        );
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = bench
}
criterion_main!(benches);
