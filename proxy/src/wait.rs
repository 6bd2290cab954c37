//! `sidegate-proxy wait`: waits until a sidecar is ready.
//!
//! Invariant: it ends at its timeout at the latest, and says then what was missing.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::HOST;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// The pause after the first question, and the longest one: a container waits for this, and most of
/// the time not for long.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// Longest time of one question.
const ASK_MAX: Duration = Duration::from_secs(5);
/// Bytes of an answer.
const ANSWER_BYTES_MAX: usize = 16 * 1024;

/// Why the wait ended without a ready sidecar.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The address is not one that can be asked.
    #[error("`{url}` is not an http URL with a host")]
    Url {
        /// What was given.
        url: String,
    },
    /// The time is over.
    #[error("not ready after {after:?}: {last}")]
    Timeout {
        /// How long was waited.
        after: Duration,
        /// What was missing, in the last answer's words.
        last: String,
    },
}

/// Asks `url` until it answers 200.
///
/// # Errors
///
/// [`WaitError`] when that does not happen within `timeout`.
pub async fn until_ready(url: &str, timeout: Duration) -> Result<(), WaitError> {
    let uri = parse(url)?;
    let begin = Instant::now();
    let mut pause = PAUSE.0;
    let mut last = "nothing answered".to_owned();
    while begin.elapsed() < timeout {
        let left = timeout.saturating_sub(begin.elapsed()).min(ASK_MAX);
        match tokio::time::timeout(left, ask(&uri)).await {
            Ok(Ok((StatusCode::OK, _))) => return Ok(()),
            Ok(Ok((status, words))) => last = format!("{status}, {}", words.trim()),
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => "no answer in time".clone_into(&mut last),
        }
        tokio::time::sleep(pause.min(timeout.saturating_sub(begin.elapsed()))).await;
        pause = (pause + pause / 4).min(PAUSE.1);
    }
    Err(WaitError::Timeout {
        after: timeout,
        last,
    })
}

fn parse(url: &str) -> Result<Uri, WaitError> {
    let uri: Option<Uri> = url.parse().ok();
    uri.filter(|uri| uri.scheme_str() == Some("http") && uri.host().is_some())
        .ok_or_else(|| WaitError::Url {
            url: url.to_owned(),
        })
}

/// One question on a connection of its own.
async fn ask(uri: &Uri) -> Result<(StatusCode, String), Box<dyn std::error::Error + Send + Sync>> {
    let host = uri.host().unwrap_or_default();
    let stream = TcpStream::connect((
        host.trim_start_matches('[').trim_end_matches(']'),
        uri.port_u16().unwrap_or(80),
    ))
    .await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let authority = uri.authority().map_or(host, |authority| authority.as_str());
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header(HOST, authority)
        .body(Empty::<Bytes>::new())?;
    let answer = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await?;
        Ok((
            head.status,
            String::from_utf8_lossy(&body.to_bytes()).into_owned(),
        ))
    };
    tokio::select! {
        // Polled first, so that an answer wins over the end of its connection.
        biased;
        answer = answer => answer,
        Err(error) = connection => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn it_waits_for_200_and_says_what_was_missing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/readyz", listener.local_addr().unwrap());
        let server = async {
            for answer in [
                "503 Service Unavailable\r\ncontent-length: 7\r\n\r\nno SVID",
                "200 OK\r\ncontent-length: 0\r\n\r\n",
            ] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = [0; 1024];
                let read = stream.read(&mut head).await.unwrap();
                assert!(head[..read].starts_with(b"GET /readyz HTTP/1.1\r\n"));
                stream
                    .write_all(format!("HTTP/1.1 {answer}").as_bytes())
                    .await
                    .unwrap();
            }
        };
        let wait = until_ready(&url, Duration::from_mins(1));
        let (ready, ()) = tokio::join!(wait, server);
        ready.unwrap();
    }

    #[tokio::test]
    async fn it_ends_at_its_timeout_with_the_last_words() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/readyz", listener.local_addr().unwrap());
        drop(listener);
        let error = until_ready(&url, Duration::from_millis(250))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("refused"), "{error}");
    }

    #[tokio::test]
    async fn what_is_no_http_url_is_refused_at_once() {
        for url in ["https://127.0.0.1/", "127.0.0.1:80", "http://"] {
            let error = until_ready(url, Duration::from_mins(1)).await.unwrap_err();
            assert!(matches!(error, WaitError::Url { .. }), "{error}");
        }
    }
}
