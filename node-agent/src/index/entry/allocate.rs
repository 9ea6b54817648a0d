//! Addresses for the hosts of ServiceEntries that say none, as Istio makes them up for ambient proxies: one of each IP
//! family, which `status.addresses` of the entry has.
//!
//! What is in force is what a status says, whoever wrote it; here is decided what the next one is to say. A host's
//! address comes from the hash of its name, so that it has the same again after it was gone, and all agents come to the
//! same without talking to each other. Where two want or have one address it is the older's, and the other gets its next.
//! **Invariant:** which address is proposed to whom does not depend on the order in which they came, as long as there is
//! room for all and none goes. A change takes time in proportion to the hosts of the entries that it concerns.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::super::event::ObjectName;

/// Istio's: 240.240.0.0/16, and of 2001:2::/48 the first 2^64.
const RANGES: [Range; 2] = [
    Range { first: IpAddr::V4(Ipv4Addr::new(240, 240, 0, 0)), bits: 16 },
    Range { first: IpAddr::V6(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0)), bits: 64 },
];

/// So many addresses are tried here and there, which finds a free one soon unless the range is almost full; after that
/// the next one that is free.
const SCATTERED: u64 = 64;

/// Whether an address is one that could be made up.
pub(super) fn is_made_up(ip: IpAddr) -> bool {
    RANGES.iter().any(|range| range.contains(ip))
}

/// A power of two of addresses; the first and the last are nobody's, lest somebody take them for a network's own.
#[derive(Clone, Copy, Debug)]
struct Range {
    first: IpAddr,
    bits: u32,
}

impl Range {
    fn last_offset(self) -> u64 {
        u64::MAX >> (u64::BITS - self.bits)
    }

    /// How many there are to be had.
    fn capacity(self) -> u64 {
        self.last_offset() - 1
    }

    fn at(self, offset: u64) -> IpAddr {
        match self.first {
            IpAddr::V4(first) => Ipv4Addr::from(u32::from(first) | offset as u32).into(),
            IpAddr::V6(first) => Ipv6Addr::from(u128::from(first) | u128::from(offset)).into(),
        }
    }

    fn contains(self, ip: IpAddr) -> bool {
        let offset = match (self.first, ip) {
            (IpAddr::V4(first), IpAddr::V4(ip)) => u128::from(u32::from(ip) ^ u32::from(first)),
            (IpAddr::V6(first), IpAddr::V6(ip)) => u128::from(ip) ^ u128::from(first),
            _ => return false,
        };
        offset > 0 && offset < u128::from(self.last_offset())
    }

    /// All addresses, in the order in which a host would have them.
    fn preferred(self, host: &ObjectName) -> impl Iterator<Item = IpAddr> + use<> {
        let (start, last) = (hash(host, 1), self.last_offset());
        // Odd: it passes by every offset.
        let step = hash(host, 2) | 1;
        let scattered = (0..SCATTERED).map(move |n| start.wrapping_add(step.wrapping_mul(n)));
        let ordered = (1..=last).map(move |n| start.wrapping_add(n));
        let offsets = scattered.chain(ordered).map(move |offset| offset & last);
        offsets.filter(move |offset| *offset > 0 && *offset < last).map(move |offset| self.at(offset))
    }
}

/// The same in every agent.
fn hash(host: &ObjectName, salt: u8) -> u64 {
    // FNV-1a, since std promises no hash from one process to the next.
    let bytes = host.namespace.bytes().chain([0xff]).chain(host.name.bytes()).chain([0xff, salt]);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // Its low bits are not mixed well enough.
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash ^ (hash >> 32)
}

/// Who has a say in an address: of several the first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    /// It is about its own namespace only: nobody has to give way to it.
    yields: bool,
    /// Seconds since 1970.
    created: i64,
    entry: ObjectName,
    /// None: the entry's `spec.addresses`.
    host: Option<Arc<str>>,
}

impl Claim {
    fn host(&self) -> Option<ObjectName> {
        Some(ObjectName { namespace: self.entry.namespace.clone(), name: self.host.clone()? })
    }
}

/// What an entry says itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reserved<'a> {
    /// When the entry was created, in seconds since 1970.
    pub(super) created: i64,
    /// Nobody outside of its namespace is told.
    pub(super) own_namespace_only: bool,
    /// Of its addresses those that [`is_made_up`].
    pub(super) addresses: &'a [IpAddr],
}

impl Reserved<'_> {
    fn claim(self, entry: &ObjectName) -> Claim {
        Claim { yields: self.own_namespace_only, created: self.created, entry: entry.clone(), host: None }
    }
}

/// A host that is to have addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    /// When the entry that says what the host is was created, in seconds since 1970.
    pub(super) created: i64,
    /// Its name.
    pub(super) entry: ObjectName,
    /// What its status says.
    pub(super) said: Vec<IpAddr>,
}

#[derive(Debug)]
struct Host {
    wish: Wish,
    /// What the next status is to say, of each family of which none is in force.
    proposed: [Option<IpAddr>; 2],
}

