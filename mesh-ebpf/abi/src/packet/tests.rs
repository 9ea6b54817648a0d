extern crate std;

use core::net::IpAddr;
use std::vec::Vec;

use super::*;

struct Slice(Vec<u8>);

impl Bytes for Slice {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.get(offset as usize..offset as usize + N)?.try_into().ok()
    }
}

fn frame(tags: &[u16], ethertype: u16, rest: &[u8]) -> Vec<u8> {
    let mut bytes = [0; 12].to_vec();
    for tag in tags {
        bytes.extend_from_slice(&tag.to_be_bytes());
        bytes.extend_from_slice(&[0, 0]);
    }
    bytes.extend_from_slice(&ethertype.to_be_bytes());
    bytes.extend_from_slice(rest);
    bytes
}

fn v4(protocol: u8, options: usize, fragment: u16, rest: &[u8]) -> Vec<u8> {
    let header = 20 + options;
    let mut bytes = [0; 20].to_vec();
    bytes[0] = 0x40 | (header / 4) as u8;
    bytes[2..4].copy_from_slice(&((header + rest.len()) as u16).to_be_bytes());
    bytes[6..8].copy_from_slice(&fragment.to_be_bytes());
    bytes[9] = protocol;
    bytes[12..20].copy_from_slice(&[10, 1, 0, 3, 10, 2, 0, 9]);
    bytes.resize(header, 1);
    bytes.extend_from_slice(rest);
    bytes
}

fn v6(next: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = [0; 40].to_vec();
    bytes[0] = 0x60;
    bytes[4..6].copy_from_slice(&(rest.len() as u16).to_be_bytes());
    bytes[6] = next;
    (bytes[8], bytes[24]) = (0xfd, 0xfe);
    bytes.extend_from_slice(rest);
    bytes
}

fn segment(flags: u8, options: usize, data: usize) -> Vec<u8> {
    let mut bytes = [0; 20].to_vec();
    bytes[..4].copy_from_slice(&[0x1f, 0x90, 0, 80]);
    bytes[12] = (((20 + options) / 4) << 4) as u8;
    bytes[13] = flags;
    bytes.resize(20 + options + data, 0);
    bytes
}

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn frames() {
    let syn = segment(SYN, 20, 0);
    let tcp = |flags, data, ip, tcp| Packet::Tcp { flags, data, ip, tcp };
    let any = |ip| tcp(0, true, ip, 0);
    let fragmented = |next: u8, offset: u16, rest: &[u8]| {
        let [a, b] = (offset << 3).to_be_bytes();
        v6(44, &join(&[&[next, 0, a, b, 0, 0, 0, 1], rest]))
    };
    let mut big = v4(6, 0, 0, &syn);
    big[2..4].fill(0);
    for (why, bytes, expected) in [
        ("SYN", frame(&[], 0x0800, &v4(6, 0, 0, &syn)), tcp(SYN, false, 14, 34)),
        ("SYN with data", frame(&[], 0x0800, &v4(6, 0, 0, &segment(SYN, 20, 1))), tcp(SYN, true, 14, 34)),
        ("IP options", frame(&[], 0x0800, &v4(6, 8, 0, &syn)), tcp(SYN, false, 14, 42)),
        ("don't fragment", frame(&[], 0x0800, &v4(6, 0, 0x4000, &syn)), tcp(SYN, false, 14, 34)),
        ("first fragment", frame(&[], 0x0800, &v4(6, 0, 0x2000, &syn)), any(14)),
        ("later fragment", frame(&[], 0x0800, &v4(6, 0, 0x00b9, &syn)), any(14)),
        ("more than 64 KiB", frame(&[], 0x0800, &big), tcp(SYN, true, 14, 34)),
        ("UDP", frame(&[], 0x0800, &v4(17, 0, 0, &syn)), Packet::Other),
        ("UDP fragment", frame(&[], 0x0800, &v4(17, 0, 0x2000, &syn)), Packet::Other),
        ("ICMP", frame(&[], 0x0800, &v4(1, 0, 0, &[])), Packet::Other),
        ("ARP", frame(&[], 0x0806, &[0; 28]), Packet::Other),
        ("header length below 5", frame(&[], 0x0800, &join(&[&[0x41], &v4(6, 0, 0, &syn)[1..]])), any(14)),
        ("cut off in IP", frame(&[], 0x0800, &[0x45, 0, 0, 40]), any(14)),
        ("cut off in TCP", frame(&[], 0x0800, &v4(6, 0, 0, &syn[..12])), any(14)),
        ("cut off in Ethernet", [0; 12].to_vec(), any(NOWHERE)),
        ("priority tag", frame(&[0x8100], 0x0800, &v4(6, 0, 0, &syn)), tcp(SYN, false, 18, 38)),
        ("two tags", frame(&[0x88a8, 0x8100], 0x0800, &v4(6, 0, 0, &syn)), tcp(SYN, false, 22, 42)),
        ("three tags", frame(&[0x88a8, 0x8100, 0x8100], 0x0800, &v4(6, 0, 0, &syn)), any(NOWHERE)),
        ("tagged ARP", frame(&[0x8100], 0x0806, &[0; 28]), Packet::Other),
        ("IPv6", frame(&[], 0x86dd, &v6(6, &syn)), tcp(SYN, false, 14, 54)),
        ("IPv6 with data", frame(&[], 0x86dd, &v6(6, &segment(ACK, 0, 3))), tcp(ACK, true, 14, 54)),
        ("IPv6 UDP", frame(&[], 0x86dd, &v6(17, &syn)), Packet::Other),
        ("IPv6 no next header", frame(&[], 0x86dd, &v6(59, &[])), Packet::Other),
        (
            "IPv6 options",
            frame(&[], 0x86dd, &v6(0, &join(&[&[60, 1], &[0; 14], &[6, 0], &[0; 6], &syn]))),
            tcp(SYN, false, 14, 54 + 24),
        ),
        (
            "IPv6 authentication header",
            frame(&[], 0x86dd, &v6(51, &join(&[&[6, 4], &[0; 22], &syn]))),
            tcp(SYN, false, 14, 54 + 24),
        ),
        ("IPv6 options, then UDP", frame(&[], 0x86dd, &v6(0, &[17, 0, 0, 0, 0, 0, 0, 0])), Packet::Other),
        ("IPv6 first fragment", frame(&[], 0x86dd, &fragmented(6, 0, &syn)), any(14)),
        ("IPv6 later fragment", frame(&[], 0x86dd, &fragmented(6, 9, &syn)), any(14)),
        ("IPv6 fragment, options first", frame(&[], 0x86dd, &fragmented(60, 9, &syn)), any(14)),
        ("IPv6 fragment of UDP", frame(&[], 0x86dd, &fragmented(17, 9, &syn)), Packet::Other),
        (
            "IPv6 too many options",
            frame(&[], 0x86dd, &v6(60, &join(&[&[60, 0, 0, 0, 0, 0, 0, 0].repeat(9), &syn]))),
            any(14),
        ),
        ("IPv6 cut off in options", frame(&[], 0x86dd, &v6(60, &[6])), any(14)),
    ] {
        let packet = ethernet(&Slice(bytes));
        assert_eq!(packet, expected, "{why}");
        assert_eq!(Packet::unpack(packet.pack()), packet, "{why}");
    }
}

