//! What a new connection costs its client, and connections that only wait.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Connect, exchange one byte with an echo server, close; `count` times, one after the other.
pub(super) async fn connects(address: &str, count: usize) -> anyhow::Result<()> {
    let (mut connected, mut answered) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for number in 0..count {
        let began = Instant::now();
        let exchange = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            connected.push(began.elapsed());
            stream.write_all(b"x").await?;
            stream.read_exact(&mut [0]).await?;
            answered.push(began.elapsed());
            Ok::<_, std::io::Error>(())
        };
        exchange.await.with_context(|| format!("connection {number} to {address}"))?;
    }
    println!("{}", json!({ "connect": percentiles(connected), "first_byte": percentiles(answered) }));
    Ok(())
}

/// Connect to a port that nobody listens on, until that is known: refused, or accepted by somebody else and ended;
/// `count` times, one after the other.
pub(super) async fn refusals(address: &str, count: usize) -> anyhow::Result<()> {
    let mut told = Vec::with_capacity(count);
    for number in 0..count {
        let began = Instant::now();
        if let Ok(mut stream) = TcpStream::connect(address).await {
            let read = stream.read(&mut [0]).await;
            anyhow::ensure!(!matches!(read, Ok(1..)), "connection {number} to {address}: somebody answers");
        }
        told.push(began.elapsed());
    }
    println!("{}", json!({ "refused": percentiles(told) }));
    Ok(())
}

/// Open `count` connections, exchange one byte on each, then keep them open until told to stop.
pub(super) async fn idle_connections(address: &str, count: usize) -> anyhow::Result<()> {
    let mut open = Vec::with_capacity(count);
    for number in 0..count {
        let mut stream =
            TcpStream::connect(address).await.with_context(|| format!("connection {number} to {address}"))?;
        stream.write_all(b"x").await?;
        stream.read_exact(&mut [0]).await?;
        open.push(stream);
    }
    println!("{count} connections are open");
    std::future::pending::<()>().await;
    drop(open);
    Ok(())
}

/// In microseconds.
fn percentiles(mut times: Vec<Duration>) -> serde_json::Value {
    times.sort_unstable();
    let at = |percent: usize| {
        let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(index).map(Duration::as_micros)
    };
    json!({ "p50": at(50), "p99": at(99) })
}
