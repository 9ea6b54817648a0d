//! cgroup/connect4 and connect6: runs in the caller's process before a connection gets its route.
//!
//! A captured socket is bound to lo, so it meets the in-pod routes to the proxy and can never leave by another
//! interface, whatever fails later. Its addresses stay as they are. One that had a connection before enrolment is not
//! older than it from now on.
//! Where others have programs on the same call, as kube-proxy's replacements do, these two run first, and two more run
//! last, which put the destination back that was dialled: the proxy is to hear of the service, not of the endpoint that
//! somebody else chose.
//! A miss in NSCFG is a pod that is not enrolled: the call is left alone. A socket that cannot be bound is refused.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval, bpf_setsockopt,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf_abi::canary::is_canary;
use mesh_ebpf_abi::capture::{Call, Connect, decide};
use mesh_ebpf_abi::event::Counter;
use mesh_ebpf_abi::{Address, Dialled, KEEP_DESTINATION, SOCKET_OLDER, SOCKET_PROBED, SOCKET_TUNNEL};

use crate::maps::{DIALLED, NSCFG, SKPROXY, count, slot_of};

const ALLOW: i32 = 1;
const REFUSE: i32 = 0; // connect() gives EPERM, or what bpf_set_retval says
const ENETUNREACH: i32 = 101;

/// The IPv4 hook.
#[cgroup_sock_addr(connect4)]
fn capture4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the verifier checks the context's fields; volatile keeps LLVM from merging reads.
    let word = unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_ip4) };
    capture(&ctx, Address::from_v4_word(word), [word, 0, 0, 0])
}

/// The IPv6 hook: v4-mapped destinations are IPv4 ones.
#[cgroup_sock_addr(connect6)]
fn capture6(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: as above; each word is read by itself.
    let word =
        |i: usize| unsafe { core::ptr::read_volatile((&raw const (*addr).user_ip6).cast::<u32>().add(i)) };
    let words = [word(0), word(1), word(2), word(3)];
    capture(&ctx, Address::from_v6_words(words), words)
}

/// The IPv4 hook that runs last.
#[cgroup_sock_addr(connect4)]
fn restore4(ctx: SockAddrContext) -> i32 {
    if let Some(dialled) = dialled(&ctx) {
        let addr = ctx.sock_addr;
        // SAFETY: context fields that the hook may write, each by itself.
        unsafe {
            core::ptr::write_volatile(&raw mut (*addr).user_ip4, dialled.address[0]);
            core::ptr::write_volatile(&raw mut (*addr).user_port, dialled.port);
        }
    }
    ALLOW
}

/// The IPv6 hook that runs last.
#[cgroup_sock_addr(connect6)]
fn restore6(ctx: SockAddrContext) -> i32 {
    if let Some(dialled) = dialled(&ctx) {
        let (addr, [a, b, c, d]) = (ctx.sock_addr, dialled.address);
        // SAFETY: as above.
        let set = |i: usize, word: u32| unsafe {
            core::ptr::write_volatile((&raw mut (*addr).user_ip6).cast::<u32>().add(i), word);
        };
        set(0, a);
        set(1, b);
        set(2, c);
        set(3, d);
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*addr).user_port, dialled.port) };
    }
    ALLOW
}

/// Notes where a call wants to go. Without room the call goes on: then another's choice is dialled, by the proxy all the
/// same.
#[inline(always)]
fn keep(ctx: &SockAddrContext, address: [u32; 4]) {
    // SAFETY: a context field, and a helper that takes the context.
    let (port, cookie) = unsafe {
        let port = core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_port);
        (port, bpf_get_socket_cookie(ctx.as_ptr()))
    };
    let _ = DIALLED.insert(cookie, Dialled { address, port }, 0);
}

/// What was noted of a call, once.
#[inline(always)]
fn dialled(ctx: &SockAddrContext) -> Option<Dialled> {
    // SAFETY: the helper takes the hook's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: one call at a time connects a socket.
    let dialled = unsafe { DIALLED.get(cookie) }.copied()?;
    let _ = DIALLED.remove(cookie);
    Some(dialled)
}

#[inline(always)]
fn capture(ctx: &SockAddrContext, destination: Address, words: [u32; 4]) -> i32 {
    match try_capture(ctx, destination, words) {
        Ok(Call::Leave) => ALLOW,
        Ok(Call::Capture) => {
            if !is_canary(&destination) {
                count(Counter::Captured);
            }
            ALLOW
        }
        Ok(Call::Unreachable) => {
            count(Counter::Unreachable);
            // SAFETY: takes an error number; should it fail, the call is refused with another.
            unsafe { bpf_set_retval(-ENETUNREACH) };
            REFUSE
        }
        Err(_) => {
            count(Counter::CaptureFailed);
            REFUSE
        }
    }
}

/// What was done with the call, as far as it is not refused.
#[inline(always)]
fn try_capture(ctx: &SockAddrContext, destination: Address, words: [u32; 4]) -> Result<Call, i64> {
    // SAFETY: the helper takes the hook's context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: the value is two words; a torn read would be of the same pod.
    let Some(netns) = (unsafe { NSCFG.get(&cookie) }) else { return Ok(Call::Leave) };
    // SAFETY: context fields, as above.
    let (protocol, socket) = unsafe {
        let addr = ctx.sock_addr;
        (
            core::ptr::read_volatile(&raw const (*addr).protocol),
            core::ptr::read_volatile(&raw const (*addr).__bindgen_anon_1.sk),
        )
    };
    // SAFETY: checked here for null, a full socket in this hook.
    let flag = if socket.is_null() { None } else { unsafe { SKPROXY.get(socket.cast()) } };
    if matches!(flag, Some(SOCKET_OLDER | SOCKET_PROBED | SOCKET_TUNNEL)) {
        // SAFETY: the socket had a flag, so it is one.
        unsafe { SKPROXY.forget(socket.cast()) };
    }
    let (slot, families, destination_slot) = (netns.slot, netns.families, slot_of(&destination));
    let call = decide(&Connect { protocol, destination, flag, slot, families, destination_slot });
    if call == Call::Capture {
        crate::debug!(ctx, "captured a connection of pod {}", slot);
        bind_to_lo(ctx)?;
        if families & KEEP_DESTINATION != 0 {
            keep(ctx, words);
        }
    }
    Ok(call)
}

#[inline(always)]
fn bind_to_lo(ctx: &SockAddrContext) -> Result<(), i64> {
    const SOL_SOCKET: i32 = 1;
    const SO_BINDTODEVICE: i32 = 25;
    let mut name = *b"lo\0\0";
    // SAFETY: the helper copies `name`.
    let result = unsafe {
        bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTODEVICE, (&raw mut name).cast(), name.len() as i32)
    };
    if result == 0 { Ok(()) } else { Err(result) }
}
