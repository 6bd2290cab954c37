//! Pods of a cluster: calls that are known by the address they were made to, from one application to
//! another, with both sidecars' halves between them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::pedantic,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    unreachable_pub,
    reason = "tests"
)]

#[path = "redirected/app.rs"]
mod app;
#[path = "redirected/ending.rs"]
mod ending;
#[path = "redirected/inbound.rs"]
mod inbound_calls;
#[path = "redirected/kernel.rs"]
mod kernel;
#[path = "redirected/outbound.rs"]
mod outbound_calls;
#[path = "redirected/own.rs"]
mod own;
#[path = "redirected/plaintext.rs"]
mod plaintext;
#[path = "redirected/pod.rs"]
mod pod;

/// `shop/web` may do anything with orders over HTTP, open WebSockets, and call gRPC.
pub const WEB: &str = r#"
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: orders, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  ports: [8080]
  action: Allow
  rules:
    - name: web
      from: [{ workload: { serviceAccount: web } }]
      to:
        - http: { methods: ["*"], paths: ["/**"] }
        - http: { methods: [GET], paths: ["/ws"], upgrades: [websocket] }
        - grpc: { service: shop.v1.Orders, methods: ["*"] }
"#;

/// `shop/web` may open opaque connections to 6379.
pub const BYTES: &str = r#"
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: ledger, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  ports: [6379]
  action: Allow
  rules: [{ name: web, from: [{ workload: { serviceAccount: web } }], to: [{ tcp: {} }] }]
"#;
