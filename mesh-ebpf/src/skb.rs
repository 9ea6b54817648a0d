//! Packets of the programs on interfaces: their bytes, and what they are.
//!
//! The functions here and in `guard` that have C's calling convention are global to the verifier (BTF_FUNC_GLOBAL): each
//! is verified once, for any arguments, and nothing of how it came to its result is known to whoever calls it. Inlined,
//! every way through a packet's headers would be multiplied by every way through what follows. That is also why they take
//! and return plain numbers.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_hdr_start_off::{BPF_HDR_START_MAC, BPF_HDR_START_NET};
use aya_ebpf::helpers::generated::bpf_skb_load_bytes_relative;
use mesh_ebpf_abi::packet::{self, Bytes};

/// The packet, from one of its headers on.
#[derive(Clone, Copy)]
pub(crate) struct Skb {
    pub(crate) skb: *mut __sk_buff,
    pub(crate) start: u32,
}

impl Skb {
    /// On a device whose frames begin with an Ethernet header.
    #[inline(always)]
    pub(crate) fn ethernet(skb: *mut __sk_buff) -> (Self, u64) {
        (Self { skb, start: BPF_HDR_START_MAC }, what_ethernet(skb))
    }

    /// On a device without one (netkit in L3 mode, tunnels).
    #[inline(always)]
    pub(crate) fn bare(skb: *mut __sk_buff) -> (Self, u64) {
        (Self { skb, start: BPF_HDR_START_NET }, what_ip(skb))
    }
}

/// A packed `Packet`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn what_ethernet(skb: *mut __sk_buff) -> u64 {
    packet::ethernet(&Skb { skb, start: BPF_HDR_START_MAC }).pack()
}

/// A packed `Packet`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn what_ip(skb: *mut __sk_buff) -> u64 {
    packet::ip(&Skb { skb, start: BPF_HDR_START_NET }).pack()
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
