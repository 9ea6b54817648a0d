//! A UDP datagram with its IP header, for a raw socket (RFC 791, RFC 8200, RFC 768). Pure.

use std::net::{IpAddr, SocketAddr};

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const V4_HEADER: usize = 20;
const HOPS: u8 = 64;

/// The whole packet; none if it would be too long, or the addresses are of two families.
pub(super) fn packet(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER + payload.len()).ok()?;
    let (mut packet, pseudo) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = u16::try_from(V4_HEADER + usize::from(length)).ok()?.to_be_bytes();
            // The kernel fills in identification and checksum.
            let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, HOPS, UDP, 0, 0];
            header.extend(from.octets());
            header.extend(to.octets());
            (header, [&from.octets()[..], &to.octets()].concat())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = length.to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, length[0], length[1], UDP, HOPS];
            header.extend(from.octets());
            header.extend(to.octets());
            (header, [&from.octets()[..], &to.octets()].concat())
        }
        _ => return None,
    };
    let udp = packet.len();
    for word in [from.port(), to.port(), length, 0] {
        packet.extend(word.to_be_bytes());
    }
    packet.extend(payload);
    // The pseudo header: addresses, protocol, length.
    let sum = sum(&pseudo) + u64::from(UDP) + u64::from(length) + sum(&packet[udp..]);
    packet[udp + 6..udp + 8].copy_from_slice(&checksum(sum).to_be_bytes());
    Some(packet)
}

/// Of 16-bit words, the last one filled up with zeroes.
fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks(2).map(|word| u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]));
    words.map(u64::from).sum()
}

/// Ones' complement (RFC 1071); 0 would say that there is none.
fn checksum(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !(sum as u16) {
        0 => 0xffff,
        checksum => checksum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(from: &str, to: &str, payload: &[u8]) -> Option<Vec<u8>> {
        packet(from.parse().unwrap(), to.parse().unwrap(), payload)
    }

    #[test]
    fn a_receivers_sum_over_everything_is_ones() {
        for payload in [&b""[..], b"a", b"ab", b"\xff\xff\xff", &[0x80; 999]] {
            let v4 = sent("8.8.8.8:53", "10.1.0.3:4321", payload).unwrap();
            assert_eq!((v4[0], v4[9], &v4[12..20]), (0x45, 17, &[8, 8, 8, 8, 10, 1, 0, 3][..]));
            assert_eq!(usize::from(u16::from_be_bytes([v4[2], v4[3]])), v4.len());
            let v6 = sent("[2001:db8::1]:53", "[fd00::3]:4321", payload).unwrap();
            assert_eq!((v6[0], v6[6]), (0x60, 17));
            for (addresses, udp) in [(&v4[12..20], &v4[20..]), (&v6[8..40], &v6[40..])] {
                assert_eq!(&udp[..4], [0, 53, 0x10, 0xe1]);
                assert_eq!(&udp[8..], payload);
                assert_eq!(usize::from(u16::from_be_bytes([udp[4], udp[5]])), udp.len());
                let mut total = sum(addresses) + u64::from(UDP) + udp.len() as u64 + sum(udp);
                while total > 0xffff {
                    total = (total & 0xffff) + (total >> 16);
                }
                assert_eq!(total, 0xffff);
            }
        }
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        assert_eq!(sent("8.8.8.8:53", "[fd00::3]:1", b""), None);
        assert!(sent("8.8.8.8:53", "10.1.0.3:1", &[0; 65_507]).is_some());
        assert_eq!(sent("8.8.8.8:53", "10.1.0.3:1", &[0; 65_508]), None);
        assert_eq!(sent("[fd00::1]:53", "[fd00::3]:1", &[0; 65_528]), None);
    }
}
