//! sockops on the kubelet's cgroup: records each connection that it opens to a pod, before the SYN leaves.
//!
//! The record, four numbers that conntrack gives to one connection at a time, is what sk_lookup lets pass by the
//! proxy, and what the guard lets the app answer. It goes when the kubelet's socket closes. A miss is a connection
//! that meets the proxy: what is not recorded, or was forgotten in a full map, is never let by.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    __sk_buff, BPF_ANY, BPF_NOEXIST, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock, bpf_sock_ops,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_sk_fullsock};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use mesh_ebpf_abi::packet::{self, Packet};
use mesh_ebpf_abi::probe::{Answer, Answerer, NO_PROBE, ProbePort, Tuple, answer};
use mesh_ebpf_abi::{Address, SOCKET_BYSTANDER, SOCKET_PROBED};

use crate::maps::{PROBE, PROBEPORT, SKPROXY, slot_of};
use crate::skb::Skb;

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
const SOCK_STREAM: u32 = 1;
const TCP_CLOSE: u32 = 7;
const TCP_NEW_SYN_RECV: u32 = 12;
/// An answer has no IP options or extension headers: to follow each of them to here is too much for the verifier.
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;
/// sockops programs have nothing to say here, only to see.
const SEEN: u32 = 1;

/// Cookie of the node's own network namespace, written by the loader: what the kubelet's cgroup does inside pods, such
/// as forwarding ports, is no probe.
#[unsafe(no_mangle)]
static NODE_NETNS: u64 = u64::MAX;

/// Reads one field of a context: by itself and always, since LLVM merges reads in branches into one at a variable
/// offset, which the verifier refuses.
macro_rules! field {
    ($ptr:expr, $($path:tt)+) => {
        // SAFETY: a field of a context or of a socket; the verifier checks the access.
        unsafe { core::ptr::read_volatile(&raw const (*$ptr).$($path)+) }
    };
}

/// On the kubelet's cgroup.
#[sock_ops]
fn probes(ctx: SockOpsContext) -> u32 {
    match field!(ctx.ops, op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => record(&ctx),
        BPF_SOCK_OPS_STATE_CB if field!(ctx.ops, __bindgen_anon_1.args[1]) == TCP_CLOSE => {
            // It may be gone: the map forgets when it is full.
            let _ = PROBE.remove(ends(ctx.ops));
        }
        _ => {}
    }
    SEEN
}

/// On the pods' cgroup, where that is below the kubelet's: programs of a cgroup run before those of its parents.
#[sock_ops]
fn bystanders(ctx: SockOpsContext) -> u32 {
    if field!(ctx.ops, op) == BPF_SOCK_OPS_TCP_CONNECT_CB && on_the_node(&ctx) {
        let socket = field!(ctx.ops, __bindgen_anon_2.sk);
        // SAFETY: checked for null, a full socket.
        let flagged = !socket.is_null() && unsafe { SKPROXY.flag(socket.cast(), SOCKET_BYSTANDER) };
        let ends = ends(ctx.ops);
        if !flagged && slot_of(&ends.destination).is_some() {
            // In the place where it would be recorded, and nothing is written over that: the slot of no pod, by which
            // it meets no app that the guard would let answer.
            let _ = PROBE.insert(ends, NO_PROBE, BPF_ANY.into());
        }
    }
    SEEN
}

