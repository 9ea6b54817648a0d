//! Which pods are to be served, which proxies there are, and what each has to be told next.
//!
//! Every proxy is brought from what it has to what it should have, one message at a time; there are no queues. The
//! newest connection is the one that takes new pods: during an upgrade of ztunnel there are two, and the older one
//! only finishes, as does one that says that it drains, once there is another. **Invariant:** no I/O, no clock; at most
//! one message to each proxy without an Ack.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::pod_protocol;
use mesh_core::proto::pods as proto;

use super::greeting::Greeted;
use super::served::Served;

/// One connection; a later one has a greater number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LinkId(pub(super) u64);

/// The state of all pods and connections.
#[derive(Debug)]
pub(super) struct State {
    pods: BTreeMap<String, Entry>,
    links: BTreeMap<LinkId, Link>,
    /// Pods that only a proxy knows are taken over: true until the agent has found out which pods there are.
    adopting: bool,
    generations: u64,
    ids: u64,
}

#[derive(Debug)]
struct Entry {
    served: Arc<Served>,
    /// Changes when the sockets do.
    generation: u64,
    /// Taken over from a proxy, not claimed yet by the agent.
    adopted: bool,
}

#[derive(Debug, Default)]
struct Link {
    version: u32,
    /// By UID, the generation that the proxy serves.
    has: BTreeMap<String, u64>,
    /// Reported by the proxy, which serves them until the end of the snapshot at least.
    held: BTreeSet<String>,
    /// Those of them that have the sockets that we want, not confirmed to it yet.
    keep: BTreeSet<String>,
    failed: BTreeMap<String, Failure>,
    snapshot_sent: bool,
    draining: bool,
    /// It knows that another one takes its place.
    superseded: bool,
    awaited: Option<Awaited>,
    sequence: u64,
}

#[derive(Debug)]
struct Failure {
    generation: u64,
    error: String,
    retry: Instant,
}

#[derive(Debug)]
struct Awaited {
    sequence: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    Served(String, u64),
    Removed(String),
    Snapshot,
    Superseded,
}

/// What to do for a connection.
#[derive(Debug)]
pub(super) enum Next {
    /// Send this; an Ack with its sequence number has to come.
    Add(u64, Arc<Served>),
    /// See `KeepPod`.
    Keep(u64, Arc<Served>),
    /// See `RemovePod`.
    Remove(u64, String),
    /// See `SnapshotEnd`.
    SnapshotEnd(u64),
    /// See `Superseded`.
    Superseded(u64),
    /// Nothing before a change, or this time.
    Wait(Option<Instant>),
}

impl Next {
    /// Of what is to be sent.
    pub(super) fn sequence(&self) -> Option<u64> {
        match self {
            Self::Add(sequence, _)
            | Self::Keep(sequence, _)
            | Self::Remove(sequence, _)
            | Self::SnapshotEnd(sequence)
            | Self::Superseded(sequence) => Some(*sequence),
            Self::Wait(_) => None,
        }
    }
}

/// How far a pod has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The newest proxy serves it.
    Served,
    /// The newest proxy refused it.
    Failed(String),
    /// Not yet; whether there is a proxy at all.
    Pending { connected: bool },
}

/// An answer that fits no question; the connection is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadAck {
    #[error("an Ack of message {0} came, which is not the one that was sent last")]
    Sequence(u64),
    #[error("the end of the snapshot was refused: {0}")]
    Snapshot(String),
}

impl State {
    pub(super) fn new() -> Self {
        Self { pods: BTreeMap::new(), links: BTreeMap::new(), adopting: true, generations: 0, ids: 0 }
    }

    /// Sets a pod. Sockets that it has already stay as they are in the proxies.
    pub(super) fn put(&mut self, served: Arc<Served>) {
        let uid = served.pod().uid.clone();
        match self.pods.get_mut(&uid) {
            Some(entry) if entry.served.same_sockets(&served) => {
                *entry = Entry { served, generation: entry.generation, adopted: false };
            }
            _ => self.insert(uid, served, false),
        }
    }

