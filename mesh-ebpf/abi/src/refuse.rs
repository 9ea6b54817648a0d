//! Whether anybody listens where a new connection to a pod goes.
//!
//! sk_lookup chooses before the kernel looks for a listener, and cannot look itself. So a program at the pod's ingress
//! looks first, for each SYN, and leaves the answer for sk_lookup, which the same packet comes to next, on the same CPU.
//! **Invariant:** there is no count of listeners to go wrong; an answer that is lost means "somebody", and the proxy
//! finds out.

use core::mem::{align_of, offset_of, size_of};

use crate::packet::{ACK, Packet, RST, SYN};
use crate::probe::Tuple;

/// Places in `ASKED` on each CPU: SYNs that come in one batch are looked at before the first is looked up.
pub const PLACES: u32 = 64;

/// Value of `ASKED`: what is known of the last connection that fell on this place.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The connection.
    pub ends: Tuple,
    /// One of the constants below. None of them is a verdict of sk_lookup: LLVM would return the answer in the verdict's
    /// place where they are equal, and the verifier refuses what might be any number.
    pub answer: u32,
}

const _: () = {
    assert!(size_of::<Asked>() == 40 && align_of::<Asked>() == 4);
    assert!(offset_of!(Asked, answer) == 36);
    assert!(PLACES.is_power_of_two());
};

/// Not in `Asked`: nothing is known.
pub const UNKNOWN: u32 = 0;
/// In `Asked`: the kernel is being asked; its own look-up is to go on without the proxy.
pub const ASKING: u32 = 2;
/// In `Asked`: somebody listens, or it cannot be told.
pub const SOMEBODY: u32 = 3;
/// In `Asked`: nobody does.
pub const NOBODY: u32 = 4;

impl Asked {
    /// The place of a connection.
    #[inline(always)]
    pub const fn place(ends: &Tuple) -> u32 {
        ends.source_port as u32 % PLACES
    }

    /// What it says of this connection.
    #[inline(always)]
    pub fn of(&self, ends: &Tuple) -> u32 {
        if self.ends == *ends { self.answer } else { UNKNOWN }
    }
}

/// Whether a packet opens a connection.
#[inline(always)]
pub fn opens(packet: &Packet) -> bool {
    match packet {
        Packet::Tcp { flags, tcp, .. } => *tcp != 0 && flags & (SYN | ACK | RST) == SYN,
        Packet::Other => false,
    }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;
    use crate::Address;

    fn ends(source_port: u16) -> Tuple {
        let address = |text: &str| Address::from(text.parse::<IpAddr>().unwrap());
        Tuple {
            source: address("10.2.0.9"),
            destination: address("10.1.0.3"),
            source_port,
            destination_port: 80,
        }
    }

    #[test]
    fn an_answer_is_about_one_connection() {
        let asked = Asked { ends: ends(40_000), answer: NOBODY };
        assert_eq!(asked.of(&ends(40_000)), NOBODY);
        // One that falls on the same place.
        let other = ends(40_000 + PLACES as u16);
        assert_eq!(Asked::place(&other), Asked::place(&asked.ends));
        assert_eq!(asked.of(&other), UNKNOWN);
        assert!(Asked::place(&ends(u16::MAX)) < PLACES);
    }

    #[test]
    fn only_a_syn_opens() {
        let packet = |flags, tcp| Packet::Tcp { flags, data: false, ip: 14, tcp };
        for (flags, tcp, expected) in [
            (SYN, 34, true),
            (SYN | 0xc0, 34, true), // with ECN
            (SYN | ACK, 34, false),
            (SYN | RST, 34, false),
            (ACK, 34, false),
            (SYN, 0, false), // unreadable
        ] {
            assert_eq!(opens(&packet(flags, tcp)), expected, "{flags:#x} at {tcp}");
        }
        assert!(!opens(&Packet::Other));
    }
}