/// The longest way to a TCP header.
#[test]
fn every_packet_fits_in_a_word() {
    let longest = [&[60, 255][..], &[0; 2046]].concat();
    let options = longest.repeat(4).into_iter().chain([6, 255]).chain([0; 2046]).collect::<Vec<_>>();
    let tagged = frame(&[0x88a8, 0x8100], 0x86dd, &v6(60, &join(&[&options, &segment(0xff, 40, 1)])));
    let packet = ethernet(&Slice(tagged));
    assert_eq!(packet, Packet::Tcp { flags: 0xff, data: true, ip: 22, tcp: 22 + 40 + 5 * 2048 });
    assert_eq!(Packet::unpack(packet.pack()), packet);
}

#[test]
fn without_ethernet() {
    let syn = segment(SYN, 0, 0);
    for (why, bytes, expected) in [
        ("IPv4", v4(6, 0, 0, &syn), Packet::Tcp { flags: SYN, data: false, ip: 0, tcp: 20 }),
        ("IPv6", v6(6, &syn), Packet::Tcp { flags: SYN, data: false, ip: 0, tcp: 40 }),
        ("neither", [0x10; 40].to_vec(), Packet::Other),
        ("nothing", Vec::new(), Packet::Tcp { flags: 0, data: true, ip: 0, tcp: 0 }),
    ] {
        assert_eq!(ip(&Slice(bytes)), expected, "{why}");
    }
}

#[test]
fn endpoints_of_both_families() {
    let check = |bytes, ip, tcp, source: &str, destination: &str, ports| {
        let (from, to, got) = endpoints(&Slice(bytes), ip, tcp);
        assert_eq!(from.to_ip(), source.parse::<IpAddr>().unwrap());
        assert_eq!(to.to_ip(), destination.parse::<IpAddr>().unwrap());
        assert_eq!(got, ports);
    };
    let syn = segment(SYN, 0, 0);
    check(v4(6, 0, 0, &syn), 0, 20, "10.1.0.3", "10.2.0.9", [8080, 80]);
    check(v4(6, 0, 0x2000, &syn), 0, 0, "10.1.0.3", "10.2.0.9", [0, 0]);
    check(v6(6, &syn), 0, 40, "fd00::", "fe00::", [8080, 80]);
    check(Vec::new(), 0, 0, "::", "::", [0, 0]);
    check(v6(6, &syn), NOWHERE, 0, "::", "::", [0, 0]);
    let mut long = v6(6, &syn);
    long.extend([0x60].repeat(0x1_0040));
    check(long, NOWHERE, 0, "::", "::", [0, 0]);
}