#[inline(always)]
fn record(ctx: &SockOpsContext) {
    let ends = ends(ctx.ops);
    let Some(slot) = slot_of(&ends.destination) else { return };
    let socket = field!(ctx.ops, __bindgen_anon_2.sk);
    // SAFETY: checked for null; a socket that connects is a full one.
    let bystander = socket.is_null() || unsafe { SKPROXY.get(socket.cast()) } == Some(SOCKET_BYSTANDER);
    if bystander || !on_the_node(ctx) {
        return;
    }
    // Without the callback nobody would remove the record.
    let flags = field!(ctx.ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    if ctx.set_cb_flags(flags as i32).is_ok() {
        // A full map forgets its oldest; without a record the connection meets the proxy.
        let _ = PROBE.insert(ends, slot, BPF_NOEXIST.into());
    }
}

#[inline(always)]
fn on_the_node(ctx: &SockOpsContext) -> bool {
    // SAFETY: the helper takes the hook's context; the constant is a plain word, volatile because the loader changes
    // it behind the compiler's back.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) == core::ptr::read_volatile(&raw const NODE_NETNS) }
}

/// The connection of a socket that opens one.
#[inline(always)]
fn ends(ops: *const bpf_sock_ops) -> Tuple {
    let v4 = field!(ops, family) == AF_INET;
    let (local4, remote4) = (field!(ops, local_ip4), field!(ops, remote_ip4));
    let local6 = [
        field!(ops, local_ip6[0]),
        field!(ops, local_ip6[1]),
        field!(ops, local_ip6[2]),
        field!(ops, local_ip6[3]),
    ];
    let remote6 = [
        field!(ops, remote_ip6[0]),
        field!(ops, remote_ip6[1]),
        field!(ops, remote_ip6[2]),
        field!(ops, remote_ip6[3]),
    ];
    Tuple {
        source: select(v4, local4, local6),
        destination: select(v4, remote4, remote6),
        source_port: field!(ops, local_port) as u16,
        destination_port: u32::from_be(field!(ops, remote_port)) as u16,
    }
}

/// For sk_lookup: whether the kubelet opened this connection to the pod in `slot`, and may.
#[inline(always)]
pub(crate) fn probed(ends: &Tuple, slot: u32) -> bool {
    // SAFETY: values of one word.
    let (named, recorded) =
        unsafe { (PROBEPORT.get(ProbePort::new(slot, ends.destination_port)), PROBE.get(ends)) };
    named.is_some() && recorded == Some(&slot)
}

/// For the guard: whether a packed [`Packet`] that is not the proxy's answers the kubelet, by what `recorded` says of it.
#[inline(always)]
pub(crate) fn answers(skb: Skb, packed: u64, recorded: bool) -> bool {
    let Packet::Tcp { flags, data, ip, tcp } = Packet::unpack(packed) else { return false };
    let frame = answered(skb, ip, tcp);
    if frame.destination_port == 0 || !matches!(tcp.wrapping_sub(ip), IPV4_HEADER | IPV6_HEADER) {
        return false;
    }
    let socket: *mut bpf_sock = field!(skb.skb, __bindgen_anon_2.sk);
    if socket.is_null() {
        return false;
    }
    // SAFETY: the helper takes any socket and returns null for what is not a full one.
    let full: *mut bpf_sock = unsafe { bpf_sk_fullsock(socket) };
    let answerer = if !full.is_null() {
        let tcp = (field!(full, type_) ^ SOCK_STREAM) | (field!(full, protocol) ^ IPPROTO_TCP) == 0;
        // SAFETY: a full socket.
        let flag = unsafe { SKPROXY.get(full.cast()) };
        Answerer::Socket { tcp, accepted: accepted(full, &frame), flag }
    } else if field!(socket, state) == TCP_NEW_SYN_RECV {
        Answerer::Handshake
    } else {
        return false;
    };
    match answer(flags, data, &answerer, recorded) {
        Answer::No => false,
        Answer::Yes => true,
        Answer::First => {
            // SAFETY: a full socket where the answer is the first.
            if !full.is_null() {
                unsafe { SKPROXY.flag(full.cast(), SOCKET_PROBED) };
            }
            true
        }
    }
}

/// Whether the connection that a packed [`Packet`] answers is recorded as the kubelet's: 1, or 0. By itself,
/// see `skb`, and not called by `answers`: the stacks of all that call each other are together 512 bytes at most.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn recorded(skb: *mut __sk_buff, start: u32, packed: u64) -> u32 {
    let Packet::Tcp { ip, tcp, .. } = Packet::unpack(packed) else { return 0 };
    // SAFETY: a value of one word.
    let found = unsafe { PROBE.get(answered(Skb { skb, start }, ip, tcp)) };
    u32::from(found.is_some_and(|slot| *slot != NO_PROBE))
}

/// The connection that a packet answers: its receiver opened it.
#[inline(always)]
fn answered(skb: Skb, ip: u32, tcp: u32) -> Tuple {
    let (destination, source, [destination_port, source_port]) = packet::endpoints(&skb, ip, tcp);
    Tuple { source, destination, source_port, destination_port }
}

/// Whether a socket accepted this connection: the peer is the source. Without branches, each of which the verifier would
/// walk both ways.
#[inline(always)]
fn accepted(socket: *const bpf_sock, frame: &Tuple) -> bool {
    let (source, destination) = (frame.source.words(), frame.destination.words());
    let ports = (u16::from_be(field!(socket, dst_port)) ^ frame.source_port) as u32
        | (field!(socket, src_port) ^ frame.destination_port as u32);
    let four = (field!(socket, dst_ip4) ^ source[3]) | (field!(socket, src_ip4) ^ destination[3]);
    let six = (field!(socket, dst_ip6[0]) ^ source[0])
        | (field!(socket, dst_ip6[1]) ^ source[1])
        | (field!(socket, dst_ip6[2]) ^ source[2])
        | (field!(socket, dst_ip6[3]) ^ source[3])
        | (field!(socket, src_ip6[0]) ^ destination[0])
        | (field!(socket, src_ip6[1]) ^ destination[1])
        | (field!(socket, src_ip6[2]) ^ destination[2])
        | (field!(socket, src_ip6[3]) ^ destination[3]);
    let addresses = if frame.source.is_v4() { four } else { six };
    ports | addresses == 0
}

#[inline(always)]
fn select(v4: bool, four: u32, six: [u32; 4]) -> Address {
    if v4 { Address::from_v4_word(four) } else { Address::from_v6_words(six) }
}
