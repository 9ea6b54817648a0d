#![no_std]
//! What kernel programs and user space share: layouts, numbers, and the decisions of the programs as pure functions.
//!
//! The programs look facts up and act; what follows from the facts is decided in `capture`, `steer`, `guard`,
//! `probe` and `refuse`, which run in the kernel and in unit tests on the host.
//! **Invariant:** a change of any layout or of the meaning of a number here changes `ABI_VERSION`.

pub mod addr;
pub mod canary;
pub mod capture;
pub mod event;
pub mod guard;
pub mod packet;
pub mod probe;
pub mod refuse;
pub mod steer;

use core::mem::{align_of, offset_of, size_of};

pub use addr::Address;

/// Names the pin directory, so that programs of one build never meet bytes of another layout.
pub const ABI_VERSION: u32 = if OTHER_LAYOUT { 1_000_000 } else { 6 };

/// As in another version: for an agent that upgrades are tested with.
const OTHER_LAYOUT: bool = cfg!(feature = "other-layout");

/// Port of HBONE on every workload (Istio's).
pub const HBONE_PORT: u16 = 15008;

/// Port of DNS servers.
pub const DNS_PORT: u16 = 53;

/// Default mark of the proxy's sockets towards the app, for the replies' route back to the proxy.
/// The app's accepted sockets inherit it by `net.ipv4.tcp_fwmark_accept`.
pub const MARK_UPSTREAM: u32 = 0x539;
/// Default mark of the proxy's own sockets towards the network. Nothing on the node trusts it.
pub const MARK_PROXY: u32 = 0x53a;

/// Pods a node can have in the mesh.
pub const MAX_PODS: u32 = 1024;
/// Addresses a pod can have.
pub const MAX_ADDRESSES: usize = if OTHER_LAYOUT { 12 } else { 8 };
/// Longest pod UID (a UUID has 36 bytes, a static pod's UID 32).
pub const MAX_UID: usize = 63;
/// Ports of a pod that its probes and lifecycle hooks can open to the kubelet.
pub const MAX_PROBE_PORTS: usize = 64;
/// Connections of the kubelet at a time; far more than there are, since a map that is full forgets.
pub const MAX_PROBES: u32 = 16_384;
/// Sockets of a pod in `LISTEN`.
pub const SOCKETS_PER_POD: u32 = if OTHER_LAYOUT { 16 } else { 8 };

/// Map names, at most 15 bytes: the kernel cuts longer ones. Each map's one writer is named in `mesh-ebpf`'s maps.rs.
pub mod map {
    /// Netns cookie to [`NetnsConfig`](crate::NetnsConfig): there is an entry while connect() is captured.
    pub const NSCFG: &str = "NSCFG";
    /// Pod address to [`PodAddress`](crate::PodAddress).
    pub const PODIP: &str = "PODIP";
    /// Socket map of the pods' listeners, index [`SocketKind::index`](crate::SocketKind::index).
    pub const LISTEN: &str = "LISTEN";
    /// Socket storage: which sockets may pass.
    ///
    /// User space flags a socket with one call, `bpf(BPF_MAP_UPDATE_ELEM)` with the key `i32` file descriptor of the
    /// socket, the value `u32` [`SOCKET_PROXY`](crate::SOCKET_PROXY) and flags 0 (BPF_ANY), before connect() or
    /// listen(). Accepted sockets inherit the flag from their listener (BPF_F_CLONE).
    pub const SKPROXY: &str = "SKPROXY";
    /// Connection of the kubelet ([`Tuple`](crate::probe::Tuple)) to the `u32` slot of the pod that it goes to, or
    /// [`NO_PROBE`](crate::probe::NO_PROBE).
    pub const PROBE: &str = "PROBE";
    /// Port of a pod ([`ProbePort`](crate::probe::ProbePort)) that such a connection may reach; a set.
    pub const PROBEPORT: &str = "PROBEPORT";
    /// Whether somebody listens where the last new connections go ([`Asked`](crate::refuse::Asked)); an array per CPU.
    pub const ASKED: &str = "ASKED";
    /// Slot to [`PodRecord`](crate::PodRecord), for the next agent; no program reads it.
    pub const PODS: &str = "PODS";
    /// Counters per CPU, index [`Counter`](crate::event::Counter).
    pub const COUNTS: &str = "COUNTS";
    /// [`Handshake`](crate::Handshake) to the time (bpf_ktime_get_ns) until which its connection is taken for older.
    pub const HANDSHAKES: &str = "HANDSHAKES";
    /// Socket cookie to [`Dialled`](crate::Dialled), while the programs on a connect() call run.
    pub const DIALLED: &str = "DIALLED";
    /// Ring buffer of [`DropEvent`](crate::event::DropEvent).
    pub const DROPS: &str = "DROPS";
}

