//! Every map: its bounds, its one writer, its readers.
//!
//! **Invariant:** layouts are `mesh-ebpf-abi`'s; maps are pinned by name under the ABI's version.

use core::ffi::c_void;

use aya_ebpf::bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE};
use aya_ebpf::helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{HashMap, LruHashMap, PerCpuArray, RingBuf, SockMap};
use mesh_ebpf_abi::event::{Counter, DropEvent};
use mesh_ebpf_abi::probe::{ProbePort, Tuple};
use mesh_ebpf_abi::refuse::{Asked, PLACES};
use mesh_ebpf_abi::{
    Address, Dialled, Handshake, MAX_ADDRESSES, MAX_PODS, MAX_PROBE_PORTS, MAX_PROBES, NetnsConfig,
    PodAddress, PodRecord, SOCKETS_PER_POD,
};

/// Written by the agent: an entry switches capture of connect() on. Read by connect.
#[map]
pub(crate) static NSCFG: HashMap<u64, NetnsConfig> = HashMap::with_max_entries(MAX_PODS, 0);

/// Written by the agent. Read by connect, sk_lookup, `probes` and `refuse`.
#[map]
pub(crate) static PODIP: HashMap<Address, PodAddress> =
    HashMap::with_max_entries(MAX_PODS * MAX_ADDRESSES as u32, 0);

/// Written by the agent; the kernel removes a socket that its last owner closed. Read by sk_lookup.
#[map]
pub(crate) static LISTEN: SockMap = SockMap::with_max_entries(MAX_PODS * SOCKETS_PER_POD, 0);

/// Written by the agent (listeners), ztunnel (the sockets it opens), `older`, `inherit`, `bystanders`, the guard (the app's ends of
/// probes), and connect, which takes the flag of an older connection away; accepted sockets inherit. Read by connect,
/// the guard and `probes`.
#[btf_map]
pub(crate) static SKPROXY: SocketFlags = SocketFlags::new();

/// Written by `probes` and `bystanders`. Read by sk_lookup and the guard. The kernel forgets the oldest when it is full.
#[map]
pub(crate) static PROBE: LruHashMap<Tuple, u32> = LruHashMap::with_max_entries(MAX_PROBES, 0);

/// Written by the agent. Read by sk_lookup.
#[map]
pub(crate) static PROBEPORT: HashMap<ProbePort, u32> =
    HashMap::with_max_entries(MAX_PODS * MAX_PROBE_PORTS as u32, BPF_F_NO_PREALLOC);

/// Written by `refuse`, read by sk_lookup for the same packet.
#[map]
pub(crate) static ASKED: PerCpuArray<Asked> = PerCpuArray::with_max_entries(PLACES, 0);

/// Written by the agent for the next agent; no program reads it. Here so that it is pinned with the others.
#[map]
static PODS: HashMap<u32, PodRecord> = HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);

/// Written by `older` and `inherit`, read and cleared by `grown`. The oldest give way when there are too many.
#[map]
pub(crate) static HANDSHAKES: LruHashMap<Handshake, u64> = LruHashMap::with_max_entries(16 * 1024, 0);

/// Written by the connect hooks that run first, read and cleared by those that run last, in the same call.
#[map]
pub(crate) static DIALLED: LruHashMap<u64, Dialled> = LruHashMap::with_max_entries(4096, 0);

/// Written by every program, read by the agent.
#[map]
static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::ALL.len() as u32, 0);

/// Written by sk_lookup, `refuse` and the guard, drained by the agent. When it is full events are lost, never verdicts.
#[map]
static DROPS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// Adds one to a counter.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    count_at(counter as u32);
}

/// The same by the counter's index.
#[inline(always)]
pub(crate) fn count_at(counter: u32) {
    if let Some(value) = COUNTS.get_ptr_mut(counter) {
        // SAFETY: the pointer is this CPU's slot, and a program is not moved to another CPU.
        unsafe { *value += 1 };
    }
}

/// Counts a drop by its reason and reports it. Flags 0: a forced wake-up costs 6 us.
#[inline(always)]
pub(crate) fn report(event: &DropEvent) {
    count_at(event.reason);
    if let Some(mut entry) = DROPS.reserve::<DropEvent>(0) {
        entry.write(*event);
        entry.submit(0);
    }
}

/// Slot of the pod on this node that has the address.
#[inline(always)]
pub(crate) fn slot_of(address: &Address) -> Option<u32> {
    // SAFETY: the agent replaces entries of a pod only when it leaves; a torn read is a slot that was right just now.
    unsafe { PODIP.get(address) }.map(|pod| pod.slot)
}

/// A socket storage map whose values accepted sockets inherit from their listener, which aya's own cannot be.
#[repr(C)]
pub(crate) struct SocketFlags {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const u32,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: a definition for the loader; nothing reads the pointers.
unsafe impl Sync for SocketFlags {}

impl SocketFlags {
    const fn new() -> Self {
        Self {
            r#type: core::ptr::null(),
            key: core::ptr::null(),
            value: core::ptr::null(),
            max_entries: core::ptr::null(),
            map_flags: core::ptr::null(),
        }
    }

    /// The socket's flag, if it has one.
    ///
    /// # Safety
    /// `socket` is a pointer that the verifier knows as a full socket.
    #[inline(always)]
    pub(crate) unsafe fn get(&self, socket: *mut c_void) -> Option<u32> {
        let map = core::ptr::from_ref(self).cast_mut().cast();
        // SAFETY: the helper takes the map's address and a full socket, and returns null or the value.
        let value = unsafe { bpf_sk_storage_get(map, socket, core::ptr::null_mut(), 0) }.cast::<u32>();
        // SAFETY: not null, and the storage lives as long as the socket.
        if value.is_null() { None } else { Some(unsafe { *value }) }
    }

    /// The socket's flag, 0 if it has none.
    ///
    /// # Safety
    /// As for `get`.
    #[inline(always)]
    pub(crate) unsafe fn value(&self, socket: *mut c_void) -> u32 {
        let map = core::ptr::from_ref(self).cast_mut().cast();
        // SAFETY: as above.
        let value = unsafe { bpf_sk_storage_get(map, socket, core::ptr::null_mut(), 0) }.cast::<u32>();
        // SAFETY: not null, and the storage lives as long as the socket.
        if value.is_null() { 0 } else { unsafe { *value } }
    }

    /// Takes a socket's flag away.
    ///
    /// # Safety
    /// As for `get`.
    #[inline(always)]
    pub(crate) unsafe fn forget(&self, socket: *mut c_void) {
        let map = core::ptr::from_ref(self).cast_mut().cast();
        // SAFETY: as above; a socket without a flag is no harm.
        unsafe { bpf_sk_storage_delete(map, socket) };
    }

    /// Flags a socket that has no flag yet. Whether there was memory for it: the kernel charges it to the socket, whose
    /// owner can use it up.
    ///
    /// # Safety
    /// As for `get`, or a BTF socket pointer.
    #[inline(always)]
    pub(crate) unsafe fn flag(&self, socket: *mut c_void, mut value: u32) -> bool {
        const CREATE: u64 = 1; // BPF_SK_STORAGE_GET_F_CREATE
        let map = core::ptr::from_ref(self).cast_mut().cast();
        // SAFETY: as above; the value is copied.
        let place = unsafe { bpf_sk_storage_get(map, socket, (&raw mut value).cast(), CREATE) };
        !place.is_null()
    }
}
