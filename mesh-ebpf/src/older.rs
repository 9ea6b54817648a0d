//! TCP socket iterators: flag the connections that a pod had before it was enrolled, so that the guard lets them be.
//!
//! The flag is on the socket, not in a table of addresses: it dies with the connection, and no later connection can
//! inherit it by using the same ports. Listeners are left out (their accepted sockets would inherit the flag).
//! Handshakes of accepted connections have no storage. `older` notes them, and `grown`, which the agent runs again and
//! again for a while, flags what has come of those that were noted; one byte of output for each that is still under way
//! tells the agent to look again. Of a handshake that is not noted nothing is flagged.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_seq_write, bpf_skc_to_tcp_sock};
use mesh_ebpf_abi::event::Counter;
use mesh_ebpf_abi::{HBONE_PORT, Handshake, SOCKET_OLDER, SOCKET_TUNNEL};

use crate::maps::{HANDSHAKES, SKPROXY, count};

/// `struct bpf_iter__tcp`.
#[repr(C)]
struct TcpIterator {
    meta: *const IteratorMeta,
    socket: *mut SockCommon,
}

/// `struct bpf_iter_meta`.
#[repr(C)]
struct IteratorMeta {
    seq: *mut c_void,
}

/// The beginning of `struct sock_common`, which every kind of socket shares and which has not moved since Linux 3.x.
#[repr(C)]
struct SockCommon {
    addresses: u64,
    hash: u32,
    ports: u32,
    family: u16,
    state: u8,
    reuse: u8,
    bound_device: i32,
}

const TCP_LISTEN: u8 = 10;
const TCP_NEW_SYN_RECV: u8 = 12;
const LOOPBACK_IFINDEX: i32 = 1;

/// How long a noted handshake may take. The agent looks no longer; longer than TCP's second try (RFC 6298: 3 s).
const PATIENCE_NS: u64 = 10_000_000_000;

/// Run by the agent inside the pod's network namespace once, when new connections meet the proxy already.
#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
extern "C" fn older(ctx: *const TcpIterator) -> i32 {
    let Some(seen) = look(ctx) else { return 0 };
    first(&seen, SOCKET_OLDER)
}

/// In the place of `older` for a pod that another version of this program captures: there nothing but the proxy gets
/// connections to HBONE's port, and policy was asked about them. Of a handshake for one the connection inherits the flag
/// of the proxy's listener. An app's own sockets on that port from before are taken for tunnels too, until they end.
#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
extern "C" fn inherit(ctx: *const TcpIterator) -> i32 {
    let Some(seen) = look(ctx) else { return 0 };
    // The other end's port comes first, in network order.
    let local = (seen.handshake.ports >> 16) as u16;
    first(&seen, if local == HBONE_PORT { SOCKET_TUNNEL } else { SOCKET_OLDER })
}

/// Flags a connection, notes a handshake.
#[inline(always)]
fn first(seen: &Seen, value: u32) -> i32 {
    if seen.state != TCP_NEW_SYN_RECV {
        flag(seen, value);
        return 0;
    }
    count(Counter::OlderPending);
    // SAFETY: takes nothing.
    let deadline = unsafe { bpf_ktime_get_ns() } + PATIENCE_NS;
    if HANDSHAKES.insert(seen.handshake, deadline, 0).is_ok() {
        look_again(seen.seq);
    }
    0
}

/// Run by the agent after `older`, until it writes nothing.
#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
extern "C" fn grown(ctx: *const TcpIterator) -> i32 {
    let Some(seen) = look(ctx) else { return 0 };
    // SAFETY: a word, written once.
    let Some(deadline) = (unsafe { HANDSHAKES.get(seen.handshake) }) else { return 0 };
    // SAFETY: takes nothing.
    let late = unsafe { bpf_ktime_get_ns() } > *deadline;
    if seen.state == TCP_NEW_SYN_RECV && !late {
        look_again(seen.seq);
        return 0;
    }
    if !late {
        flag(&seen, SOCKET_OLDER);
    }
    // Used up: a later connection may have the same ports. Gone already is fine.
    let _ = HANDSHAKES.remove(seen.handshake);
    0
}

/// A connection that may be older than enrolment, or a handshake.
struct Seen {
    seq: *mut c_void,
    socket: *mut SockCommon,
    state: u8,
    handshake: Handshake,
}

/// None for the iterator's end, for listeners, and for what is bound to lo: captured already, or the proxy's.
#[inline(always)]
fn look(ctx: *const TcpIterator) -> Option<Seen> {
    // SAFETY: the context of a TCP iterator; the verifier knows the pointers' types and checks the loads.
    let (seq, socket) = unsafe { ((*(*ctx).meta).seq, (*ctx).socket) };
    if socket.is_null() {
        return None;
    }
    // SAFETY: not null, a socket of any kind.
    let (state, device, hash, ports) =
        unsafe { ((*socket).state, (*socket).bound_device, (*socket).hash, (*socket).ports) };
    if state == TCP_LISTEN || device == LOOPBACK_IFINDEX {
        return None;
    }
    Some(Seen { seq, socket, state, handshake: Handshake { hash, ports } })
}

#[inline(always)]
fn look_again(seq: *mut c_void) {
    let mut byte = b'.';
    // SAFETY: the iterator's own output, one byte.
    unsafe { bpf_seq_write(seq.cast(), (&raw mut byte).cast(), 1) };
}

#[inline(always)]
fn flag(seen: &Seen, value: u32) {
    // SAFETY: null for what is not a full TCP socket, TIME_WAIT for example.
    let full = unsafe { bpf_skc_to_tcp_sock(seen.socket.cast()) };
    if !full.is_null() {
        count(Counter::OlderFlagged);
        // SAFETY: not null, a BTF socket pointer.
        unsafe { SKPROXY.flag(full.cast(), value) };
    }
}
