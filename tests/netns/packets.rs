//! Packets made by hand, and a sniffer on the router.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use mesh_tests::netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};

use crate::family::Family;
use crate::world::{Pod, World};

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;

/// Port by which a marker is known.
const MARKER: u16 = 9;

/// A TCP segment seen on the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
    pub(crate) data: usize,
}

/// Sees every packet of the world's family that crosses the router.
pub(crate) struct Sniffer {
    socket: Socket,
    family: Family,
}

impl Sniffer {
    pub(crate) fn new(world: &World) -> Result<Self> {
        Self::at(world, &world.router)
    }

    /// Somewhere else: the router's sees what comes in before the programs there do.
    pub(crate) fn at(world: &World, netns: &Netns) -> Result<Self> {
        const ETH_P_IP: u16 = 0x0800;
        const ETH_P_IPV6: u16 = 0x86dd;
        let protocol = Protocol::from(i32::from(world.family.pick(ETH_P_IP, ETH_P_IPV6).to_be()));
        let open = || Ok(Socket::new(Domain::PACKET, Type::DGRAM.nonblocking(), Some(protocol))?);
        Ok(Self { socket: netns.run(open)?, family: world.family })
    }

    /// The TCP segments from the pod's address that crossed until now.
    pub(crate) fn tcp_from(&mut self, pod: &Pod, to: IpAddr) -> Result<Vec<Segment>> {
        let mut seen = self.all_until(pod, to)?;
        seen.retain(|segment| segment.from.ip() == pod.address);
        Ok(seen)
    }

    /// The TCP segments that crossed until now. A datagram from the pod is sent after them and waited for, so what has
    /// not been seen when it arrives was never sent.
    pub(crate) fn all_until(&mut self, pod: &Pod, to: IpAddr) -> Result<Vec<Segment>> {
        pod.run(|| {
            let socket = UdpSocket::bind(self.family.anywhere(0))?;
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
            Ok(length) => Ok(Some(parse(self.family, &bytes[..length]))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

enum Packet {
    Tcp(Segment),
    Marker(IpAddr),
    Other,
}

fn parse(family: Family, ip: &[u8]) -> Packet {
    if ip.len() < family.pick(28, 48) {
        return Packet::Other;
    }
    let v4 = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[at..at + 4]).expect("four bytes"));
    let v6 = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[at..at + 16]).expect("sixteen bytes"));
    let word = |at: usize| usize::from(u16::from_be_bytes([ip[at], ip[at + 1]]));
    let (protocol, header, length, from, to) = match family {
        Family::V4 => (ip[9], usize::from(ip[0] & 15) * 4, word(2), v4(12), v4(16)),
        Family::V6 => (ip[6], 40, 40 + word(4), v6(8), v6(24)),
    };
    let transport = &ip[header..];
    let port = |at: usize| u16::from_be_bytes([transport[at], transport[at + 1]]);
    match protocol {
        6 if transport.len() >= 20 => Packet::Tcp(Segment {
            from: SocketAddr::new(from, port(0)),
            to: SocketAddr::new(to, port(2)),
            flags: transport[13],
            sequence: u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]),
            data: length.saturating_sub(header + usize::from(transport[12] >> 4) * 4),
        }),
        17 if port(2) == MARKER => Packet::Marker(from),
        _ => Packet::Other,
    }
}

/// Sequence number of every segment made by hand, far from any real ones.
pub(crate) const SEQUENCE: u32 = 0x1234_5678;

/// An IP packet with a TCP segment, checksums and all.
pub(crate) fn segment(from: SocketAddr, to: SocketAddr, flags: u8) -> Vec<u8> {
    segment_of(from, to, flags, [SEQUENCE, 0])
}

/// The same with these sequence and acknowledgement numbers.
pub(crate) fn segment_of(from: SocketAddr, to: SocketAddr, flags: u8, numbers: [u32; 2]) -> Vec<u8> {
    let mut tcp = [0; 20];
    tcp[0..2].copy_from_slice(&from.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&to.port().to_be_bytes());
    tcp[4..8].copy_from_slice(&numbers[0].to_be_bytes());
    tcp[8..12].copy_from_slice(&numbers[1].to_be_bytes());
    tcp[12] = 5 << 4;
    tcp[13] = flags;
    tcp[14..16].copy_from_slice(&1000_u16.to_be_bytes());
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let addresses = [octets(from.ip()), octets(to.ip())].concat();
    let sum = checksum(&[&addresses[..], &[0, 6, 0, 20], &tcp].concat());
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    let header: &[u8] = match from {
        SocketAddr::V4(_) => &[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0],
        SocketAddr::V6(_) => &[0x60, 0, 0, 0, 0, 20, 6, 64],
    };
    let mut packet = [header, &addresses, &tcp].concat();
    if from.is_ipv4() {
        let sum = checksum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// Sends a packet past the TCP stack, as CAP_NET_RAW allows, with a mark if wanted.
pub(crate) fn send_raw(pod: &Pod, packet: &[u8], mark: u32) -> Result<()> {
    pod.run(|| {
        let (socket, to) = raw(packet)?;
        socket.set_mark(mark)?;
        send(&socket, packet, to)
    })
}

/// The same packet again and again.
pub(crate) fn send_many_raw(pod: &Pod, packet: &[u8], count: u64) -> Result<()> {
    pod.run(|| {
        let (socket, to) = raw(packet)?;
        (0..count).try_for_each(|_| send(&socket, packet, to))
    })
}

/// A socket for a packet, and where that goes. Call it inside the pod.
fn raw(packet: &[u8]) -> Result<(Socket, SocketAddr)> {
    const IPPROTO_RAW: i32 = 255;
    let (domain, to): (_, IpAddr) = match packet[0] >> 4 {
        4 => (Domain::IPV4, <[u8; 4]>::try_from(&packet[16..20])?.into()),
        _ => (Domain::IPV6, <[u8; 16]>::try_from(&packet[24..40])?.into()),
    };
    Ok((Socket::new(domain, Type::RAW, Some(Protocol::from(IPPROTO_RAW)))?, SocketAddr::new(to, 0)))
}

fn send(socket: &Socket, packet: &[u8], to: SocketAddr) -> Result<()> {
    match socket.send_to(packet, &to.into()) {
        // ENOBUFS is how a packet that the guard dropped looks to its sender.
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
        other => other.map(drop).context("raw send"),
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
