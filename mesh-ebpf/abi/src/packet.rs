//! What a packet is, as far as the guard cares: TCP or not, and whether it carries data.
//!
//! **Invariant:** whoever receives the frame must not see TCP where this sees none. So the frame's own bytes count,
//! never what the sender's socket says of them (AF_PACKET lets it say anything), and what cannot be read is TCP
//! with data.

use crate::Address;

/// Bytes of a packet: in the kernel a helper call, in tests a slice.
pub trait Bytes {
    /// `N` bytes at `offset`, or none if the packet is shorter.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

/// What the guard sees of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    /// Not TCP.
    Other,
    /// TCP: its flags, and whether data comes with them. Fragments have no flags here, and data.
    Tcp {
        /// The flags byte of the header.
        flags: u8,
        /// Whether there are bytes after the header.
        data: bool,
        /// Where the IP header starts; [`NOWHERE`] where it is not found.
        ip: u32,
        /// Where the TCP header starts; 0 where it cannot be read.
        tcp: u32,
    },
}

impl Packet {
    /// All of it in one word; 0 is what is not TCP. No header starts beyond 64 KiB.
    #[inline(always)]
    pub const fn pack(self) -> u64 {
        match self {
            Self::Other => 0,
            Self::Tcp { flags, data, ip, tcp } => {
                1 | (data as u64) << 1 | (flags as u64) << 8 | (ip as u64) << 16 | (tcp as u64) << 32
            }
        }
    }

    /// What [`pack`](Self::pack) made a word of.
    #[inline(always)]
    pub const fn unpack(word: u64) -> Self {
        if word == 0 {
            return Self::Other;
        }
        let (flags, ip, tcp) = ((word >> 8) as u8, (word >> 16) as u16 as u32, (word >> 32) as u32);
        Self::Tcp { flags, data: word & 2 != 0, ip, tcp }
    }
}

/// Instead of the place of a header that there is none of to be read.
pub const NOWHERE: u32 = 0xffff;

/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const ETHERNET_HEADER: u32 = 14;
const VLAN_TAGS: u32 = 2;

const PROTOCOL_TCP: u8 = 6;
/// Extension headers followed; Linux sends one of a kind, and no more than these.
const EXTENSION_HEADERS: u32 = 6;

/// A packet with an Ethernet header at offset 0. A tag for VLAN 0 reaches the same receiver as no tag.
#[inline(always)]
pub fn ethernet(bytes: &impl Bytes) -> Packet {
    let Some(first) = bytes.load::<2>(12) else { return unreadable(NOWHERE) };
    let (mut ethertype, mut offset) = (u16::from_be_bytes(first), ETHERNET_HEADER);
    for _ in 0..VLAN_TAGS {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_QINQ {
            break;
        }
        let Some(inner) = bytes.load::<2>(offset + 2) else { return unreadable(NOWHERE) };
        (ethertype, offset) = (u16::from_be_bytes(inner), offset + 4);
    }
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(bytes, offset),
        ETHERTYPE_IPV6 => ipv6(bytes, offset),
        ETHERTYPE_VLAN | ETHERTYPE_QINQ => unreadable(NOWHERE),
        _ => Packet::Other,
    }
}

/// A packet without a link-layer header: the version is in its first byte.
#[inline(always)]
pub fn ip(bytes: &impl Bytes) -> Packet {
    match bytes.load::<1>(0) {
        Some([first]) if first >> 4 == 4 => ipv4(bytes, 0),
        Some([first]) if first >> 4 == 6 => ipv6(bytes, 0),
        Some(_) => Packet::Other,
        None => unreadable(0),
    }
}

#[inline(always)]
fn ipv4(bytes: &impl Bytes, start: u32) -> Packet {
    let Some(head) = bytes.load::<10>(start) else { return unreadable(start) };
    if head[9] != PROTOCOL_TCP {
        return Packet::Other;
    }
    let header = u32::from(head[0] & 0x0f) * 4;
    let total = u32::from(u16::from_be_bytes([head[2], head[3]]));
    // More fragments, or an offset.
    let fragment = u16::from_be_bytes([head[6], head[7]]) & 0x3fff != 0;
    if fragment || header < 20 {
        return unreadable(start);
    }
    // A total length of 0 is a segmentation offload packet of more than 64 KiB.
    let length = if total == 0 { u32::MAX } else { total.wrapping_sub(header) };
    tcp(bytes, start, start + header, length)
}

