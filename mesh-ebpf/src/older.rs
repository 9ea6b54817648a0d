//! TCP socket iterator: flags the connections that a pod had before it was enrolled, so that the guard lets them be.
//!
//! The flag is on the socket, not in a table of addresses: it dies with the connection, and no later connection can
//! inherit it by using the same ports. Listeners are left out (their accepted sockets would inherit the flag).
//! Handshakes have no storage; one byte of output for each tells the agent to look again.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{bpf_seq_write, bpf_skc_to_tcp_sock};
use mesh_ebpf_abi::event::Counter;

use crate::maps::{SKPROXY, count};

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

/// The iterator, run by the agent inside the pod's network namespace.
#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
extern "C" fn older(ctx: *const TcpIterator) -> i32 {
    // SAFETY: the context of a TCP iterator; the verifier knows the pointers' types and checks the loads.
    let (seq, socket) = unsafe { ((*(*ctx).meta).seq, (*ctx).socket) };
    if !socket.is_null() {
        // SAFETY: not null, a socket of any kind.
        let (state, device) = unsafe { ((*socket).state, (*socket).bound_device) };
        match state {
            TCP_LISTEN => {}
            TCP_NEW_SYN_RECV => pending(seq),
            // Captured already: it has no business on another interface.
            _ if device == LOOPBACK_IFINDEX => {}
            _ => flag(socket),
        }
    }
    0
}

#[inline(always)]
fn pending(seq: *mut c_void) {
    let mut byte = b'.';
    count(Counter::OlderPending);
    // SAFETY: the iterator's own output, one byte.
    unsafe { bpf_seq_write(seq.cast(), (&raw mut byte).cast(), 1) };
}

#[inline(always)]
fn flag(socket: *mut SockCommon) {
    // SAFETY: null for what is not a full TCP socket, TIME_WAIT for example.
    let full = unsafe { bpf_skc_to_tcp_sock(socket.cast()) };
    if !full.is_null() {
        count(Counter::OlderFlagged);
        // SAFETY: not null, a BTF socket pointer.
        unsafe { SKPROXY.set_older(full.cast()) };
    }
}