/// Program names, at most 15 bytes, each the name of its function in `mesh-ebpf`.
pub mod program {
    /// cgroup/connect4: binds the app's socket to lo.
    pub const CONNECT4: &str = "capture4";
    /// cgroup/connect6: the same for IPv6 sockets.
    pub const CONNECT6: &str = "capture6";
    /// cgroup/connect4: puts back the destination that a program after `capture4` replaced.
    pub const RESTORE4: &str = "restore4";
    /// cgroup/connect6: the same for IPv6 sockets.
    pub const RESTORE6: &str = "restore6";
    /// sk_lookup: chooses the proxy's socket.
    pub const STEER: &str = "steer";
    /// Egress of devices with Ethernet headers.
    pub const GUARD: &str = "guard";
    /// Egress of devices without.
    pub const GUARD_L3: &str = "guard_l3";
    /// Ingress of the other end of a pod's veth, on the node: the guard once more.
    pub const GUARD_NODE: &str = "guard_node";
    /// Ingress of devices with Ethernet headers: asks whether anybody listens.
    pub const REFUSE: &str = "refuse";
    /// Ingress of devices without.
    pub const REFUSE_L3: &str = "refuse_l3";
    /// TCP socket iterator: flags the sockets older than enrolment.
    pub const OLDER: &str = "older";
    /// TCP socket iterator: the same for a pod that another version captures, whose tunnels it tells from the rest.
    pub const INHERIT: &str = "inherit";
    /// TCP socket iterator: flags those whose handshake is older than enrolment.
    pub const GROWN: &str = "grown";
    /// sockops: records the kubelet's connections.
    pub const PROBES: &str = "probes";
    /// sockops: tells pods on the node's network from the kubelet, where both are below one cgroup.
    pub const BYSTANDERS: &str = "bystanders";
}

/// Constants that the loader writes into the programs before they are loaded, each a symbol in `mesh-ebpf`.
pub mod constant {
    /// `u32`, sk_lookup: the slot of the pod whose program this is.
    pub const SLOT: &str = "SLOT";
    /// `u64`, sockops: the cookie of the node's own network namespace.
    pub const NODE_NETNS: &str = "NODE_NETNS";
}

/// Bit in [`NetnsConfig`]: the pod has an IPv4 address.
pub const FAMILY_V4: u32 = 1;
/// Bit in [`NetnsConfig`]: the pod has an IPv6 address.
pub const FAMILY_V6: u32 = 2;

/// Bit in [`NetnsConfig`]: others have programs on connect(), so the destination is noted for `restore4` and `restore6`.
pub const KEEP_DESTINATION: u32 = 4;

/// Value in `SKPROXY`: a proxy's socket. Not captured at connect, passes the guard.
pub const SOCKET_PROXY: u32 = 1;
/// Value in `SKPROXY`: connected before the pod was enrolled. Passes the guard. It is captured when it connects again,
/// and loses the flag.
pub const SOCKET_OLDER: u32 = 2;
/// Value in `SKPROXY`: the app's end of a connection of the kubelet. Passes the guard. It is captured when it connects
/// elsewhere, and loses the flag.
pub const SOCKET_PROBED: u32 = 3;
/// Value in `SKPROXY`: a tunnel from before another version of the programs captured the pod: the proxy's, and policy was
/// asked about it. Passes the guard. It is captured when it connects again, and loses the flag.
pub const SOCKET_TUNNEL: u32 = 5;
/// Value in `SKPROXY`: of a pod on the node's network, so not the kubelet's.
pub const SOCKET_BYSTANDER: u32 = 4;

