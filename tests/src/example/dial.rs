//! Clients that only want to know whether a connection comes about.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::Instant;
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

/// What is done with each connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    /// Between two connections, and between the round trips of one.
    pub(super) every: Duration,
    /// How long it is kept busy.
    pub(super) last: Duration,
    /// Of a round trip.
    pub(super) bytes: usize,
}

/// The longest that an answer may take.
const LIMIT: Duration = Duration::from_secs(15);
/// What took longer is told.
const SLOW: Duration = Duration::from_secs(1);

impl Manner {
    /// One connection: a round trip (connecting alone proves nothing behind a proxy), more of them while it lasts, and
    /// an end in order. What its longest round trip took, the first one with the connecting, is added to `longest`.
    async fn converse(
        self,
        address: &str,
        stop: &CancellationToken,
        answered: &Once,
        longest: &mut Duration,
    ) -> std::io::Result<()> {
        let began = Instant::now();
        let first = async {
            let mut stream = TcpStream::connect(address).await?;
            self.round_trip(&mut stream, 0).await?;
            Ok(stream)
        };
        let mut stream = within(longest, first).await?;
        answered.call_once(|| println!("answered"));
        let mut round: u8 = 0;
        while began.elapsed() < self.last && !stop.is_cancelled() {
            tokio::select! {
                () = tokio::time::sleep(self.every) => {}
                () = stop.cancelled() => {}
            }
            round = round.wrapping_add(1);
            within(longest, self.round_trip(&mut stream, round)).await?;
        }
        if self.last.is_zero() {
            return Ok(());
        }
        let end = async {
            stream.shutdown().await?;
            match stream.read(&mut [0; 1]).await? {
                0 => Ok(()),
                _ => Err(ErrorKind::InvalidData.into()),
            }
        };
        within(longest, end).await
    }

    /// There and back, both at a time.
    async fn round_trip(self, stream: &mut TcpStream, round: u8) -> std::io::Result<()> {
        let there = vec![round; self.bytes];
        let mut back = vec![!round; self.bytes];
        let (mut read, mut write) = stream.split();
        let (sent, received) = tokio::join!(write.write_all(&there), read.read_exact(&mut back));
        received.and(sent)?;
        if there == back { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
    }
}

async fn within<T>(
    longest: &mut Duration,
    work: impl Future<Output = std::io::Result<T>>,
) -> std::io::Result<T> {
    let began = Instant::now();
    let result = tokio::time::timeout(LIMIT, work).await;
    *longest = began.elapsed().max(*longest);
    result.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
}

/// How the connections of `dial` ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dialled {
    /// Made their round trips.
    pub done: u32,
    /// Were refused.
    pub refused: u32,
    /// Came about, and ended before their time.
    pub reset: u32,
    /// Got no answer within 15 s.
    pub lost: u32,
    /// Failed in another way, by the kind of error.
    pub other: BTreeMap<String, u32>,
    /// Milliseconds of the round trip that took longest.
    pub longest_ms: u64,
}

impl Dialled {
    /// Those that did not make theirs.
    #[must_use]
    pub fn failed(&self) -> u32 {
        self.refused + self.reset + self.lost + self.other.values().sum::<u32>()
    }

    /// Both together.
    #[must_use]
    pub fn and(mut self, more: Self) -> Self {
        self.done += more.done;
        self.refused += more.refused;
        self.reset += more.reset;
        self.lost += more.lost;
        for (kind, count) in more.other {
            *self.other.entry(kind).or_default() += count;
        }
        self.longest_ms = self.longest_ms.max(more.longest_ms);
        self
    }

    fn count(&mut self, result: std::io::Result<()>, took: Duration) {
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

/// Prints `answered` after the first round trip, what was slow or failed, and the counts as its last line.
pub(super) async fn run(
    addresses: Vec<String>,
    parallel: usize,
    manner: Manner,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let dialled = Arc::new(Mutex::new(Dialled::default()));
    let answered = Arc::new(Once::new());
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..parallel.max(1) {
        let (addresses, stop) = (addresses.clone(), stop.clone());
        let (dialled, answered) = (dialled.clone(), answered.clone());
        workers.spawn(async move {
            for address in addresses.iter().cycle().skip(number % addresses.len().max(1)) {
                if stop.is_cancelled() {
                    return;
                }
                let mut longest = Duration::ZERO;
                let result = manner.converse(address, &stop, &answered, &mut longest).await;
                if result.is_err() || longest > SLOW {
                    eprintln!("{} {address} {longest:?}: {result:?}", Timestamp::now());
                }
                dialled.lock().unwrap_or_else(PoisonError::into_inner).count(result, longest);
                tokio::time::sleep(manner.every).await;
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
    use std::io::Error;

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
        let twice = dialled.clone().and(dialled);
        assert_eq!((twice.done, twice.failed(), twice.longest_ms), (2, 10, 7));
    }
}
