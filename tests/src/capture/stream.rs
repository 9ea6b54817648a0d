//! TCP streams put together again, one per direction.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::packet::{Packet, Protocol};

/// One direction between two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

impl Flow {
    #[must_use]
    pub fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source }
    }
}

impl std::fmt::Display for Flow {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} -> {}", self.source, self.destination)
    }
}

/// The bytes of each flow in order, retransmissions dropped. A gap (the capture began later) is left out.
pub(super) fn reassemble<'a>(packets: impl Iterator<Item = Packet<'a>>) -> BTreeMap<Flow, Vec<u8>> {
    let mut flows: BTreeMap<Flow, Vec<Packet<'a>>> = BTreeMap::new();
    for packet in packets.filter(|packet| packet.protocol == Protocol::Tcp && !packet.payload.is_empty()) {
        flows.entry(packet.flow()).or_default().push(packet);
    }
    flows.into_iter().map(|(flow, segments)| (flow, in_order(&segments))).collect()
}

fn in_order(segments: &[Packet<'_>]) -> Vec<u8> {
    let Some(first) = segments.first() else { return Vec::new() };
    // Distance from the first segment seen; sequence numbers wrap.
    let mut placed: Vec<(i32, &[u8])> = segments
        .iter()
        .map(|segment| (segment.sequence.wrapping_sub(first.sequence).cast_signed(), segment.payload))
        .collect();
    placed.sort_by_key(|(at, _)| *at);
    let (mut bytes, mut end) = (Vec::new(), i64::MIN);
    for (at, payload) in placed {
        let at = i64::from(at);
        let seen = usize::try_from(end.saturating_sub(at).max(0)).unwrap_or(0);
        bytes.extend(payload.get(seen..).unwrap_or_default());
        end = end.max(at + i64::try_from(payload.len()).unwrap_or(0));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::packet::tests::frame;
    use super::*;

    #[test]
    fn segments_in_any_order_and_twice() {
        let wraps = u32::MAX - 1;
        let frames = [
            frame(wraps, b"abc"),
            frame(wraps.wrapping_add(6), b"gh"),
            frame(wraps.wrapping_add(3), b"def"),
            frame(wraps.wrapping_add(2), b"cde"),
        ];
        let streams = reassemble(frames.iter().filter_map(|frame| Packet::parse(frame)));
        assert_eq!(streams.values().next().map(Vec::as_slice), Some(b"abcdefgh".as_slice()));
    }
}
