//! A body of 100 MiB through two sidecars, in a process of its own so that its memory can be told.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::clone_on_ref_ptr,
    clippy::format_push_string,
    missing_docs,
    dead_code,
    unreachable_pub,
    reason = "tests"
)]

#[path = "support/mesh.rs"]
mod mesh;
#[path = "data_path/pair.rs"]
mod pair;

use pair::{Pair, application};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const LENGTH: usize = 100 << 20;
/// Windows and buffers of both sidecars and both applications.
const GROWTH_MAX: usize = 48 << 20;

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<usize>()
        .unwrap()
        * 1024
}

#[tokio::test]
async fn a_large_body_is_streamed_both_ways_in_little_memory() {
    let pair = Pair::http(&[application().await]).await;
    let stream = TcpStream::connect(pair.outbound).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let before = resident();
    let mut peak = before;
    let writer = tokio::spawn(async move {
        let head = format!(
            "POST /open/echo HTTP/1.1\r\nHost: orders.shop\r\nContent-Length: {LENGTH}\r\n\r\n"
        );
        write.write_all(head.as_bytes()).await.unwrap();
        let chunk = vec![7; 1 << 16];
        for _ in 0..LENGTH / chunk.len() {
            write.write_all(&chunk).await.unwrap();
        }
        write
    });
    let mut got = 0;
    let mut buffer = vec![0; 1 << 16];
    let mut sevens = 0;
    while sevens < LENGTH {
        let length = read.read(&mut buffer).await.unwrap();
        assert!(length > 0, "closed after {got} bytes");
        got += length;
        sevens += buffer[..length]
            .iter()
            .map(|byte| usize::from(*byte == 7))
            .sum::<usize>();
        peak = peak.max(resident());
    }
    drop(writer.await.unwrap());
    let growth = peak - before;
    assert!(growth < GROWTH_MAX, "grew by {} MiB", growth >> 20);
}
