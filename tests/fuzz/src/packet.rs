//! What the kernel's programs make of a packet that a pod sends, or that comes for it.

use mesh_ebpf_abi::packet::{self, Bytes, NOWHERE, Packet};

struct Slice<'a>(&'a [u8]);

impl Bytes for Slice<'_> {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = usize::try_from(offset).ok()?;
        self.0.get(start..start.checked_add(N)?)?.try_into().ok()
    }
}

/// What is TCP to a receiver is TCP here, and what is kept of it in a word is all of it.
pub fn run(data: &[u8]) {
    let bytes = Slice(data);
    for (link, packet) in [(0, packet::ip(&bytes)), (14, packet::ethernet(&bytes))] {
        if let Packet::Tcp { ip, tcp, .. } = packet {
            if ip <= NOWHERE && tcp <= NOWHERE {
                assert_eq!(Packet::unpack(packet.pack()), packet);
            }
            packet::endpoints(&bytes, ip, tcp);
        }
        let plain = data.get(link..).is_some_and(is_plain_tcp);
        let untagged =
            link == 0 || data.get(12..14).is_some_and(|kind| kind == [0x08, 0x00] || kind == [0x86, 0xdd]);
        let version = link == 0
            || data.get(12).zip(data.get(14)).is_some_and(|(kind, ip)| (*kind == 0x08) == (ip >> 4 == 4));
        if plain && untagged && version {
            assert!(matches!(packet, Packet::Tcp { .. }), "TCP was not seen: {data:02x?}");
        }
    }
}

/// An IP header without options that says TCP, the simplest reading of it there is.
fn is_plain_tcp(ip: &[u8]) -> bool {
    match ip.first().map(|first| first >> 4) {
        Some(4) => ip.len() >= 20 && ip[9] == 6,
        Some(6) => ip.len() >= 40 && ip[6] == 6,
        _ => false,
    }
}

/// SYNs in both families, with and without Ethernet and extension headers.
pub fn seeds() -> Vec<Vec<u8>> {
    let tcp = [0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0];
    let v4 = [&[0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 244, 1, 2, 10, 244, 2, 3][..], &tcp].concat();
    let v6 = |next: u8, more: &[u8]| {
        let mut packet = vec![0x60, 0, 0, 0, 0, 20 + more.len() as u8, next, 64];
        packet.extend([0xfd; 32]);
        [&packet, more, &tcp[..]].concat()
    };
    let hop_by_hop = [6, 0, 1, 4, 0, 0, 0, 0];
    let fragment = [6, 0, 0, 1, 0, 0, 0, 1];
    let packets = [v4, v6(6, &[]), v6(0, &hop_by_hop), v6(44, &fragment)];
    let framed = packets.iter().map(|packet| {
        let kind: [u8; 2] = if packet[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] };
        [&[2; 12][..], &[0x81, 0, 0, 0], &kind, packet].concat()
    });
    packets.iter().cloned().chain(framed.collect::<Vec<_>>()).collect()
}
