//! Ethernet frames with IPv4 or IPv6, and TCP or UDP in them.

use std::net::{IpAddr, SocketAddr};

use super::stream::Flow;

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// A TCP segment or UDP datagram.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    pub protocol: Protocol,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// TCP's sequence number, 0 for UDP.
    pub sequence: u32,
    /// TCP's flags, 0 for UDP.
    pub flags: u8,
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    pub const SYN: u8 = 0x02;
    pub const ACK: u8 = 0x10;

    /// `None` for anything else. Segments that the kernel has not split yet are as long as they come.
    #[must_use]
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let ip = frame.get(14..)?;
        let Internet { protocol, source, destination, inner } = match frame.get(12..14)? {
            [0x08, 0x00] => v4(ip)?,
            [0x86, 0xdd] => v6(ip)?,
            _ => return None,
        };
        let source = SocketAddr::from((source, word(inner, 0)?));
        let destination = SocketAddr::from((destination, word(inner, 2)?));
        match protocol {
            6 => {
                let offset = usize::from(inner.get(12)? >> 4) * 4;
                let sequence = u32::from(word(inner, 4)?) << 16 | u32::from(word(inner, 6)?);
                let (flags, payload) = (*inner.get(13)?, inner.get(offset..)?);
                Some(Self { protocol: Protocol::Tcp, source, destination, sequence, flags, payload })
            }
            17 => {
                let payload = inner.get(8..)?;
                Some(Self { protocol: Protocol::Udp, source, destination, sequence: 0, flags: 0, payload })
            }
            _ => None,
        }
    }

    #[must_use]
    pub fn flow(&self) -> Flow {
        Flow { source: self.source, destination: self.destination }
    }

    /// Whether either end has this port.
    #[must_use]
    pub fn has_port(&self, port: u16) -> bool {
        self.source.port() == port || self.destination.port() == port
    }

    /// Whether it asks for a new TCP connection.
    #[must_use]
    pub fn opens(&self) -> bool {
        self.flags & (Self::SYN | Self::ACK) == Self::SYN
    }
}

/// What both versions of the Internet Protocol say.
struct Internet<'a> {
    protocol: u8,
    source: IpAddr,
    destination: IpAddr,
    inner: &'a [u8],
}

/// RFC 791.
fn v4(ip: &[u8]) -> Option<Internet<'_>> {
    let header = usize::from(ip.first()? & 0x0f) * 4;
    // A total length of 0 is a segment for the hardware to split.
    let total = match usize::from(word(ip, 2)?) {
        0 => ip.len(),
        length => length,
    };
    Some(Internet {
        protocol: *ip.get(9)?,
        source: IpAddr::from(octets::<4>(ip, 12)?),
        destination: IpAddr::from(octets::<4>(ip, 16)?),
        inner: ip.get(header..total.min(ip.len()))?,
    })
}

/// RFC 8200; of a datagram in fragments only the first has a transport header.
fn v6(ip: &[u8]) -> Option<Internet<'_>> {
    // A payload length of 0 is a jumbogram (RFC 2675) or a segment for the hardware to split.
    let end = match usize::from(word(ip, 4)?) {
        0 => ip.len(),
        length => (V6_HEADER + length).min(ip.len()),
    };
    let (mut protocol, mut at) = (*ip.get(6)?, V6_HEADER);
    while [HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION].contains(&protocol) {
        let length = match protocol {
            FRAGMENT if word(ip, at + 2)? >> 3 != 0 => return None,
            FRAGMENT => 8,
            _ => 8 + usize::from(*ip.get(at + 1)?) * 8,
        };
        (protocol, at) = (*ip.get(at)?, at + length);
    }
    Some(Internet {
        protocol,
        source: IpAddr::from(octets::<16>(ip, 8)?),
        destination: IpAddr::from(octets::<16>(ip, 24)?),
        inner: ip.get(at..end)?,
    })
}

const V6_HEADER: usize = 40;
/// Extension headers by their protocol numbers.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn octets<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A TCP segment from 10.0.0.1:1000 to 10.0.0.2:2000.
    pub(crate) fn frame(sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(u16::try_from(40 + payload.len()).expect("short").to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x03, 0xe8, 0x07, 0xd0]);
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        // Ethernet pads short frames.
        frame.resize(frame.len().max(60), 0);
        frame
    }

    /// A TCP segment from fd00::1:1000 to fd00::2:2000, after these extension headers.
    fn frame_v6(first: u8, extensions: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(u16::try_from(extensions.len() + 20 + payload.len()).expect("short").to_be_bytes());
        frame.extend([first, 64]);
        for last in [1, 2] {
            frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
        frame.extend(extensions);
        frame.extend([0x03, 0xe8, 0x07, 0xd0, 0, 0, 0, 7, 0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn a_segment_over_ipv6_with_and_without_extension_headers() {
        let options = [6, 0, 1, 4, 0, 0, 0, 0];
        let routed_options = [[43, 0, 1, 4, 0, 0, 0, 0], options].concat();
        let first_fragment = [6, 0, 0, 1, 0, 0, 0, 9];
        for (what, first, extensions) in [
            ("none", 6, [].as_slice()),
            ("destination options", DESTINATION, &options),
            ("hop by hop, then routing", HOP_BY_HOP, &routed_options),
            ("first fragment", FRAGMENT, &first_fragment),
        ] {
            let frame = frame_v6(first, extensions, b"hi");
            let packet = Packet::parse(&frame).expect(what);
            assert_eq!((packet.sequence, packet.payload), (7, b"hi".as_slice()), "{what}");
            assert_eq!(packet.source, "[fd00::1]:1000".parse().expect("literal"), "{what}");
            assert_eq!(packet.destination, "[fd00::2]:2000".parse().expect("literal"), "{what}");
        }
        let later_fragment = [6, 0, 0, 8, 0, 0, 0, 9];
        assert!(Packet::parse(&frame_v6(FRAGMENT, &later_fragment, b"hi")).is_none());
    }

    #[test]
    fn a_segment_without_its_padding() {
        let frame = frame(7, b"hi");
        let packet = Packet::parse(&frame).expect("a segment");
        assert_eq!((packet.sequence, packet.payload), (7, b"hi".as_slice()));
        assert_eq!(packet.source, "10.0.0.1:1000".parse().expect("literal"));
        assert_eq!(packet.destination, "10.0.0.2:2000".parse().expect("literal"));
    }

    #[test]
    fn no_frame_panics() {
        let whole = frame(7, b"payload");
        for length in 0..whole.len() {
            let _ = Packet::parse(&whole[..length]);
        }
        let whole = frame_v6(DESTINATION, &[6, 0, 1, 4, 0, 0, 0, 0], b"payload");
        for length in 0..whole.len() {
            let _ = Packet::parse(&whole[..length]);
        }
        assert!(Packet::parse(&[0xff; 80]).is_none());
    }
}
