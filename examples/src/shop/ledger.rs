//! `ledger`: opaque TCP in which the server speaks first, as those of SMTP and of many databases do.
//!
//! One line, one answer: `ADD ACCOUNT AMOUNT`, `BALANCE ACCOUNT`, `QUIT`.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Running, start};

/// What the server says before it was asked anything.
pub const GREETING: &str = "220 ledger ready\r\n";

/// Longest line that is read, in bytes.
const LINE_BYTES_MAX: u64 = 1024;
/// Accounts kept at once.
const ACCOUNTS_MAX: usize = 10_000;

type Accounts = Arc<Mutex<BTreeMap<String, i64>>>;

/// Serves `ledger` on `listen`, with no accounts yet.
///
/// # Errors
///
/// The listener's error when `listen` cannot be bound.
pub async fn serve(listen: SocketAddr) -> io::Result<Running> {
    start(listen, accept_loop).await
}

async fn accept_loop(listener: TcpListener, stop: CancellationToken) {
    let accounts = Accounts::default();
    let connections = TaskTracker::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let accounts = Arc::clone(&accounts);
                    let stop = stop.clone();
                    connections.spawn(async move {
                        tokio::select! {
                            () = stop.cancelled() => {}
                            _ended = converse(stream, &accounts) => {}
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "ledger could not accept");
                    tokio::task::yield_now().await;
                }
            },
        }
    }
    connections.close();
    connections.wait().await;
}

async fn converse(stream: TcpStream, accounts: &Accounts) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    writer.write_all(GREETING.as_bytes()).await?;
    let mut line = String::new();
    loop {
        line.clear();
        let read = (&mut reader)
            .take(LINE_BYTES_MAX)
            .read_line(&mut line)
            .await?;
        if read == 0 {
            return writer.shutdown().await;
        }
        let Some(answer) = answer(line.trim(), accounts) else {
            writer.write_all(b"221 bye\r\n").await?;
            return writer.shutdown().await;
        };
        writer.write_all(answer.as_bytes()).await?;
    }
}

/// The answer to one line; none ends the conversation.
fn answer(line: &str, accounts: &Accounts) -> Option<String> {
    let mut accounts = accounts.lock().unwrap_or_else(PoisonError::into_inner);
    let mut words = line.split_ascii_whitespace();
    let answer = match (words.next(), words.next(), words.next(), words.next()) {
        (Some("QUIT"), None, ..) => return None,
        (Some("BALANCE"), Some(account), None, _) => {
            format!(
                "250 {}\r\n",
                accounts.get(account).copied().unwrap_or_default()
            )
        }
        (Some("ADD"), Some(account), Some(amount), None) => {
            if accounts.len() >= ACCOUNTS_MAX && !accounts.contains_key(account) {
                return Some("452 too many accounts\r\n".to_owned());
            }
            match amount.parse::<i64>() {
                Ok(amount) => {
                    let balance = accounts.entry(account.to_owned()).or_default();
                    *balance = balance.saturating_add(amount);
                    format!("250 {balance}\r\n")
                }
                Err(_) => "501 the amount is a whole number\r\n".to_owned(),
            }
        }
        _ => "500 ADD ACCOUNT AMOUNT, BALANCE ACCOUNT or QUIT\r\n".to_owned(),
    };
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_add_up_and_nonsense_is_explained() {
        let accounts = Accounts::default();
        let ask = |line| answer(line, &accounts);
        assert_eq!(ask("ADD tea 5").as_deref(), Some("250 5\r\n"));
        assert_eq!(ask("ADD tea -2").as_deref(), Some("250 3\r\n"));
        assert_eq!(ask("BALANCE tea").as_deref(), Some("250 3\r\n"));
        assert!(ask("ADD tea many").unwrap().starts_with("501"));
        assert!(ask("").unwrap().starts_with("500"));
        assert_eq!(ask("QUIT"), None);
    }
}