impl Host {
    fn claim(&self, name: &ObjectName) -> Claim {
        let Wish { created, entry, .. } = &self.wish;
        Claim { yields: false, created: *created, entry: entry.clone(), host: Some(name.name.clone()) }
    }
}

/// What is known of one address.
#[derive(Debug, Default)]
struct Slot {
    /// Sorted: the first has it.
    claims: Vec<Claim>,
    /// Where there are none: who is to have it.
    proposed: Option<Claim>,
}

/// Of what something changed.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Hosts that have or are to have other addresses.
    pub(super) hosts: BTreeSet<ObjectName>,
    /// The entries whose status that is about.
    pub(super) entries: BTreeSet<ObjectName>,
}

/// Which offsets of the IPv4 range are taken, a bit for each: so a free one is found soon, however few there are.
#[derive(Debug)]
struct Used([u64; 1024]);

impl Default for Used {
    fn default() -> Self {
        let mut words = [0; 1024];
        (words[0], words[1023]) = (1, 1 << 63);
        Self(words)
    }
}

impl Used {
    fn set(&mut self, ip: IpAddr, used: bool) {
        let IpAddr::V4(v4) = ip else { return };
        if !RANGES[0].contains(ip) {
            return;
        }
        let offset = usize::from(u32::from(v4) as u16);
        let bit = 1 << (offset % 64);
        match used {
            true => self.0[offset / 64] |= bit,
            false => self.0[offset / 64] &= !bit,
        }
    }

    /// Near an offset.
    fn next_free(&self, start: u64) -> Option<u64> {
        let words = (0..1024).map(|n| (start / 64 + n) % 1024);
        let mut free = words.filter(|word| self.0[*word as usize] != u64::MAX);
        free.next().map(|word| word * 64 + u64::from(self.0[word as usize].trailing_ones()))
    }
}

/// All addresses.
#[derive(Debug, Default)]
pub(super) struct Allocator {
    hosts: HashMap<ObjectName, Host>,
    slots: HashMap<IpAddr, Slot>,
    /// How many of each range are taken.
    taken: [u64; 2],
    used: Used,
    /// Those for whom there was no address, the oldest first.
    waiting: [BTreeSet<Claim>; 2],
}

impl Allocator {
    /// A host is to have addresses, or no longer.
    pub(super) fn set(&mut self, name: &ObjectName, wish: Option<Wish>, touched: &mut Touched) {
        if self.hosts.get(name).map(|host| &host.wish) == wish.as_ref() {
            return;
        }
        let mut open = Vec::new();
        if let Some(old) = self.hosts.remove(name) {
            let claim = old.claim(name);
            for family in 0..RANGES.len() {
                self.waiting[family].remove(&claim);
            }
            old.wish.said.iter().for_each(|ip| self.release(*ip, &claim, &mut open));
            old.proposed.into_iter().flatten().for_each(|ip| self.withdraw(ip, &mut open));
            touched.entries.insert(old.wish.entry);
        }
        touched.hosts.insert(name.clone());
        if let Some(wish) = wish {
            touched.entries.insert(wish.entry.clone());
            let host = Host { wish, proposed: [None; 2] };
            let claim = host.claim(name);
            host.wish.said.iter().for_each(|ip| self.claim(*ip, &claim, &mut open));
            self.hosts.insert(name.clone(), host);
            open.push(name.clone());
        }
        self.settle(open, touched);
    }

    /// An entry says these addresses itself now instead of those.
    pub(super) fn reserve(
        &mut self,
        entry: &ObjectName,
        old: Reserved<'_>,
        new: Reserved<'_>,
        touched: &mut Touched,
    ) {
        if old == new {
            return;
        }
        let mut open = Vec::new();
        old.addresses.iter().for_each(|ip| self.release(*ip, &old.claim(entry), &mut open));
        new.addresses.iter().for_each(|ip| self.claim(*ip, &new.claim(entry), &mut open));
        self.settle(open, touched);
    }

    /// The addresses that a host has.
    pub(super) fn in_force(&self, name: &ObjectName) -> impl Iterator<Item = IpAddr> {
        let said = self.hosts.get(name).map(|host| (host, &*host.wish.said));
        said.into_iter().flat_map(move |(host, said)| {
            let claim = host.claim(name);
            said.iter().copied().filter(move |ip| self.is_first(*ip, &claim))
        })
    }

    /// Those that it is to have besides.
    pub(super) fn proposed(&self, name: &ObjectName) -> impl Iterator<Item = IpAddr> {
        self.hosts.get(name).into_iter().flat_map(|host| host.proposed.into_iter().flatten())
    }

    /// Whether there is none for a host.
    pub(super) fn is_waiting(&self, name: &ObjectName) -> bool {
        let claim = self.hosts.get(name).map(|host| host.claim(name));
        claim.is_some_and(|claim| self.waiting.iter().any(|waiting| waiting.contains(&claim)))
    }

    /// Whether anybody waits.
    pub(super) fn is_exhausted(&self) -> bool {
        self.waiting.iter().any(|waiting| !waiting.is_empty())
    }

    fn is_first(&self, ip: IpAddr, claim: &Claim) -> bool {
        self.slots.get(&ip).is_some_and(|slot| slot.claims.first() == Some(claim))
    }

