//! The agent's side of the maps: which pods there are, which slot and which sockets each has.
//!
//! **Invariant:** the agent is the one writer of all maps here but SKPROXY, into which ztunnel writes too.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use aya::Ebpf;
use aya::maps::{self, Map, MapData, MapError};
use mesh_ebpf_abi::event::{Counter, DropEvent};
use mesh_ebpf_abi::probe::ProbePort;
use mesh_ebpf_abi::{
    Address, MAX_PODS, NetnsConfig, PodAddress, PodRecord, SOCKET_PROXY, SOCKETS_PER_POD, SocketKind, map,
};

use super::pins::Pins;
use super::{DatapathError, Listeners, bpf};

/// The open maps.
pub(super) struct Maps {
    nscfg: maps::HashMap<MapData, u64, NetnsConfig>,
    podip: maps::HashMap<MapData, Address, PodAddress>,
    listen: maps::SockMap<MapData>,
    skproxy: maps::SkStorage<MapData, u32>,
    probe_ports: maps::HashMap<MapData, ProbePort, u32>,
    pods: maps::HashMap<MapData, u32, PodRecord>,
    counts: maps::PerCpuArray<MapData, u64>,
    drops: maps::RingBuf<MapData>,
    skproxy_fd: OwnedFd,
}

impl Maps {
    /// Takes the maps out of the loaded object.
    ///
    /// # Errors
    /// When a map is missing or its layout is not the one this agent was built with.
    pub(super) fn take(object: &mut Ebpf, pins: &Pins) -> Result<Self, DatapathError> {
        let name = map::SKPROXY;
        let skproxy_fd = bpf::open(&pins.map(name)).map_err(|source| DatapathError::Pin { name, source })?;
        Ok(Self {
            nscfg: typed(object, map::NSCFG)?,
            podip: typed(object, map::PODIP)?,
            listen: typed(object, map::LISTEN)?,
            skproxy: typed(object, map::SKPROXY)?,
            probe_ports: typed(object, map::PROBEPORT)?,
            pods: typed(object, map::PODS)?,
            counts: typed(object, map::COUNTS)?,
            drops: typed(object, map::DROPS)?,
            skproxy_fd,
        })
    }

