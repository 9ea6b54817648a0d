//! tcx egress on every interface of an enrolled pod but lo: the last word on what leaves.
//!
//! TCP passes only from a flagged socket (see `mesh-ebpf-abi`'s guard) and from the app's end of a probe (`probe`), so
//! raw sockets, sockets that missed the connect hook and forwarded packets cannot leak. What cannot be parsed is
//! dropped. Other protocols pass, and what stays on the pod's link.
//! A verdict to pass is TCX_NEXT: programs after ours still have their say.

use core::ffi::c_void;

use aya_ebpf::bindings::bpf_hdr_start_off::{BPF_HDR_START_MAC, BPF_HDR_START_NET};
use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, bpf_sock};
use aya_ebpf::helpers::generated::{bpf_get_listener_sock, bpf_sk_fullsock, bpf_skb_load_bytes_relative};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::event::{Counter, DropEvent};
use mesh_ebpf_abi::guard::{Sender, Verdict, judge, stays_on_link};
use mesh_ebpf_abi::packet::{self, Bytes, Packet};

use crate::maps::{SKPROXY, count, report};
use crate::probe;

pub(crate) const TCX_NEXT: i32 = -1;
const TCP_TIME_WAIT: u32 = 6;

/// For devices whose frames begin with an Ethernet header.
#[classifier]
fn guard(ctx: TcContext) -> i32 {
    let bytes = Skb { skb: ctx.skb.skb, start: BPF_HDR_START_MAC };
    let packet = packet::ethernet(&bytes);
    rule(&ctx, &bytes, &packet)
}

/// For devices without one (netkit in L3 mode, tunnels).
#[classifier]
fn guard_l3(ctx: TcContext) -> i32 {
    let bytes = Skb { skb: ctx.skb.skb, start: BPF_HDR_START_NET };
    let packet = packet::ip(&bytes);
    rule(&ctx, &bytes, &packet)
}

#[inline(always)]
fn rule(ctx: &TcContext, bytes: &Skb, packet: &Packet) -> i32 {
    let &Packet::Tcp { ip, tcp, .. } = packet else { return TCX_NEXT };
    match judge(packet, sender(ctx.skb.skb)) {
        Verdict::Pass => return TCX_NEXT,
        Verdict::PassCounted(counter) => {
            count(counter);
            return TCX_NEXT;
        }
        Verdict::Drop(counter) => {
            let event = event(bytes, ip, tcp, counter);
            if stays_on_link(&event.source, &event.destination) {
                count(Counter::GuardLinkLocal);
                return TCX_NEXT;
            }
            let app = matches!(counter, Counter::GuardApp | Counter::GuardAppListener);
            if app && probe::answers(ctx.skb.skb, &event, packet) {
                return TCX_NEXT;
            }
            crate::debug!(ctx, "guard drops a packet, reason {}", counter as u32);
            report(&event, counter);
        }
    }
    TC_ACT_SHOT
}

#[inline(always)]
fn sender(skb: *const __sk_buff) -> Sender {
    // SAFETY: a context field, null or a socket of any kind.
    let socket: *mut bpf_sock = unsafe { core::ptr::read_volatile(&raw const (*skb).__bindgen_anon_2.sk) };
    if socket.is_null() {
        return Sender::None;
    }
    // SAFETY: not null; every kind of socket has a state.
    let state = unsafe { core::ptr::read_volatile(&raw const (*socket).state) };
    // SAFETY: the helper takes any socket and returns null for what is not a full one.
    let full: *mut bpf_sock = unsafe { bpf_sk_fullsock(socket) };
    if !full.is_null() {
        // SAFETY: a full socket.
        return Sender::Socket(unsafe { SKPROXY.get(full.cast::<c_void>()) });
    }
    if state == TCP_TIME_WAIT {
        return Sender::TimeWait;
    }
    // SAFETY: as for bpf_sk_fullsock; the listener of a request socket, or null.
    let listener: *mut bpf_sock = unsafe { bpf_get_listener_sock(socket) };
    // SAFETY: checked for null, and a listener is a full socket.
    let flag = if listener.is_null() { None } else { unsafe { SKPROXY.get(listener.cast::<c_void>()) } };
    Sender::Handshake(flag)
}

#[inline(always)]
fn event(bytes: &Skb, ip: u32, tcp: u32, counter: Counter) -> DropEvent {
    let (source, destination, [source_port, destination_port]) = packet::endpoints(bytes, ip, tcp);
    // SAFETY: a context field.
    let ifindex = unsafe { core::ptr::read_volatile(&raw const (*bytes.skb).ifindex) };
    let (reason, slot) = (counter as u32, u32::MAX);
    DropEvent { source, destination, source_port, destination_port, reason, ifindex, slot }
}

/// The packet, from one of its headers on.
pub(crate) struct Skb {
    pub(crate) skb: *const __sk_buff,
    pub(crate) start: u32,
}

impl Bytes for Skb {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        // SAFETY: the helper checks the offset and writes N bytes.
        let result = unsafe {
            bpf_skb_load_bytes_relative(
                self.skb.cast(),
                offset,
                (&raw mut bytes).cast(),
                N as u32,
                self.start,
            )
        };
        if result == 0 { Some(bytes) } else { None }
    }
}
