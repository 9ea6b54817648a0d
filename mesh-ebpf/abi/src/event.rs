//! What the programs report: counters, and one event for each drop.

use core::mem::{align_of, offset_of, size_of};

use crate::Address;

/// Index in `COUNTS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// connect() calls bound to lo.
    Captured = 0,
    /// connect() calls refused because the socket could not be bound to lo.
    CaptureFailed = 1,
    /// New connections handed to a listener of the proxy.
    Steered = 2,
    /// New connections dropped: the pod has no such listener, or it is gone.
    SteerNoListener = 3,
    /// New connections dropped: neither end is an address of the pod.
    SteerForeign = 4,
    /// Packets of sockets older than enrolment that passed.
    GuardOlder = 5,
    /// Packets dropped: of a socket that is not the proxy's.
    GuardApp = 6,
    /// Packets dropped: of no socket, for example forwarded.
    GuardNoSocket = 7,
    /// SYN-ACKs of a listener that is not the proxy's, dropped.
    GuardAppListener = 8,
    /// Data of a closed connection, dropped.
    GuardTimeWait = 9,
    /// Sockets flagged as older than enrolment.
    OlderFlagged = 10,
    /// Handshakes that were under way at enrolment.
    OlderPending = 11,
    /// connect() calls refused: the pod has no address of the destination's family.
    Unreachable = 12,
    /// Packets between link-local addresses, which pass.
    GuardLinkLocal = 13,
    /// New connections of the kubelet that passed to the app.
    Probed = 14,
    /// New connections refused: nobody listens where they go.
    Refused = 15,
}

impl Counter {
    /// All of them, each at its index.
    pub const ALL: [Self; 16] = [
        Self::Captured,
        Self::CaptureFailed,
        Self::Steered,
        Self::SteerNoListener,
        Self::SteerForeign,
        Self::GuardOlder,
        Self::GuardApp,
        Self::GuardNoSocket,
        Self::GuardAppListener,
        Self::GuardTimeWait,
        Self::OlderFlagged,
        Self::OlderPending,
        Self::Unreachable,
        Self::GuardLinkLocal,
        Self::Probed,
        Self::Refused,
    ];

    /// Name for a metric's label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::CaptureFailed => "capture_failed",
            Self::Steered => "steered",
            Self::SteerNoListener => "no_listener",
            Self::SteerForeign => "foreign_address",
            Self::GuardOlder => "older",
            Self::GuardApp => "not_proxied",
            Self::GuardNoSocket => "no_socket",
            Self::GuardAppListener => "not_proxied_listener",
            Self::GuardTimeWait => "time_wait",
            Self::OlderFlagged => "older_flagged",
            Self::OlderPending => "older_pending",
            Self::Unreachable => "unreachable_family",
            Self::GuardLinkLocal => "link_local",
            Self::Probed => "probed",
            Self::Refused => "refused",
        }
    }
}

/// One dropped packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropEvent {
    /// Source of the packet.
    pub source: Address,
    /// Destination of the packet.
    pub destination: Address,
    /// Source port, host byte order.
    pub source_port: u16,
    /// Destination port, host byte order.
    pub destination_port: u16,
    /// The [`Counter`] it was counted in.
    pub reason: u32,
    /// Interface the packet left by (guard) or came in on (steer).
    pub ifindex: u32,
    /// Slot of the pod; `u32::MAX` where the program does not know it.
    pub slot: u32,
}

const _: () = {
    assert!(size_of::<DropEvent>() == 48 && align_of::<DropEvent>() == 4);
    assert!(offset_of!(DropEvent, destination) == 16);
    assert!(offset_of!(DropEvent, source_port) == 32);
    assert!(offset_of!(DropEvent, reason) == 36);
    assert!(offset_of!(DropEvent, slot) == 44);
};

#[cfg(test)]
mod tests {
    use super::Counter;

    #[test]
    fn all_is_in_order() {
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index, "{}", counter.name());
        }
    }
}
