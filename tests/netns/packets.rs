//! Packets made by hand, and a sniffer on the router.

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use mesh_tests::netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};

use crate::world::Pod;

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;

/// Port by which a marker is known.
const MARKER: u16 = 9;

/// A TCP segment seen on the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) from: SocketAddrV4,
    pub(crate) to: SocketAddrV4,
    pub(crate) flags: u8,
}

/// Sees every packet that crosses the router.
pub(crate) struct Sniffer {
    socket: Socket,
}

impl Sniffer {
    pub(crate) fn new(router: &Netns) -> Result<Self> {
        const ETH_P_IP: u16 = 0x0800;
        let protocol = Protocol::from(i32::from(ETH_P_IP.to_be()));
        let open = || Ok(Socket::new(Domain::PACKET, Type::DGRAM.nonblocking(), Some(protocol))?);
        Ok(Self { socket: router.run(open)? })
    }

    /// The TCP segments from `pod` that crossed until now. A datagram is sent after them and waited for, so what has
    /// not been seen when it arrives was never sent.
    pub(crate) fn tcp_from(&mut self, pod: &Pod, to: Ipv4Addr) -> Result<Vec<Segment>> {
        pod.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            Ok(socket.send_to(b"marker", (to, MARKER)).map(drop)?)
        })?;
        let mut seen = Vec::new();
        mesh_tests::eventually("the marker on the router", Duration::from_secs(5), || {
            match self.next()? {
                Some(Packet::Tcp(segment)) => seen.push(segment),
                Some(Packet::Marker(from)) if from == pod.address => return Ok(()),
                _ => {}
            }
            bail!("{seen:?}")
        })?;
        seen.retain(|segment: &Segment| *segment.from.ip() == pod.address);
        Ok(seen)
    }

    /// Waits for a TCP segment.
    pub(crate) fn wait(&mut self, what: &str, wanted: impl Fn(&Segment) -> bool) -> Result<Segment> {
        mesh_tests::eventually(what, Duration::from_secs(5), || {
            loop {
                match self.next()? {
                    Some(Packet::Tcp(segment)) if wanted(&segment) => return Ok(segment),
                    Some(_) => {}
                    None => bail!("not seen"),
                }
            }
        })
    }

    fn next(&mut self) -> Result<Option<Packet>> {
        let mut bytes = [0; 2048];
        match self.socket.read(&mut bytes) {
            Ok(length) => Ok(Some(parse(&bytes[..length]))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

enum Packet {
    Tcp(Segment),
    Marker(Ipv4Addr),
    Other,
}

fn parse(ip: &[u8]) -> Packet {
    let address = |at: usize| Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]);
    if ip.len() < 28 {
        return Packet::Other;
    }
    let transport = &ip[usize::from(ip[0] & 15) * 4..];
    let port = |at: usize| u16::from_be_bytes([transport[at], transport[at + 1]]);
    match ip[9] {
        6 if transport.len() >= 20 => Packet::Tcp(Segment {
            from: SocketAddrV4::new(address(12), port(0)),
            to: SocketAddrV4::new(address(16), port(2)),
            flags: transport[13],
        }),
        17 if port(2) == MARKER => Packet::Marker(address(12)),
        _ => Packet::Other,
    }
}

/// An IPv4 packet with a TCP segment, checksums and all; sequence numbers are far from any real ones.
pub(crate) fn segment(from: SocketAddr, to: SocketAddr, flags: u8) -> Result<Vec<u8>> {
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else { bail!("IPv4 only") };
    let mut tcp = [0; 20];
    tcp[0..2].copy_from_slice(&from.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&to.port().to_be_bytes());
    tcp[4..8].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    tcp[12] = 5 << 4;
    tcp[13] = flags;
    tcp[14..16].copy_from_slice(&1000_u16.to_be_bytes());
    let pseudo = [&from.ip().octets()[..], &to.ip().octets(), &[0, 6, 0, 20], &tcp].concat();
    let sum = checksum(&pseudo);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    // The kernel fills in the header's checksum and identification.
    let ip =
        [&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0][..], &from.ip().octets(), &to.ip().octets()].concat();
    Ok([&ip[..], &tcp].concat())
}

/// Sends a packet past the TCP stack, as CAP_NET_RAW allows, with a mark if wanted.
pub(crate) fn send_raw(pod: &Pod, packet: &[u8], mark: u32) -> Result<()> {
    const IPPROTO_RAW: i32 = 255;
    pod.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(IPPROTO_RAW)))?;
        socket.set_mark(mark)?;
        let octets: [u8; 4] = packet[16..20].try_into()?;
        match socket.send_to(packet, &SocketAddr::from((octets, 0)).into()) {
            // ENOBUFS is how a packet that the guard dropped looks to its sender.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            other => other.map(drop).context("raw send"),
        }
    })
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
