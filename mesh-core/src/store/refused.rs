//! Resources that were refused: what is left of them is a stone on each address that they lay claim to.
//!
//! Without it an address of the mesh would look like one outside of it, and be dialled in the clear. **Invariant:** a
//! stone is only met where nothing good is known, so a bad resource never takes another one's address.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::sharded::{Shards, ShardsWriter};
use super::{ServiceName, Writer};
use crate::service::Vip;

/// A resource that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Its name in xDS.
    pub name: Arc<str>,
    /// What is wrong with it.
    pub reason: Arc<str>,
}

/// What a refused resource lays claim to, as far as it can be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claims {
    /// Addresses that may not be reached.
    pub addresses: Vec<Vip>,
    /// There is, or may be, an address that cannot be read.
    pub unreadable: bool,
}

type Stones = Arc<[Arc<Refused>]>;

/// The readers' side.
#[derive(Debug, Default)]
pub(super) struct Published {
    by_vip: Shards<Vip, Stones>,
    by_name: Shards<Arc<str>, Arc<Refused>>,
    count: AtomicUsize,
    unreadable: AtomicUsize,
}

impl Published {
    /// The first one that claims exactly this.
    pub(super) fn at(&self, vip: &Vip) -> Option<Arc<Refused>> {
        self.by_vip.get(vip)?.first().cloned()
    }

    pub(super) fn named(&self, name: &str) -> Option<Arc<Refused>> {
        self.by_name.get(name)
    }

    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub(super) fn unreadable(&self) -> usize {
        self.unreadable.load(Ordering::Relaxed)
    }
}

/// The writer's side.
#[derive(Debug)]
pub(super) struct Book {
    by_vip: ShardsWriter<Vip, Stones>,
    by_name: ShardsWriter<Arc<str>, Arc<Refused>>,
    claims: HashMap<Arc<str>, Claims>,
}

impl Book {
    pub(super) fn new(published: &Published) -> Self {
        Self {
            by_vip: ShardsWriter::new(&published.by_vip),
            by_name: ShardsWriter::new(&published.by_name),
            claims: HashMap::new(),
        }
    }

    pub(super) fn commit(&mut self, published: &Published) {
        self.by_vip.commit(&published.by_vip);
        self.by_name.commit(&published.by_name);
        let unreadable = self.claims.values().filter(|claims| claims.unreadable).count();
        published.count.store(self.claims.len(), Ordering::Relaxed);
        published.unreadable.store(unreadable, Ordering::Relaxed);
    }

    fn add(&mut self, refused: Refused, claims: Claims) {
        let refused = Arc::new(refused);
        for vip in &claims.addresses {
            self.by_vip.update(vip, |stones| {
                Some(stones.iter().flat_map(|stones| stones.iter()).chain([&refused]).cloned().collect())
            });
        }
        self.by_name.insert(refused.name.clone(), refused.clone());
        self.claims.insert(refused.name.clone(), claims);
    }

    fn remove(&mut self, name: &str) {
        let Some(claims) = self.claims.remove(name) else { return };
        self.by_name.remove(name);
        for vip in &claims.addresses {
            self.by_vip.update(vip, |stones| {
                let rest: Stones = stones?.iter().filter(|other| *other.name != *name).cloned().collect();
                (!rest.is_empty()).then_some(rest)
            });
        }
    }
}

impl Writer {
    /// Notes that the workload or service of that name was refused: what it claims is not reached, except where
    /// something good is found. An earlier good form of it stays in force; returns whether there is one.
    pub fn refuse(&mut self, name: &str, reason: &str, mut claims: Claims) -> bool {
        self.absolve(name);
        self.changes.workloads.push(name.into());
        let earlier = self.is_known(name);
        // Whoever dials an address that cannot be read finds the earlier form.
        claims.unreadable &= !earlier;
        for vip in &claims.addresses {
            if let Vip::Prefix(_, prefix) = vip {
                self.note_prefix_length(prefix.prefix_len());
            }
        }
        self.refused.add(Refused { name: name.into(), reason: reason.into() }, claims);
        earlier
    }

    /// Forgets that a workload or service was refused: a good form of it has come, or it is gone.
    pub fn absolve(&mut self, name: &str) {
        self.refused.remove(name);
    }

    /// Whether a good workload or service of that name is known.
    fn is_known(&self, name: &str) -> bool {
        self.by_uid.get(name).is_some()
            || name.split_once('/').is_some_and(|(namespace, hostname)| {
                let key = ServiceName { namespace: namespace.into(), hostname: hostname.into() };
                self.services.contains_key(&key)
            })
    }
}