#[inline(always)]
fn ipv6(bytes: &impl Bytes, start: u32) -> Packet {
    let Some(head) = bytes.load::<8>(start) else { return unreadable(start) };
    let payload = u32::from(u16::from_be_bytes([head[4], head[5]]));
    let (mut next, mut offset) = (head[6], start + 40);
    for _ in 0..EXTENSION_HEADERS {
        if next == PROTOCOL_TCP {
            let consumed = offset - start - 40;
            let length = if payload == 0 { u32::MAX } else { payload.wrapping_sub(consumed) };
            return tcp(bytes, start, offset, length);
        }
        let Some(length) = extension(bytes, next, offset) else { return Packet::Other };
        let Some((following, length)) = length else { return unreadable(start) };
        (next, offset) = (following, offset + length);
    }
    unreadable(start)
}

/// The header after the extension header `kind` at `offset`, and its length: none if it is no extension header,
/// inner none if what follows cannot be told.
#[inline(always)]
fn extension(bytes: &impl Bytes, kind: u8, offset: u32) -> Option<Option<(u8, u32)>> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    const MOBILITY: u8 = 135;

    if !matches!(kind, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION | MOBILITY) {
        return None;
    }
    let Some([next, length]) = bytes.load::<2>(offset) else { return Some(None) };
    let length = u32::from(length);
    Some(match kind {
        // A fragment of anything else than TCP passes; its first header says what the whole is.
        FRAGMENT if next == PROTOCOL_TCP || is_extension(next) => None,
        FRAGMENT => return None,
        AUTHENTICATION => Some((next, (length + 2) * 4)),
        _ => Some((next, (length + 1) * 8)),
    })
}

#[inline(always)]
fn is_extension(kind: u8) -> bool {
    matches!(kind, 0 | 43 | 44 | 51 | 60 | 135)
}

#[inline(always)]
fn tcp(bytes: &impl Bytes, ip: u32, start: u32, length: u32) -> Packet {
    let Some([offset, flags]) = bytes.load::<2>(start + 12) else { return unreadable(ip) };
    let header = u32::from(offset >> 4) * 4;
    Packet::Tcp { flags, data: length != header, ip, tcp: start }
}

#[inline(always)]
fn unreadable(ip: u32) -> Packet {
    Packet::Tcp { flags: 0, data: true, ip, tcp: 0 }
}

/// Source and destination of a packet whose IP header is at `ip` and TCP header at `tcp`, for an event; zeroes where
/// there is nothing to read: no address without the other, since the verifier walks on from each way to miss one.
#[inline(always)]
pub fn endpoints(bytes: &impl Bytes, ip: u32, tcp: u32) -> (Address, Address, [u16; 2]) {
    let none = Address::from_v6_words([0; 4]);
    let (source, destination) = addresses(bytes, ip).unwrap_or((none, none));
    let ports = match bytes.load::<4>(tcp) {
        Some([a, b, c, d]) if tcp != 0 => [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])],
        _ => [0, 0],
    };
    (source, destination, ports)
}

#[inline(always)]
fn addresses(bytes: &impl Bytes, ip: u32) -> Option<(Address, Address)> {
    // The bytes of another header are nobody's addresses.
    if ip == NOWHERE {
        return None;
    }
    match bytes.load::<1>(ip)?[0] >> 4 {
        4 => Some((address4(bytes, ip + 12)?, address4(bytes, ip + 16)?)),
        6 => Some((address6(bytes, ip + 8)?, address6(bytes, ip + 24)?)),
        _ => None,
    }
}

#[inline(always)]
fn address4(bytes: &impl Bytes, offset: u32) -> Option<Address> {
    Some(Address::from_v4_word(u32::from_ne_bytes(bytes.load::<4>(offset)?)))
}

#[inline(always)]
fn address6(bytes: &impl Bytes, offset: u32) -> Option<Address> {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes.load::<16>(offset)?;
    let word = u32::from_ne_bytes;
    Some(Address::from_v6_words([
        word([a, b, c, d]),
        word([e, f, g, h]),
        word([i, j, k, l]),
        word([m, n, o, p]),
    ]))
}

#[cfg(test)]
mod tests;
