//! Clients that only want to know whether a connection comes about.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

use super::http;

pub(super) async fn probe(target: &str) -> anyhow::Result<()> {
    let limit = Duration::from_secs(30);
    if let Some(address) = target.strip_prefix("tcp://") {
        TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
        return Ok(());
    }
    let answer = http::get(target, &[], limit).await?;
    // As a kubelet: redirections count as success.
    anyhow::ensure!(
        (200..400).contains(&answer.status),
        "{target} answered {}: {}",
        answer.status,
        answer.body
    );
    Ok(())
}

/// A round trip on each new connection: connecting alone proves nothing behind a proxy.
async fn round_trip(address: &str) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"ping").await?;
    let mut back = [0; 4];
    stream.read_exact(&mut back).await.map(drop)
}

pub(super) async fn run(address: &str, length: Duration, every: Duration) -> anyhow::Result<()> {
    let end = tokio::time::Instant::now() + length;
    let (mut done, mut failed) = (0, BTreeMap::<String, u32>::new());
    let mut longest = Duration::ZERO;
    while tokio::time::Instant::now() < end {
        let began = tokio::time::Instant::now();
        match tokio::time::timeout(Duration::from_secs(15), round_trip(address)).await {
            Ok(Ok(())) => done += 1,
            Ok(Err(error)) => *failed.entry(format!("{:?}", error.kind())).or_default() += 1,
            Err(_) => *failed.entry("Timeout".to_owned()).or_default() += 1,
        }
        longest = longest.max(began.elapsed());
        tokio::time::sleep(every).await;
    }
    println!("{}", json!({ "done": done, "failed": failed, "longest_ms": longest.as_millis() }));
    Ok(())
}

pub(super) async fn datagram(address: &str, text: &str) -> anyhow::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0").await?;
    socket.connect(address).await.with_context(|| format!("resolve {address}"))?;
    let mut buffer = vec![0; 65_536];
    for _ in 0..5 {
        socket.send(text.as_bytes()).await?;
        if let Ok(received) = tokio::time::timeout(Duration::from_secs(1), socket.recv(&mut buffer)).await {
            println!("{}", String::from_utf8_lossy(&buffer[..received?]));
            return Ok(());
        }
    }
    anyhow::bail!("no datagram came back from {address}")
}
