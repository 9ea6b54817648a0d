//! Ingress (tcx, or cls_bpf at clsact) of every interface of an enrolled pod but lo: finds out for each SYN whether anybody
//! listens.
//!
//! The kernel is asked by its own look-up (bpf_skc_lookup_tcp), which runs our sk_lookup program, which knows from
//! `ASKED` that this is only a question and lets the look-up go on. Nobody there: sk_lookup drops the SYN itself when
//! it comes there, and the kernel answers with a reset, as it does without the mesh. Every packet goes on from here, but
//! for the SYN of one neighbour to the other: sk_lookup would drop it, unless another's program chose a socket, and the
//! guard lets pass what answers it.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{TC_ACT_SHOT, bpf_sock, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{bpf_sk_release, bpf_skc_lookup_tcp};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use mesh_ebpf_abi::event::{Counter, DropEvent};
use mesh_ebpf_abi::guard::stays_on_link;
use mesh_ebpf_abi::packet::{self, Packet};
use mesh_ebpf_abi::probe::Tuple;
use mesh_ebpf_abi::refuse::{ASKING, Asked, NOBODY, SOMEBODY, opens};

use crate::guard::TCX_NEXT;
use crate::maps::{ASKED, report, slot_of};
use crate::skb::Skb;

/// For devices whose frames begin with an Ethernet header.
#[classifier]
fn refuse(ctx: TcContext) -> i32 {
    let (skb, packet) = Skb::ethernet(ctx.skb.skb);
    ask(&ctx, skb, Packet::unpack(packet))
}

/// For devices without one.
#[classifier]
fn refuse_l3(ctx: TcContext) -> i32 {
    let (skb, packet) = Skb::bare(ctx.skb.skb);
    ask(&ctx, skb, Packet::unpack(packet))
}

#[inline(always)]
fn ask(ctx: &TcContext, skb: Skb, packet: Packet) -> i32 {
    let Packet::Tcp { ip, tcp, .. } = packet else { return TCX_NEXT };
    if !opens(&packet) {
        return TCX_NEXT;
    }
    let (source, destination, [source_port, destination_port]) = packet::endpoints(&skb, ip, tcp);
    let ends = Tuple { source, destination, source_port, destination_port };
    if stays_on_link(&source, &destination) {
        report(&event(ctx, &ends));
        return TC_ACT_SHOT;
    }
    // What is not for an enrolled address sk_lookup drops whoever listens.
    if slot_of(&destination).is_some()
        && let Some(place) = ASKED.get_ptr_mut(Asked::place(&ends))
    {
        // SAFETY: this CPU's place; neither this program nor what it calls is moved to another CPU.
        unsafe {
            *place = Asked { ends, answer: ASKING };
            (*place).answer = if listens(ctx, &ends) { SOMEBODY } else { NOBODY };
        }
    }
    TCX_NEXT
}

#[inline(always)]
fn event(ctx: &TcContext, ends: &Tuple) -> DropEvent {
    // SAFETY: a context field.
    let ifindex = unsafe { core::ptr::read_volatile(&raw const (*ctx.skb.skb).ifindex) };
    DropEvent {
        source: ends.source,
        destination: ends.destination,
        source_port: ends.source_port,
        destination_port: ends.destination_port,
        reason: Counter::SteerForeign as u32,
        ifindex,
        slot: u32::MAX,
    }
}

/// Whether the kernel has a socket for the packet in the pod's network namespace.
#[inline(always)]
fn listens(ctx: &TcContext, ends: &Tuple) -> bool {
    const CURRENT_NETNS: u64 = u64::MAX; // BPF_F_CURRENT_NETNS
    let (source, destination) = (ends.source.words(), ends.destination.words());
    let (source_port, destination_port) = (ends.source_port.to_be(), ends.destination_port.to_be());
    let ports = u32::from(source_port) | u32::from(destination_port) << 16;
    let v4 = ends.destination.is_v4();
    let mut four = [source[3], destination[3], ports];
    let mut six = [
        source[0],
        source[1],
        source[2],
        source[3],
        destination[0],
        destination[1],
        destination[2],
        destination[3],
        ports,
    ];
    let tuple: *mut bpf_sock_tuple = if v4 { (&raw mut four).cast() } else { (&raw mut six).cast() };
    let size = if v4 { size_of_val(&four) } else { size_of_val(&six) };
    // SAFETY: the tuple has the size that says which family it is of.
    let socket: *mut bpf_sock =
        unsafe { bpf_skc_lookup_tcp(ctx.as_ptr(), tuple, size as u32, CURRENT_NETNS, 0) };
    if socket.is_null() {
        return false;
    }
    // SAFETY: a reference that the look-up took.
    unsafe { bpf_sk_release(socket.cast()) };
    true
}