/// What a listener of a pod is for; its place among the pod's `SOCKETS_PER_POD`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// TCP to the pod on any other port than HBONE's.
    Inbound4 = 0,
    /// The same over IPv6.
    Inbound6 = 1,
    /// TCP the pod opens.
    Outbound4 = 2,
    /// The same over IPv6.
    Outbound6 = 3,
    /// TCP to the pod on [`HBONE_PORT`].
    Hbone4 = 4,
    /// The same over IPv6.
    Hbone6 = 5,
    /// Reserved for DNS.
    Dns4 = 6,
    /// Reserved for DNS.
    Dns6 = 7,
}

impl SocketKind {
    /// Index in `LISTEN` for the pod in `slot`.
    pub const fn index(self, slot: u32) -> u32 {
        slot * SOCKETS_PER_POD + self as u32
    }
}

/// Value of `NSCFG`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetnsConfig {
    /// The pod's slot.
    pub slot: u32,
    /// Families in which its connections can be captured, [`FAMILY_V4`] and [`FAMILY_V6`]; and [`KEEP_DESTINATION`].
    pub families: u32,
}

/// Value of `DIALLED`: where a connect() call wants to go, in the words of the hook's context.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialled {
    /// `user_ip4` in the first, or `user_ip6`.
    pub address: [u32; 4],
    /// `user_port`.
    pub port: u32,
}

/// Key in `HANDSHAKES`: a handshake, and the connection that comes of it, as the kernel's table of connections has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshake {
    /// Hash of addresses and ports with the kernel's secrets.
    pub hash: u32,
    /// The two ports, as in `struct sock_common`.
    pub ports: u32,
}

/// Value of `PODIP`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodAddress {
    /// The pod's slot.
    pub slot: u32,
    /// Reserved, zero.
    pub flags: u32,
}

/// Value of `PODS`: what the next agent has to know of a pod to let it go.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodRecord {
    /// Netns cookie (SO_NETNS_COOKIE), the key in `NSCFG`.
    pub netns_cookie: u64,
    /// Addresses; the first `address_count` count.
    pub addresses: [Address; MAX_ADDRESSES],
    /// How many of `addresses` there are.
    pub address_count: u32,
    /// 1 once captured, 0 while prepared.
    pub captured: u32,
    /// Values of the sysctls before enrolment, in the order the agent sets them; -1 where it set none.
    pub sysctls: [i32; 4],
    /// Kubernetes pod UID, zero padded.
    pub uid: [u8; MAX_UID + 1],
}

const _: () = {
    assert!(size_of::<NetnsConfig>() == 8 && align_of::<NetnsConfig>() == 4);
    assert!(size_of::<Dialled>() == 20 && align_of::<Dialled>() == 4);
    assert!(size_of::<PodAddress>() == 8 && align_of::<PodAddress>() == 4);
    assert!(size_of::<PodRecord>() == 8 + 16 * MAX_ADDRESSES + 8 + 16 + 64);
    assert!(offset_of!(PodRecord, addresses) == 8);
    const COUNT: usize = 8 + 16 * MAX_ADDRESSES;
    assert!(offset_of!(PodRecord, address_count) == COUNT);
    assert!(offset_of!(PodRecord, captured) == COUNT + 4);
    assert!(offset_of!(PodRecord, sysctls) == COUNT + 8);
    assert!(offset_of!(PodRecord, uid) == COUNT + 24);
    assert!((SocketKind::Dns6 as u32) < SOCKETS_PER_POD);
};

#[cfg(feature = "user")]
mod user {
    #![allow(unsafe_code, reason = "aya::Pod is an unsafe marker: these are plain bytes without padding")]

    use crate::event::DropEvent;
    use crate::probe::{ProbePort, Tuple};
    use crate::{Address, NetnsConfig, PodAddress, PodRecord};

    // SAFETY: repr(C), fixed-width integers only, no padding (sizes are asserted beside each type).
    unsafe impl aya::Pod for Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for NetnsConfig {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodAddress {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodRecord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DropEvent {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Tuple {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ProbePort {}
}
