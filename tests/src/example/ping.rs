//! ICMP echo, with the raw socket that a container's default capabilities allow.

use std::io::{ErrorKind, Read as _};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use socket2::{Domain, Protocol, Socket, Type};

/// Type 8, code 0, its checksum, an identifier of our own and sequence 1 (RFC 792).
fn request(identifier: u16) -> [u8; 8] {
    let [high, low] = identifier.to_be_bytes();
    // The sum of the words is 0x0800 + identifier + 1, folded once.
    let sum = 0x0801 + u32::from(identifier);
    let [check_high, check_low] = (!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes();
    [8, 0, check_high, check_low, high, low, 0, 1]
}

/// Whether this IPv4 packet is the echo of ours.
fn is_reply(packet: &[u8], identifier: u16) -> bool {
    let header = usize::from(packet.first().copied().unwrap_or_default() & 0x0f) * 4;
    let icmp = packet.get(header..).unwrap_or_default();
    icmp.first() == Some(&0) && icmp.get(4..6) == Some(&identifier.to_be_bytes())
}

/// Send one, wait 3 s for its reply.
pub(super) fn once(address: Ipv4Addr) -> anyhow::Result<()> {
    let mut socket =
        Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).context("open a raw socket")?;
    let identifier: u16 = rand::random();
    let limit = Duration::from_secs(3);
    socket.set_read_timeout(Some(limit))?;
    socket.send_to(&request(identifier), &SocketAddrV4::new(address, 0).into()).context("send")?;
    let began = Instant::now();
    let mut packet = [0; 1500];
    while began.elapsed() < limit {
        match socket.read(&mut packet) {
            Ok(length) if is_reply(&packet[..length], identifier) => {
                println!("{address} echoed");
                return Ok(());
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("no echo from {address} within {limit:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_makes_the_sum_of_all_words_ffff() {
        for identifier in [0, 1, 0x1234, 0xf7fe, 0xf7ff, 0xffff] {
            let words: u32 =
                request(identifier).chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
            let folded: u32 = (words & 0xffff) + (words >> 16);
            assert_eq!(folded, 0xffff, "{identifier:x}");
        }
    }

    #[test]
    fn an_echo_is_ours_by_its_identifier() {
        let mut packet = vec![0x45; 20];
        packet.extend([0, 0, 0, 0, 0x12, 0x34, 0, 1]);
        assert!(is_reply(&packet, 0x1234));
        assert!(!is_reply(&packet, 0x1235));
        assert!(!is_reply(&packet[..22], 0x1234) && !is_reply(&[], 0));
        packet[20] = 8;
        assert!(!is_reply(&packet, 0x1234), "a request is no reply");
    }
}