    /// The map of socket flags, for a proxy.
    pub(super) fn skproxy(&self) -> BorrowedFd<'_> {
        self.skproxy_fd.as_fd()
    }

    /// Flags a socket as the proxy's.
    ///
    /// # Errors
    /// As of BPF_MAP_UPDATE_ELEM.
    pub(super) fn flag(&mut self, socket: &impl AsRawFd) -> io::Result<()> {
        self.skproxy.insert(socket, SOCKET_PROXY, 0).map_err(kernel)
    }

    /// Every pod's slot and record.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub(super) fn records(&self) -> io::Result<HashMap<u32, PodRecord>> {
        self.pods.iter().collect::<Result<_, _>>().map_err(kernel)
    }

    /// The lowest slot that is free.
    ///
    /// # Errors
    /// `QuotaExceeded` when the node is full.
    pub(super) fn free_slot(&self) -> io::Result<u32> {
        let taken = self.records()?;
        let full = || io::Error::new(io::ErrorKind::QuotaExceeded, format!("{MAX_PODS} pods are enrolled"));
        (0..MAX_PODS).find(|slot| !taken.contains_key(slot)).ok_or_else(full)
    }

    /// Writes a pod's record and its addresses.
    ///
    /// # Errors
    /// When a map refuses; call `forget` then.
    pub(super) fn remember(&mut self, slot: u32, record: &PodRecord) -> io::Result<()> {
        self.pods.insert(slot, record, 0).map_err(kernel)?;
        for address in addresses(record) {
            self.podip.insert(address, PodAddress { slot, flags: 0 }, 0).map_err(kernel)?;
        }
        Ok(())
    }

    /// Opens these ports of a pod to the kubelet, and no others.
    ///
    /// # Errors
    /// When the map cannot be read or refuses.
    pub(super) fn open_to_probes(&mut self, slot: u32, ports: &BTreeSet<u16>) -> io::Result<()> {
        let all = self.probe_ports.keys().collect::<Result<Vec<_>, _>>().map_err(kernel)?;
        for old in all.into_iter().filter(|old| old.slot == slot && !ports.contains(&old.port)) {
            missing_is_fine(self.probe_ports.remove(&old))?;
        }
        for port in ports {
            self.probe_ports.insert(ProbePort::new(slot, *port), 1, 0).map_err(kernel)?;
        }
        Ok(())
    }

    /// Puts a pod's listeners where sk_lookup finds them, in the place of others.
    ///
    /// # Errors
    /// When a socket is not one that can be there.
    pub(super) fn publish(&mut self, slot: u32, listeners: &Listeners) -> io::Result<()> {
        let sockets = [
            (SocketKind::Inbound4, Some(&listeners.inbound_v4)),
            (SocketKind::Outbound4, Some(&listeners.outbound_v4)),
            (SocketKind::Hbone4, Some(&listeners.hbone_v4)),
            (SocketKind::Inbound6, listeners.inbound_v6.as_ref()),
            (SocketKind::Outbound6, listeners.outbound_v6.as_ref()),
            (SocketKind::Hbone6, listeners.hbone_v6.as_ref()),
            (SocketKind::Dns4, listeners.dns_v4.as_ref()),
            (SocketKind::Dns6, listeners.dns_v6.as_ref()),
        ];
        for (kind, socket) in sockets {
            let Some(socket) = socket else { continue };
            self.flag(socket)?;
            self.listen.set(kind.index(slot), socket, 0).map_err(kernel)?;
        }
        Ok(())
    }

    /// Switches capture of connect() on in a network namespace, for connections of these families.
    ///
    /// # Errors
    /// When the map refuses.
    pub(super) fn capture(&mut self, cookie: u64, slot: u32, families: u32) -> io::Result<()> {
        self.nscfg.insert(cookie, NetnsConfig { slot, families }, 0).map_err(kernel)
    }

    /// Whether it is on, and as said.
    pub(super) fn captures(&self, cookie: u64, slot: u32, families: u32) -> bool {
        self.nscfg.get(&cookie, 0).is_ok_and(|there| there == NetnsConfig { slot, families })
    }

    /// Whether an address is known as the pod's.
    pub(super) fn knows(&self, address: &Address, slot: u32) -> bool {
        self.podip.get(address, 0).is_ok_and(|pod| pod.slot == slot)
    }

    /// Switches it off.
    ///
    /// # Errors
    /// When the map refuses.
    pub(super) fn release(&mut self, cookie: u64) -> io::Result<()> {
        missing_is_fine(self.nscfg.remove(&cookie))
    }

    /// Removes addresses of a pod.
    ///
    /// # Errors
    /// The first one; the rest is removed.
    pub(super) fn forget_addresses(
        &mut self,
        slot: u32,
        addresses: impl IntoIterator<Item = Address>,
    ) -> io::Result<()> {
        let mut result = Ok(());
        for address in addresses {
            // A pod that came later may have the address by now.
            if self.podip.get(&address, 0).is_ok_and(|pod| pod.slot == slot) {
                result = result.and(missing_is_fine(self.podip.remove(&address)));
            }
        }
        result
    }

    /// Removes everything of a pod, its record last.
    ///
    /// # Errors
    /// The first one; the rest is removed.
    pub(super) fn forget(&mut self, slot: u32, record: &PodRecord) -> io::Result<()> {
        let result = self.release(record.netns_cookie);
        let mut result = result.and(self.forget_addresses(slot, addresses(record)));
        for index in slot * SOCKETS_PER_POD..(slot + 1) * SOCKETS_PER_POD {
            result = result.and(missing_is_fine(self.listen.clear_index(&index)));
        }
        result = result.and(self.open_to_probes(slot, &BTreeSet::new()));
        result.and(missing_is_fine(self.pods.remove(&slot)))
    }

    /// A counter, over all CPUs.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub(super) fn count(&self, counter: Counter) -> io::Result<u64> {
        let values = self.counts.get(&(counter as u32), 0).map_err(kernel)?;
        Ok(values.iter().sum())
    }

    /// The next reported drop, if there is one.
    pub(super) fn next_drop(&mut self) -> Option<DropEvent> {
        let item = self.drops.next()?;
        drop_event(&item)
    }
}

/// Addresses of a record, as the maps have them.
pub(super) fn addresses(record: &PodRecord) -> impl Iterator<Item = Address> + use<> {
    record.addresses.into_iter().take(record.address_count as usize)
}

/// UID of a record.
pub(super) fn uid(record: &PodRecord) -> String {
    let length = record.uid.iter().position(|byte| *byte == 0).unwrap_or(record.uid.len());
    String::from_utf8_lossy(&record.uid[..length]).into_owned()
}

/// Addresses of a record, as the agent has them.
pub(super) fn ips(record: &PodRecord) -> Vec<IpAddr> {
    addresses(record).map(Address::to_ip).collect()
}

fn drop_event(bytes: &[u8]) -> Option<DropEvent> {
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let half = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let address =
        |at: usize| Some(Address::from_v6_words([word(at)?, word(at + 4)?, word(at + 8)?, word(at + 12)?]));
    Some(DropEvent {
        source: address(0)?,
        destination: address(16)?,
        source_port: half(32)?,
        destination_port: half(34)?,
        reason: word(36)?,
        ifindex: word(40)?,
        slot: word(44)?,
    })
}

fn typed<T: TryFrom<Map, Error = MapError>>(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<T, DatapathError> {
    let map = object.take_map(name).ok_or(DatapathError::NoMap { name })?;
    T::try_from(map).map_err(|source| DatapathError::Map { name, source: Box::new(source) })
}

fn missing_is_fine(result: Result<(), MapError>) -> io::Result<()> {
    match result.map_err(kernel) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        other => other,
    }
}

fn kernel(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error.io_error,
        MapError::KeyNotFound | MapError::ElementNotFound => io::Error::from_raw_os_error(libc::ENOENT),
        other => io::Error::other(other),
    }
}
