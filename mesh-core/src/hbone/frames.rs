//! Which HTTP/2 frames a peer sends, seen in the bytes as they come in (RFC 9113 4.1). Pure.
//!
//! What a frame asks of us is h2's to judge; here is only counted what h2 has no limit for: frames that carry nothing.

/// What was seen in some bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Frames that began.
    pub(super) frames: u32,
    /// Those of them that carry nothing, and that no peer has reason to send many of.
    pub(super) chatter: u32,
    /// The peer has acknowledged settings.
    pub(super) settled: bool,
}

/// Follows one direction of a connection, however its bytes are cut.
#[derive(Debug)]
pub(super) struct Frames {
    /// Bytes of the payload (or of the client's preface) that are still to come.
    skip: usize,
    /// A frame's head, and of WINDOW_UPDATE its payload too.
    head: [u8; HEAD + INCREMENT],
    have: usize,
    /// Streams that the peer has opened or answered and not reset.
    opened: u32,
}

const HEAD: usize = 9;
const INCREMENT: usize = 4;
/// "PRI * HTTP/2.0" and so on (RFC 9113 3.4), in bytes.
const PREFACE: usize = 24;
/// A window that is opened by fewer bytes than this is chatter: each such step could cost us a frame of as many bytes.
const STEP: u32 = 1024;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const WINDOW_UPDATE: u8 = 8;
/// END_STREAM of DATA, ACK of SETTINGS.
const FLAG: u8 = 1;

impl Frames {
    pub(super) fn of_server() -> Self {
        Self { skip: 0, head: [0; HEAD + INCREMENT], have: 0, opened: 0 }
    }

    pub(super) fn of_client() -> Self {
        Self { skip: PREFACE, ..Self::of_server() }
    }

    /// The next bytes that the peer sent.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> Seen {
        let mut seen = Seen::default();
        while !bytes.is_empty() {
            if self.skip > 0 {
                let (_, rest) = bytes.split_at(self.skip.min(bytes.len()));
                self.skip -= bytes.len() - rest.len();
                bytes = rest;
                continue;
            }
            let (new, rest) = bytes.split_at((self.wanted() - self.have).min(bytes.len()));
            self.head[self.have..self.have + new.len()].copy_from_slice(new);
            self.have += new.len();
            bytes = rest;
            // A complete head of WINDOW_UPDATE wants its payload.
            if self.have == self.wanted() {
                self.note(&mut seen);
                self.skip = self.length() + HEAD - self.have;
                self.have = 0;
            }
        }
        seen
    }

    fn length(&self) -> usize {
        let [a, b, c, ..] = self.head;
        u32::from_be_bytes([0, a, b, c]) as usize
    }

    fn wanted(&self) -> usize {
        let complete = self.have >= HEAD;
        if complete && self.head[3] == WINDOW_UPDATE { HEAD + INCREMENT.min(self.length()) } else { HEAD }
    }

    fn note(&mut self, seen: &mut Seen) {
        let [.., a, b, c, d] = self.head;
        let flag = self.head[4] & FLAG != 0;
        let chatter = match self.head[3] {
            DATA => self.length() == 0 && !flag,
            HEADERS => {
                self.opened = self.opened.saturating_add(1);
                false
            }
            // One for each stream.
            RST_STREAM => {
                let earned = self.opened > 0;
                self.opened = self.opened.saturating_sub(1);
                !earned
            }
            WINDOW_UPDATE => u32::from_be_bytes([a, b, c, d]) < STEP,
            SETTINGS if flag => {
                seen.settled = true;
                true
            }
            _ => true,
        };
        seen.frames += 1;
        seen.chatter += u32::from(chatter);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_http2 as http2;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        http2::frame(kind, flags, 1, payload)
    }

    fn check(frames: &[Vec<u8>], expected: (u32, u32)) {
        let bytes = frames.concat();
        for cut in [1, 2, 3, 10, bytes.len().max(1)] {
            let mut reader = Frames::of_client();
            let (mut count, mut chatter) = (0, 0);
            for piece in [&[b'x'; PREFACE], &bytes[..]].concat().chunks(cut) {
                let seen = reader.read(piece);
                (count, chatter) = (count + seen.frames, chatter + seen.chatter);
            }
            assert_eq!((count, chatter), expected, "{frames:?} in pieces of {cut}");
        }
    }

    #[test]
    fn what_carries_something_is_no_chatter() {
        check(&[], (0, 0));
        check(&[frame(0, 0, b"x"), frame(1, 4, &[0; 300]), frame(0, 1, b""), frame(3, 0, &[0; 4])], (4, 0));
        check(&[frame(8, 0, &1024u32.to_be_bytes()), frame(0, 0, &[9; 5000])], (2, 0));
    }

    #[test]
    fn what_carries_nothing_is() {
        check(&[frame(0, 0, b""), frame(0, 1, b"")], (2, 1));
        check(&[frame(8, 0, &1u32.to_be_bytes()), frame(8, 0, &1023u32.to_be_bytes())], (2, 2));
        check(&[frame(8, 0, &[]), frame(8, 0, &[0; 9])], (2, 2));
        for kind in [2, 4, 5, 6, 7, 9, 200] {
            check(&[frame(kind, 0, &[0; 8]), frame(0, 0, b"x"), frame(kind, 1, &[])], (3, 2));
        }
    }

    #[test]
    fn a_reset_needs_a_stream() {
        let [open, reset] = [frame(1, 4, b"h"), frame(3, 0, &[0; 4])];
        check(&[open.clone(), reset.clone(), reset.clone()], (3, 1));
        check(&[reset.clone(), open.clone(), open, reset.clone(), reset.clone(), reset], (6, 2));
    }

    #[test]
    fn acknowledged_settings_are_noticed() {
        let mut frames = Frames::of_server();
        assert!(!frames.read(&frame(4, 0, &[0; 6])).settled);
        assert!(frames.read(&frame(4, 1, &[])).settled);
    }
}
