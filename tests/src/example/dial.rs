//! Clients that only want to know whether a connection comes about.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio_util::sync::CancellationToken;

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

/// How the connections of `dial` ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dialled {
    /// Made a round trip.
    pub done: u32,
    /// Were refused.
    pub refused: u32,
    /// Came about, and ended before their round trip.
    pub reset: u32,
    /// Did not end within 15 s.
    pub lost: u32,
    /// Failed in another way, by the kind of error.
    pub other: BTreeMap<String, u32>,
    /// Milliseconds of the one that took longest.
    pub longest_ms: u64,
}

impl Dialled {
    /// Those that made no round trip.
    #[must_use]
    pub fn failed(&self) -> u32 {
        self.refused + self.reset + self.lost + self.other.values().sum::<u32>()
    }

    fn count(&mut self, result: std::io::Result<()>, took: Duration) {
        use std::io::ErrorKind;
        let number = match result {
            Ok(()) => &mut self.done,
            Err(error) => match error.kind() {
                ErrorKind::ConnectionRefused => &mut self.refused,
                ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => {
                    &mut self.reset
                }
                ErrorKind::TimedOut => &mut self.lost,
                other => self.other.entry(format!("{other:?}")).or_default(),
            },
        };
        *number += 1;
        self.longest_ms = self.longest_ms.max(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
    }
}

/// Prints `answered` after the first round trip, and the counts as its last line.
pub(super) async fn run(
    addresses: Vec<String>,
    parallel: usize,
    every: Duration,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let dialled = Arc::new(Mutex::new(Dialled::default()));
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..parallel.max(1) {
        let (addresses, dialled, stop) = (addresses.clone(), dialled.clone(), stop.clone());
        workers.spawn(async move {
            for address in addresses.iter().cycle().skip(number % addresses.len().max(1)) {
                if stop.is_cancelled() {
                    return;
                }
                let began = tokio::time::Instant::now();
                let limit = Duration::from_secs(15);
                let result = tokio::time::timeout(limit, round_trip(address)).await;
                let result = result.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
                {
                    let mut dialled = dialled.lock().unwrap_or_else(PoisonError::into_inner);
                    if result.is_ok() && dialled.done == 0 {
                        println!("answered");
                    }
                    dialled.count(result, began.elapsed());
                }
                tokio::time::sleep(every).await;
            }
        });
    }
    while workers.join_next().await.is_some() {}
    let dialled = dialled.lock().unwrap_or_else(PoisonError::into_inner);
    println!("{}", serde_json::to_string(&*dialled)?);
    Ok(())
}

pub(super) async fn datagram(address: &str, text: &str) -> anyhow::Result<()> {
    let mut found = tokio::net::lookup_host(address).await.with_context(|| format!("resolve {address}"))?;
    let to = found.next().with_context(|| format!("{address} has no address"))?;
    let from: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((from, 0)).await?;
    socket.connect(to).await.with_context(|| format!("reach {to}"))?;
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

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use super::*;

    #[test]
    fn each_end_is_counted_once() {
        let mut dialled = Dialled::default();
        for kind in [
            ErrorKind::ConnectionRefused,
            ErrorKind::ConnectionReset,
            ErrorKind::UnexpectedEof,
            ErrorKind::TimedOut,
            ErrorKind::HostUnreachable,
        ] {
            dialled.count(Err(Error::from(kind)), Duration::from_millis(7));
        }
        dialled.count(Ok(()), Duration::from_millis(3));
        assert_eq!((dialled.done, dialled.refused, dialled.reset, dialled.lost), (1, 1, 2, 1));
        assert_eq!(dialled.other, BTreeMap::from([("HostUnreachable".to_owned(), 1)]));
        assert_eq!((dialled.failed(), dialled.longest_ms), (5, 7));
    }
}