    /// Takes a pod out.
    pub(super) fn remove(&mut self, uid: &str) {
        self.pods.remove(uid);
    }

    /// A pod, also when only a proxy has reported it.
    pub(super) fn find(&self, uid: &str) -> Option<&Arc<Served>> {
        self.pods.get(uid).map(|entry| &entry.served)
    }

    /// All pods that are to be served.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Served>> {
        self.pods.values().map(|entry| &entry.served)
    }

    /// From now on the agent knows all pods: what was taken over and not claimed goes.
    pub(super) fn settle(&mut self) -> Vec<String> {
        self.adopting = false;
        let unclaimed: Vec<_> =
            self.pods.iter().filter(|(_, entry)| entry.adopted).map(|(uid, _)| uid.clone()).collect();
        self.pods.retain(|_, entry| !entry.adopted);
        unclaimed
    }

    /// A proxy connected and told what it holds.
    pub(super) fn join(&mut self, greeted: Greeted) -> LinkId {
        let Greeted { version, held, draining } = greeted;
        let mut link = Link { version, draining, ..Link::default() };
        for held in held {
            let uid = held.pod().uid.clone();
            let wanted = match self.pods.get(&uid) {
                Some(entry) => entry.served.same_sockets(&held),
                None if self.adopting => {
                    self.insert(uid.clone(), Arc::new(held), true);
                    true
                }
                None => false,
            };
            if wanted {
                link.keep.insert(uid.clone());
            }
            link.held.insert(uid);
        }
        self.ids += 1;
        let id = LinkId(self.ids);
        self.links.insert(id, link);
        id
    }

    /// A proxy has been told to end.
    pub(super) fn drains(&mut self, id: LinkId) {
        if let Some(link) = self.links.get_mut(&id) {
            link.draining = true;
        }
    }

    /// A connection ended.
    pub(super) fn part(&mut self, id: LinkId) {
        self.links.remove(&id);
    }

    /// Whether a proxy that takes pods has told what it holds.
    pub(super) fn is_connected(&self) -> bool {
        self.newest().is_some()
    }

    /// The one that takes new pods; without another one that is to end serves on.
    fn newest(&self) -> Option<(LinkId, &Link)> {
        let links = || self.links.iter().rev().map(|(id, link)| (*id, link));
        links().find(|(_, link)| !link.draining).or_else(|| links().find(|(_, link)| link.awaits_successor()))
    }

    /// Whether there is a proxy that stays and serves every pod; one that it cannot serve nobody waits for.
    fn has_successor(&self) -> bool {
        self.newest().is_some_and(|(_, newest)| {
            let served = |uid: &String, generation: u64| {
                let failed = newest.failed.get(uid).is_some_and(|failure| failure.generation == generation);
                newest.has.get(uid) == Some(&generation) || failed
            };
            let mut pods = self.pods.iter();
            !newest.draining && newest.snapshot_sent && pods.all(|(uid, entry)| served(uid, entry.generation))
        })
    }

    /// What to do for a connection now.
    pub(super) fn next(&mut self, id: LinkId, now: Instant) -> Next {
        let newest = self.newest().is_some_and(|(newest, _)| newest == id);
        let has_successor = self.has_successor();
        let Self { pods, links, .. } = self;
        let Some(link) = links.get_mut(&id).filter(|link| link.awaited.is_none()) else {
            return Next::Wait(None);
        };
        if let Some(uid) = link.has.keys().find(|uid| link.snapshot_sent && !pods.contains_key(*uid)) {
            let uid = uid.clone();
            return Next::Remove(link.await_ack(What::Removed(uid.clone())), uid);
        }
        while let Some(uid) = link.keep.pop_first() {
            if let Some(entry) = pods.get(&uid) {
                let sequence = link.await_ack(What::Served(uid, entry.generation));
                return Next::Keep(sequence, Arc::clone(&entry.served));
            }
        }
        let lacking = pods.iter().find(|(uid, entry)| newest && link.lacks(uid, entry.generation, now));
        if let Some((uid, entry)) = lacking {
            let sequence = link.await_ack(What::Served(uid.clone(), entry.generation));
            return Next::Add(sequence, Arc::clone(&entry.served));
        }
        if !link.snapshot_sent {
            return Next::SnapshotEnd(link.await_ack(What::Snapshot));
        }
        if has_successor && link.awaits_successor() {
            return Next::Superseded(link.await_ack(What::Superseded));
        }
        Next::Wait(
            link.failed.values().map(|failure| failure.retry).filter(|retry| newest && *retry > now).min(),
        )
    }

    /// An Ack came; an empty error says done. Tells which pod the proxy could not serve.
    pub(super) fn acked(
        &mut self,
        id: LinkId,
        ack: proto::Ack,
        now: Instant,
    ) -> Result<Option<(String, String)>, BadAck> {
        let Some(link) = self.links.get_mut(&id) else { return Ok(None) };
        let Some(awaited) = link.awaited.take_if(|awaited| awaited.sequence == ack.sequence) else {
            return Err(BadAck::Sequence(ack.sequence));
        };
        match (awaited.what, ack.error.is_empty()) {
            (What::Served(uid, generation), true) => {
                link.failed.remove(&uid);
                link.has.insert(uid, generation);
            }
            (What::Served(uid, generation), false) => {
                link.has.remove(&uid);
                let failure = Failure { generation, error: ack.error.clone(), retry: now + RETRY };
                link.failed.insert(uid.clone(), failure);
                return Ok(Some((uid, ack.error)));
            }
            (What::Removed(uid), done) => {
                link.has.remove(&uid);
                link.failed.remove(&uid);
                return Ok((!done).then_some((uid, ack.error)));
            }
            (What::Snapshot, true) => {
                link.snapshot_sent = true;
                link.held.clear();
            }
            (What::Superseded, _) => link.superseded = true,
            (What::Snapshot, false) => return Err(BadAck::Snapshot(ack.error)),
        }
        Ok(None)
    }

    /// How far a pod has come with the newest proxy.
    pub(super) fn progress(&self, uid: &str) -> Progress {
        let link = self.newest().map(|(_, link)| link);
        let generation = self.pods.get(uid).map(|entry| entry.generation);
        let Some((link, generation)) = link.zip(generation) else {
            return Progress::Pending { connected: link.is_some() };
        };
        if link.has.get(uid) == Some(&generation) {
            return Progress::Served;
        }
        match link.failed.get(uid).filter(|failure| failure.generation == generation) {
            Some(failure) => Progress::Failed(failure.error.clone()),
            None => Progress::Pending { connected: true },
        }
    }

    /// Whether no proxy has the pod any more, or is just being told of it.
    pub(super) fn is_gone(&self, uid: &str) -> bool {
        let told = |awaited: &Awaited| match &awaited.what {
            What::Served(told, _) | What::Removed(told) => told == uid,
            What::Snapshot | What::Superseded => false,
        };
        self.links.values().all(|link| {
            let serves = link.has.contains_key(uid) || link.held.contains(uid);
            !serves && !link.awaited.as_ref().is_some_and(told)
        })
    }

    /// Pods, and connections.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.pods.len(), self.links.len())
    }

    fn insert(&mut self, uid: String, served: Arc<Served>, adopted: bool) {
        self.generations += 1;
        self.pods.insert(uid, Entry { served, generation: self.generations, adopted });
    }
}

impl Link {
    fn await_ack(&mut self, what: What) -> u64 {
        self.sequence += 1;
        self.awaited = Some(Awaited { sequence: self.sequence, what });
        self.sequence
    }

    /// Whether it is to end and serves until it hears of another.
    fn awaits_successor(&self) -> bool {
        self.draining && !self.superseded && self.version >= pod_protocol::SUCCESSORS
    }

    fn lacks(&self, uid: &str, generation: u64, now: Instant) -> bool {
        let waits = |failure: &Failure| failure.generation == generation && failure.retry > now;
        self.has.get(uid) != Some(&generation) && !self.failed.get(uid).is_some_and(waits)
    }
}

/// A pod that a proxy refused is offered to it again after this.
pub(super) const RETRY: Duration = Duration::from_secs(5);
