//! Captures what crosses the fabric between nodes, to a pcap file and for questions: was this text seen in the clear,
//! which TLS handshakes took place, how many packets of a kind.
//!
//! **Invariant:** a capture that lost a packet answers no question about absence; it fails.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;

use crate::netns::Netns;

mod packet;
mod socket;
mod stream;
mod tls;

pub use packet::{Packet, Protocol};
pub use stream::Flow;

/// Memory a capture may take. What comes after is lost, and counted as such.
const LIMIT: usize = 512 << 20;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<Vec<Vec<u8>>>>>,
}

/// What was captured.
#[derive(Debug)]
pub struct Captured {
    path: PathBuf,
    frames: Vec<Vec<u8>>,
}

/// One TLS handshake that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handshake {
    pub flow: Flow,
    /// What the server chose, 0x0304 for TLS 1.3.
    pub version: u16,
}

impl Capture {
    /// Start to capture in `router`, to a pcap file at `path`.
    pub fn start(router: &Netns, path: &Path) -> anyhow::Result<Self> {
        let socket = router.run(socket::open)?;
        let mut file =
            BufWriter::new(File::create(path).with_context(|| format!("make {}", path.display()))?);
        file.write_all(&pcap_header())?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || record(&socket, file, &stopped));
        Ok(Self { path: path.to_path_buf(), stop, thread: Some(thread) })
    }

    /// Stop, after what has crossed the fabric up to now was read.
    pub fn stop(mut self) -> anyhow::Result<Captured> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("a capture stops once")?;
        let frames = thread.join().map_err(|_| anyhow::anyhow!("the capture's thread panicked"))??;
        Ok(Captured { path: self.path.clone(), frames })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Captured {
    /// The pcap file, for tcpdump or Wireshark.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The packets that hold, in the order of their arrival. Each is seen once, on its way into the router.
    pub fn packets(&self) -> impl Iterator<Item = Packet<'_>> {
        self.frames.iter().filter_map(|frame| Packet::parse(frame))
    }

    #[must_use]
    pub fn count(&self, holds: impl Fn(&Packet<'_>) -> bool) -> usize {
        self.packets().filter(holds).count()
    }

    /// The flows in which `text` went over the fabric in the clear.
    #[must_use]
    pub fn flows_with(&self, text: &[u8]) -> Vec<Flow> {
        let mut flows: Vec<Flow> = stream::reassemble(self.packets())
            .into_iter()
            .filter(|(_, bytes)| contains(bytes, text))
            .map(|(flow, _)| flow)
            .collect();
        let datagrams = self
            .packets()
            .filter(|packet| packet.protocol == Protocol::Udp && contains(packet.payload, text));
        flows.extend(datagrams.map(|packet| packet.flow()));
        flows
    }

    /// The TLS handshakes that were answered.
    #[must_use]
    pub fn handshakes(&self) -> Vec<Handshake> {
        let streams = stream::reassemble(self.packets());
        streams
            .iter()
            .filter(|(_, bytes)| tls::is_client_hello(bytes))
            .filter_map(|(flow, _)| {
                let version = tls::server_version(streams.get(&flow.reversed())?)?;
                Some(Handshake { flow: *flow, version })
            })
            .collect()
    }

    /// TLS 1.3 handshakes from `client` to `server`.
    #[must_use]
    pub fn tls13(&self, client: IpAddr, server: IpAddr) -> Vec<Handshake> {
        let between = |handshake: &Handshake| {
            handshake.flow.source.ip() == client && handshake.flow.destination.ip() == server
        };
        self.handshakes().into_iter().filter(|one| one.version == tls::TLS13 && between(one)).collect()
    }
}

fn record(
    socket: &socket::PacketSocket,
    mut file: BufWriter<File>,
    stop: &AtomicBool,
) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut buffer = vec![0; 1 << 17];
    let (mut frames, mut kept) = (Vec::new(), 0);
    loop {
        match socket.receive(&mut buffer)? {
            socket::Received::Frame(length) => {
                let frame = &buffer[..length];
                file.write_all(&pcap_record(length))?;
                file.write_all(frame)?;
                kept += length;
                anyhow::ensure!(
                    kept < LIMIT,
                    "more than {} MiB crossed the fabric: capture less",
                    LIMIT >> 20
                );
                frames.push(frame.to_vec());
            }
            socket::Received::Nothing if stop.load(Ordering::Relaxed) => break,
            socket::Received::Outgoing | socket::Received::Nothing => {}
        }
    }
    file.flush()?;
    let lost = socket.lost()?;
    anyhow::ensure!(lost == 0, "the capture lost {lost} packets");
    Ok(frames)
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    !text.is_empty() && bytes.windows(text.len()).any(|window| window == text)
}

/// Version 2.4, microseconds, Ethernet, in this machine's byte order.
fn pcap_header() -> Vec<u8> {
    let mut header = 0xa1b2_c3d4_u32.to_ne_bytes().to_vec();
    for half in [2_u16, 4] {
        header.extend(half.to_ne_bytes());
    }
    for word in [0_u32, 0, 1 << 17, 1] {
        header.extend(word.to_ne_bytes());
    }
    header
}

fn pcap_record(length: usize) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    // Seconds wrap in 2106, as the format has it.
    [now.as_secs() as u32, now.subsec_micros(), length, length]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}
