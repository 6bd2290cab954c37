//! A sidecar's administration port, reached through the API server's port-forward.
//!
//! Always true: one request a forwarding, bounded in time and in size; the forwarding ends with
//! the request, whatever becomes of it.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::HOST;
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Portforwarder;
use serde::de::DeserializeOwned;

use super::Cluster;
use super::sidecars::Sidecar;

/// The sidecar's administration port, on its loopback.
const PORT: u16 = 19000;

/// Longest wait for an answer, the forwarding included.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Largest answer that is read.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Forwardings at once.
const AT_ONCE_MAX: usize = 16;

impl Cluster {
    /// `GET path` of one sidecar's administration port.
    ///
    /// # Errors
    ///
    /// When it cannot be reached, refuses, or answers something else.
    pub(crate) async fn ask<T: DeserializeOwned>(
        &self,
        sidecar: &Sidecar,
        path: &str,
    ) -> anyhow::Result<T> {
        let doing = || format!("asking the sidecar of {}", sidecar.name());
        let answer = tokio::time::timeout(TIMEOUT, self.get(sidecar, path))
            .await
            .map_err(|_elapsed| anyhow!("{}: no answer within {TIMEOUT:?}", doing()))?;
        let answer = answer.with_context(doing)?;
        serde_json::from_slice(&answer).with_context(doing)
    }

    /// The same of many sidecars, some at once; the answers come in the sidecars' order.
    pub(crate) async fn ask_all<T: DeserializeOwned>(
        &self,
        sidecars: &[Sidecar],
        path: &str,
    ) -> Vec<anyhow::Result<T>> {
        let answers = sidecars.iter().map(|sidecar| self.ask(sidecar, path));
        stream::iter(answers).buffered(AT_ONCE_MAX).collect().await
    }

    async fn get(&self, sidecar: &Sidecar, path: &str) -> anyhow::Result<Bytes> {
        let pods = kube::Api::<Pod>::namespaced(self.client(), &sidecar.namespace);
        let forwarder = pods.portforward(&sidecar.pod, &[PORT]).await;
        let forwarder = forwarder.map_err(|error| self.explain(error, "port-forward"))?;
        let mut forwarding = Forwarding(forwarder);
        let stream = forwarding
            .0
            .take_stream(PORT)
            .context("the port is not forwarded")?;
        let failure = forwarding.0.take_error(PORT);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::get(path.parse::<Uri>()?)
            .header(HOST, format!("127.0.0.1:{PORT}"))
            .body(Empty::<Bytes>::new())?;
        let call = async {
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
                .collect()
                .await;
            let body = body.map_err(anyhow::Error::from_boxed)?.to_bytes();
            if !status.is_success() {
                bail!("HTTP {status}: {}", String::from_utf8_lossy(&body).trim());
            }
            Ok(body)
        };
        let mut call = std::pin::pin!(call);
        let failure = async {
            match failure {
                Some(failure) => failure.await,
                None => None,
            }
        };
        // The connection is driven beside the call, and dropped with it.
        let outcome = tokio::select! {
            answered = call.as_mut() => answered,
            _closed = connection => call.await,
        };
        match outcome {
            Ok(body) => Ok(body),
            // The forwarding knows better why nothing came back.
            Err(error) => match tokio::time::timeout(Duration::from_millis(200), failure).await {
                Ok(Some(why)) => Err(anyhow!("{}", why.trim())),
                _ => Err(error),
            },
        }
    }
}

/// Ends the forwarding's task when it is dropped.
struct Forwarding(Portforwarder);

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.0.abort();
    }
}
