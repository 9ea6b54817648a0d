//! sk_lookup, one program a pod: chooses the socket that a new connection in the pod's network namespace meets.
//!
//! Where `refuse` found that nobody listens the packet is dropped too, and the kernel refuses the connection.
//! Established connections never come here. No listener in the slot means drop: inbound the peer gets a reset,
//! outbound the SYN is repeated until a proxy is there. Of UDP only the pod's DNS queries are taken, which its rules turn
//! back to lo; where nobody can take them they are dropped, and the client asks again. Everything else passes.

use aya_ebpf::bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, BPF_SK_LOOKUP_F_REPLACE, bpf_sk_lookup, sk_action};
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use mesh_ebpf_abi::Address;
use mesh_ebpf_abi::canary::is_canary;
use mesh_ebpf_abi::event::{Counter, DropEvent};
use mesh_ebpf_abi::probe::Tuple;
use mesh_ebpf_abi::refuse::{Asked, UNKNOWN};
use mesh_ebpf_abi::steer::{Datagram, Lookup, Steer, may_be_query, steer as choose, steer_query};

use crate::maps::{ASKED, LISTEN, count, report, slot_of};
use crate::probe::probed;

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
const LOOPBACK_IFINDEX: u32 = 1; // in every network namespace

/// The pod's slot: the loader writes it before each pod's program is loaded.
#[unsafe(no_mangle)]
static SLOT: u32 = u32::MAX;

/// The hook.
#[sk_lookup]
fn steer(ctx: SkLookupContext) -> u32 {
    let facts = Facts::read(ctx.lookup);
    let chosen = match facts.protocol {
        IPPROTO_TCP => choose(&facts.lookup()),
        IPPROTO_UDP if may_be_query(facts.on_lo(), facts.local_port) => steer_query(&facts.datagram()),
        _ => return sk_action::SK_PASS,
    };
    let counter = match chosen {
        Steer::Pass => return sk_action::SK_PASS,
        Steer::Probe => {
            count(Counter::Probed);
            return sk_action::SK_PASS;
        }
        Steer::Refuse => {
            count(Counter::Refused);
            return sk_action::SK_DROP;
        }
        Steer::To(index) => match LISTEN.redirect_sk_lookup(&ctx, index, FLAGS) {
            Ok(()) => return steered(&facts),
            Err(_) => Counter::SteerNoListener,
        },
        Steer::Drop(counter) => counter,
    };
    report(&facts.event(counter));
    sk_action::SK_DROP
}

/// Without the first the kernel chooses again in the listener's SO_REUSEPORT group; without the second a program of
/// somebody else that ran before this one has the last word.
const FLAGS: u64 = (BPF_SK_LOOKUP_F_NO_REUSEPORT | BPF_SK_LOOKUP_F_REPLACE) as u64;

#[inline(always)]
fn steered(facts: &Facts) -> u32 {
    if !is_canary(&facts.local) && !is_canary(&facts.remote) {
        count(Counter::Steered);
    }
    sk_action::SK_PASS
}

struct Facts {
    protocol: u32,
    v4: bool,
    ifindex: u32,
    local: Address,
    local_port: u16,
    remote: Address,
    remote_port: u16,
}

impl Facts {
    /// Reads every word of the context, also those of the other family, and selects values: reads in two branches
    /// become one read at a variable offset in LLVM's hands, which the verifier refuses.
    #[inline(always)]
    fn read(ctx: *const bpf_sk_lookup) -> Self {
        macro_rules! field {
            ($($path:tt)+) => {
                // SAFETY: a context field; the verifier checks the access.
                unsafe { core::ptr::read_volatile(&raw const (*ctx).$($path)+) }
            };
        }
        let v4 = field!(family) == AF_INET;
        let (local4, remote4) = (field!(local_ip4), field!(remote_ip4));
        let local6 = [field!(local_ip6[0]), field!(local_ip6[1]), field!(local_ip6[2]), field!(local_ip6[3])];
        let remote6 =
            [field!(remote_ip6[0]), field!(remote_ip6[1]), field!(remote_ip6[2]), field!(remote_ip6[3])];
        let select = |four, six| if v4 { Address::from_v4_word(four) } else { Address::from_v6_words(six) };
        Self {
            protocol: field!(protocol),
            v4,
            ifindex: field!(ingress_ifindex),
            local: select(local4, local6),
            local_port: field!(local_port) as u16,
            remote: select(remote4, remote6),
            remote_port: u16::from_be(field!(remote_port)),
        }
    }

    #[inline(always)]
    fn on_lo(&self) -> bool {
        self.ifindex == LOOPBACK_IFINDEX
    }

    #[inline(always)]
    fn datagram(&self) -> Datagram {
        Datagram { slot: slot(), v4: self.v4, local: self.local, local_slot: slot_of(&self.local) }
    }

    #[inline(always)]
    fn lookup(&self) -> Lookup {
        let ends = Tuple {
            source: self.remote,
            destination: self.local,
            source_port: self.remote_port,
            destination_port: self.local_port,
        };
        Lookup {
            slot: slot(),
            v4: self.v4,
            on_lo: self.on_lo(),
            local: self.local,
            local_port: self.local_port,
            remote: self.remote,
            local_slot: slot_of(&self.local),
            remote_slot: slot_of(&self.remote),
            probed: probed(&ends, slot()),
            asked: ASKED.get(Asked::place(&ends)).map_or(UNKNOWN, |asked| asked.of(&ends)),
        }
    }

    #[inline(always)]
    fn event(&self, counter: Counter) -> DropEvent {
        DropEvent {
            source: self.remote,
            destination: self.local,
            source_port: self.remote_port,
            destination_port: self.local_port,
            reason: counter as u32,
            ifindex: self.ifindex,
            slot: slot(),
        }
    }
}

#[inline(always)]
fn slot() -> u32 {
    // SAFETY: a plain word; volatile because the loader changes it behind the compiler's back.
    unsafe { core::ptr::read_volatile(&raw const SLOT) }
}
