//! Egress (tcx, or cls_bpf at clsact) of every interface of an enrolled pod but lo, and once more where it reaches the
//! node, at the other end of the pod's link: the last word on what leaves.
//!
//! TCP passes only from a flagged socket (see `mesh-ebpf-abi`'s guard) and from the app's end of a probe (`probe`), so
//! raw sockets, sockets that missed the connect hook and forwarded packets cannot leak. What cannot be parsed is
//! dropped, and so is what goes to a canary. Other protocols pass, and what stays on the pod's link.
//! Inside, a packet socket may leave traffic control out (PACKET_QDISC_BYPASS, AF_XDP), and what runs after the guard may
//! turn other packets into TCP. On the node a packet of a veth still has its socket, so the same is asked there of what
//! was not asked, or was something else, inside.
//! A verdict to pass is TCX_NEXT, which is TC_ACT_UNSPEC: programs after ours still have their say.

use core::ffi::c_void;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_get_listener_sock, bpf_sk_fullsock};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::SOCKET_PROXY;
use mesh_ebpf_abi::canary::is_canary;
use mesh_ebpf_abi::event::{Counter, DropEvent};
use mesh_ebpf_abi::guard::{Kind, Sender, Verdict, judge, stays_on_link};
use mesh_ebpf_abi::packet::{self, Packet};

use crate::maps::{SKPROXY, count, count_at, report};
use crate::probe;
use crate::skb::Skb;

pub(crate) const TCX_NEXT: i32 = -1;
const TCP_TIME_WAIT: u32 = 6;

/// For devices whose frames begin with an Ethernet header.
#[classifier]
fn guard(ctx: TcContext) -> i32 {
    if proxied(ctx.skb.skb) {
        return TCX_NEXT;
    }
    let (skb, packet) = Skb::ethernet(ctx.skb.skb);
    rule(skb, packet, Place::Pod)
}

/// For devices without one.
#[classifier]
fn guard_l3(ctx: TcContext) -> i32 {
    if proxied(ctx.skb.skb) {
        return TCX_NEXT;
    }
    let (skb, packet) = Skb::bare(ctx.skb.skb);
    rule(skb, packet, Place::Pod)
}

/// On the node: ingress of the other end of a pod's veth, whose frames begin with an Ethernet header.
#[classifier]
fn guard_node(ctx: TcContext) -> i32 {
    if proxied(ctx.skb.skb) {
        return TCX_NEXT;
    }
    let (skb, packet) = Skb::ethernet(ctx.skb.skb);
    rule(skb, packet, Place::Node)
}

/// Where a program is. What passes inside is counted there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Pod,
    Node,
}

/// Whether the packet is of a connection of the proxy, which may leave whatever it is: most do not have to be looked
/// into.
#[inline(always)]
fn proxied(skb: *const __sk_buff) -> bool {
    // SAFETY: a context field, null or a socket of any kind.
    let socket: *mut bpf_sock = unsafe { core::ptr::read_volatile(&raw const (*skb).__bindgen_anon_2.sk) };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the helper takes any socket and returns null for what is not a full one.
    let full: *mut bpf_sock = unsafe { bpf_sk_fullsock(socket) };
    // SAFETY: checked for null, a full socket.
    !full.is_null() && unsafe { SKPROXY.value(full.cast::<c_void>()) } == SOCKET_PROXY
}

#[inline(always)]
fn rule(skb: Skb, packed: u64, place: Place) -> i32 {
    let Packet::Tcp { ip, tcp, .. } = Packet::unpack(packed) else { return TCX_NEXT };
    let verdict = verdict(skb.skb, packed);
    let reason = Verdict::counter(verdict);
    let event = event(skb, ip, tcp, reason);
    // The proxy's listener as well answers a canary from there by a way out, if the pod has lost its rules.
    if is_canary(&event.destination) {
        return TC_ACT_SHOT;
    }
    if verdict & Verdict::DROP == 0 {
        if verdict & Verdict::COUNTED != 0 && place == Place::Pod {
            count_at(reason);
        }
        return TCX_NEXT;
    }
    if stays_on_link(&event.source, &event.destination) {
        if place == Place::Pod {
            count(Counter::GuardLinkLocal);
        }
        return TCX_NEXT;
    }
    let app = reason == Counter::GuardApp as u32 || reason == Counter::GuardAppListener as u32;
    if app {
        let recorded = probe::recorded(skb.skb, skb.start, packed);
        if answers_kubelet(skb.skb, skb.start, packed, recorded) != 0 {
            return TCX_NEXT;
        }
    }
    crate::debug!(&TcContext::new(skb.skb), "guard drops a packet, reason {}", reason);
    report(&event);
    TC_ACT_SHOT
}

/// A packed [`Verdict`] on a packed [`Packet`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn verdict(skb: *mut __sk_buff, packed: u64) -> u32 {
    judge(&Packet::unpack(packed), sender(skb)).pack()
}

/// Whether a packed [`Packet`] that is not the proxy's answers the kubelet: 1, or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn answers_kubelet(skb: *mut __sk_buff, start: u32, packed: u64, recorded: u32) -> u32 {
    u32::from(probe::answers(Skb { skb, start }, packed, recorded != 0))
}

#[inline(always)]
fn sender(skb: *const __sk_buff) -> Sender {
    // SAFETY: a context field, null or a socket of any kind.
    let socket: *mut bpf_sock = unsafe { core::ptr::read_volatile(&raw const (*skb).__bindgen_anon_2.sk) };
    if socket.is_null() {
        return Kind::None.flagged(0);
    }
    // SAFETY: not null; every kind of socket has a state.
    let state = unsafe { core::ptr::read_volatile(&raw const (*socket).state) };
    // SAFETY: the helper takes any socket and returns null for what is not a full one.
    let full: *mut bpf_sock = unsafe { bpf_sk_fullsock(socket) };
    if !full.is_null() {
        // SAFETY: a full socket.
        return Kind::Socket.flagged(unsafe { SKPROXY.value(full.cast::<c_void>()) });
    }
    if state == TCP_TIME_WAIT {
        return Kind::TimeWait.flagged(0);
    }
    // SAFETY: as for bpf_sk_fullsock; the listener of a request socket, or null.
    let listener: *mut bpf_sock = unsafe { bpf_get_listener_sock(socket) };
    // SAFETY: checked for null, and a listener is a full socket.
    let flag = if listener.is_null() { 0 } else { unsafe { SKPROXY.value(listener.cast::<c_void>()) } };
    Kind::Handshake.flagged(flag)
}

#[inline(always)]
fn event(skb: Skb, ip: u32, tcp: u32, reason: u32) -> DropEvent {
    let (source, destination, [source_port, destination_port]) = packet::endpoints(&skb, ip, tcp);
    // SAFETY: a context field.
    let ifindex = unsafe { core::ptr::read_volatile(&raw const (*skb.skb).ifindex) };
    DropEvent { source, destination, source_port, destination_port, reason, ifindex, slot: u32::MAX }
}
