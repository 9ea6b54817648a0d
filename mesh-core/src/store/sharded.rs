//! A hash map in shards, each a snapshot that readers load without waiting.
//!
//! **Invariant:** one writer per map; a commit replaces changed shards only, each at once.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

use arc_swap::ArcSwapOption;

/// At 100,000 entries a changed shard is a copy of about 100 of them.
const SHARDS: usize = 1024;

/// The readers' side.
#[derive(Debug)]
pub(super) struct Shards<K, V> {
    shards: Box<[ArcSwapOption<HashMap<K, V>>]>,
    hasher: RandomState,
}

/// None: empty.
type Shard<K, V> = Option<Arc<HashMap<K, V>>>;

/// The writer's side: what will be visible at the next commit.
#[derive(Debug)]
pub(super) struct ShardsWriter<K, V> {
    shards: Box<[Shard<K, V>]>,
    hasher: RandomState,
    dirty: Vec<usize>,
    len: usize,
}

impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| ArcSwapOption::const_empty()).collect(),
            hasher: RandomState::new(),
        }
    }
}

impl<K: Hash + Eq, V: Clone> Shards<K, V> {
    pub(super) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.shards[shard(&self.hasher, key)].load().as_ref()?.get(key).cloned()
    }

    /// Every value, shard by shard: not one moment's state.
    pub(super) fn values(&self) -> Vec<V> {
        self.shards
            .iter()
            .filter_map(|shard| shard.load_full())
            .flat_map(|shard| shard.values().cloned().collect::<Vec<_>>())
            .collect()
    }
}

#[cfg(test)]
impl<K, V> Shards<K, V> {
    /// Where each shard's snapshot is, to see which ones a commit replaced.
    pub(super) fn snapshots(&self) -> Vec<Option<usize>> {
        self.shards.iter().map(|shard| shard.load().as_ref().map(|map| Arc::as_ptr(map).addr())).collect()
    }
}

impl<K: Hash + Eq + Clone, V: Clone> ShardsWriter<K, V> {
    pub(super) fn new(readers: &Shards<K, V>) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| None).collect(),
            hasher: readers.hasher.clone(),
            dirty: Vec::new(),
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.shards[shard(&self.hasher, key)].as_ref()?.get(key).cloned()
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        let shard = shard(&self.hasher, &key);
        if self.edit(shard).insert(key, value).is_none() {
            self.len += 1;
        }
    }

    pub(super) fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let shard = shard(&self.hasher, key);
        let removed = self.edit(shard).remove(key);
        self.len -= usize::from(removed.is_some());
        removed
    }

    /// Replaces what is at `key` by what `change` makes of it; None removes it.
    pub(super) fn update(&mut self, key: &K, change: impl FnOnce(Option<&V>) -> Option<V>) {
        match change(self.get(key).as_ref()) {
            Some(value) => self.insert(key.clone(), value),
            None => drop(self.remove(key)),
        }
    }

    pub(super) fn commit(&mut self, readers: &Shards<K, V>) {
        for shard in self.dirty.drain(..) {
            let slot = &mut self.shards[shard];
            if slot.as_ref().is_some_and(|map| map.is_empty()) {
                *slot = None;
            }
            readers.shards[shard].store(slot.clone());
        }
    }

    /// The shard to change. It is copied once after each commit (readers may still hold the published one), so a
    /// batch costs as much as it changes.
    fn edit(&mut self, shard: usize) -> &mut HashMap<K, V> {
        if self.dirty.last() != Some(&shard) {
            self.dirty.push(shard);
        }
        Arc::make_mut(self.shards[shard].get_or_insert_default())
    }
}

fn shard<Q: Hash + ?Sized>(hasher: &RandomState, key: &Q) -> usize {
    // The low bits are the maps' own; the high ones choose the shard.
    (hasher.hash_one(key) >> 48) as usize % SHARDS
}
