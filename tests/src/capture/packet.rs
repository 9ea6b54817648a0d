//! Ethernet frames with IPv4, TCP and UDP in them.

use std::net::{Ipv4Addr, SocketAddr};

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
        if frame.get(12..14)? != [0x08, 0x00] {
            return None;
        }
        let ip = frame.get(14..)?;
        let header = usize::from(ip.first()? & 0x0f) * 4;
        // A total length of 0 is a segment for the hardware to split.
        let total = match usize::from(word(ip, 2)?) {
            0 => ip.len(),
            length => length,
        };
        let (source, destination) = (address(ip, 12)?, address(ip, 16)?);
        let protocol = *ip.get(9)?;
        let inner = ip.get(header..total.min(ip.len()))?;
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

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn address(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(octets.into())
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
        assert!(Packet::parse(&[0xff; 80]).is_none());
    }
}