    fn claim(&mut self, ip: IpAddr, claim: &Claim, open: &mut Vec<ObjectName>) {
        let slot = self.slot(ip);
        let Err(at) = slot.claims.binary_search(claim) else { return };
        if at == 0 {
            // Who had it until now, or was to have it.
            open.extend(slot.claims.first().and_then(Claim::host));
        }
        slot.claims.insert(at, claim.clone());
        let displaced = slot.proposed.take();
        self.forget(ip, displaced, open);
    }

    fn release(&mut self, ip: IpAddr, claim: &Claim, open: &mut Vec<ObjectName>) {
        let Some(slot) = self.slots.get_mut(&ip) else { return };
        let Ok(at) = slot.claims.binary_search(claim) else { return };
        slot.claims.remove(at);
        if at == 0 {
            open.extend(slot.claims.first().and_then(Claim::host));
        }
        self.clear(ip, open);
    }

    /// Nobody is to have it.
    fn withdraw(&mut self, ip: IpAddr, open: &mut Vec<ObjectName>) {
        if let Some(slot) = self.slots.get_mut(&ip) {
            slot.proposed = None;
        }
        self.clear(ip, open);
    }

    /// Somebody else has it than whom it was proposed to.
    fn forget(&mut self, ip: IpAddr, displaced: Option<Claim>, open: &mut Vec<ObjectName>) {
        let Some(name) = displaced.and_then(|claim| claim.host()) else { return };
        if let Some(host) = self.hosts.get_mut(&name) {
            host.proposed.iter_mut().filter(|proposed| **proposed == Some(ip)).for_each(|one| *one = None);
        }
        open.push(name);
    }

    fn slot(&mut self, ip: IpAddr) -> &mut Slot {
        self.slots.entry(ip).or_insert_with(|| {
            let family = RANGES.iter().position(|range| range.contains(ip));
            family.into_iter().for_each(|family| self.taken[family] += 1);
            self.used.set(ip, true);
            Slot::default()
        })
    }

    /// One of those who wait may have it, if it is free.
    fn clear(&mut self, ip: IpAddr, open: &mut Vec<ObjectName>) {
        let is_free = |slot: &Slot| slot.claims.is_empty() && slot.proposed.is_none();
        if !self.slots.get(&ip).is_some_and(is_free) {
            return;
        }
        self.slots.remove(&ip);
        if let Some(family) = RANGES.iter().position(|range| range.contains(ip)) {
            self.taken[family] -= 1;
            self.used.set(ip, false);
            open.extend(self.waiting[family].pop_first().and_then(|claim| claim.host()));
        }
    }

    /// Finds addresses for those who may have lost one, and takes proposals back from those who have one.
    fn settle(&mut self, mut open: Vec<ObjectName>, touched: &mut Touched) {
        while let Some(name) = open.pop() {
            let Some(host) = self.hosts.get(&name) else { continue };
            let (claim, proposed) = (host.claim(&name), host.proposed);
            let has: Vec<IpAddr> = self.in_force(&name).collect();
            for (family, range) in RANGES.into_iter().enumerate() {
                let has_one = has.iter().any(|ip| ip.is_ipv4() == range.first.is_ipv4());
                match proposed[family] {
                    Some(ip) if has_one => {
                        self.propose(&name, family, None);
                        self.withdraw(ip, &mut open);
                    }
                    None if !has_one => self.find(&name, family, &claim, &mut open),
                    _ => {}
                }
            }
            touched.entries.insert(claim.entry);
            touched.hosts.insert(name);
        }
    }

    /// The first address of its preference that is free, or that a younger one was to have.
    fn find(&mut self, name: &ObjectName, family: usize, claim: &Claim, open: &mut Vec<ObjectName>) {
        let range = RANGES[family];
        self.waiting[family].remove(claim);
        if self.taken[family] >= range.capacity() {
            self.waiting[family].insert(claim.clone());
            return;
        }
        let may_have = |ip: &IpAddr| match self.slots.get(ip) {
            None => true,
            Some(slot) => slot.claims.is_empty() && slot.proposed.as_ref().is_none_or(|other| claim < other),
        };
        let is_free = |ip: &IpAddr| !self.slots.contains_key(ip);
        let mut preferred = range.preferred(name);
        let scattered = preferred.by_ref().take(SCATTERED as usize).find(may_have);
        let next = || match range.first {
            IpAddr::V4(_) => self.used.next_free(hash(name, 1)).map(|offset| range.at(offset)),
            IpAddr::V6(_) => preferred.find(is_free),
        };
        let Some(ip) = scattered.or_else(next) else { return };
        let displaced = self.slot(ip).proposed.replace(claim.clone());
        self.propose(name, family, Some(ip));
        self.forget(ip, displaced, open);
    }

    fn propose(&mut self, name: &ObjectName, family: usize, ip: Option<IpAddr>) {
        if let Some(host) = self.hosts.get_mut(name) {
            host.proposed[family] = ip;
        }
    }
}

#[cfg(test)]
mod tests;
