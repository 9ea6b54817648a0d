//! Which pods should be in the mesh, which are, and what to do about the difference.
//!
//! A table of pods by UID, stepped by facts (the model's pods, results of steps) and asked for the steps that are due.
//! A pod has at most one step under way, so steps of one pod are in order. **Invariant:** no I/O, the clock is an
//! argument; HBONE is advertised only while a pod is captured: annotated after capture, withdrawn before release; a pod
//! that the model no longer has is released only when no process of it is left.

mod due;
mod proof;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::datapath::Part;
use crate::index::event::ObjectName;
use crate::index::local::LocalPod;
use crate::index::membership::Membership;
use crate::index::pod::{Condition, Reported};
use due::Due;
pub use proof::Captures;
use proof::Proved;

/// One thing to do for one pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Capture a running pod, or take over what an earlier agent captured.
    Enrol(Box<LocalPod>),
    /// Say on the pod that it is captured (true), or no longer will be (false).
    Annotate(ObjectName, bool),
    /// Give the pod back to itself.
    Release,
    /// Forget the pod if no process of it is left; the model alone cannot tell, being behind or told a lie
    /// (`kubectl delete --force` removes the object of a pod that runs on).
    Sweep,
    /// Put back these parts of its capture, which were found wrong.
    Repair(BTreeSet<Part>),
    /// Say in the pod's status why it is not in the mesh, or whether its capture is whole; or remove what was said.
    Report(ObjectName, Condition, Option<Reported>),
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// To be tried again later.
    Failed {
        /// Why, for people.
        error: String,
        /// Nothing wrong, only too early: not worth telling.
        early: bool,
    },
}

/// Where an enrolled pod is in its life here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Captured by an earlier agent; this one does not have its sockets yet.
    Survived,
    /// Captured and served.
    Enrolled,
    /// The annotation is withdrawn; everyone is told since then, once the model has seen it.
    Leaving(Option<Instant>),
}

#[derive(Debug)]
struct Enrolled {
    stage: Stage,
    /// CNI_CONTAINERID, where the enrolment came by CNI.
    container: Option<String>,
    /// The model has known the pod: its absence means that it is probably gone.
    seen: bool,
    /// The model has called it a member: that it does not means that it is none any more.
    confirmed: bool,
    since: Instant,
    /// Known from the CNI request or the model.
    name: Option<ObjectName>,
    /// Whether its DNS queries were to be captured when it was enrolled, where that is known.
    dns: Option<bool>,
}

/// What was tried for a pod and what was said about it.
#[derive(Debug, Default)]
struct Note {
    attempts: u32,
    /// Since when it is too early to enrol the pod.
    early: Option<Instant>,
    error: Option<String>,
    retry: Option<Instant>,
    /// The last successful patches: the model shows them a little later.
    annotated: Option<(bool, Instant)>,
    reported: BTreeMap<Condition, (Option<String>, Instant)>,
}

/// All pods of this node that matter.
#[derive(Debug, Default)]
pub struct Table {
    desired: BTreeMap<String, LocalPod>,
    enrolled: BTreeMap<String, Enrolled>,
    notes: BTreeMap<String, Note>,
    /// What there is to say of others' eBPF programs that enrolled pods meet, by UID.
    foreign: BTreeMap<String, String>,
    /// How enrolled pods' capture was found, by UID.
    proofs: BTreeMap<String, Proved>,
    repairs: BTreeMap<Part, u64>,
    busy: BTreeSet<String>,
    /// The model is complete, so that an absent pod is a gone one.
    complete: bool,
    /// From the model's seeing a withdrawn annotation until release: by then other nodes have seen it, too.
    grace: Duration,
}

/// What is due.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Steps to begin, by UID.
    pub steps: Vec<(String, Step)>,
    /// When to ask again if nothing happens before.
    pub wake: Option<Instant>,
}

impl Table {
    /// No pods; `grace` is how long those that leave stay captured after the model has shown that they are to.
    pub fn new(grace: Duration) -> Self {
        Self { grace, ..Self::default() }
    }

    /// The pods that are captured as this agent starts.
    pub fn survived(&mut self, uids: impl IntoIterator<Item = String>, now: Instant) {
        for uid in uids {
            let survivor = Enrolled {
                stage: Stage::Survived,
                container: None,
                seen: true,
                confirmed: true,
                since: now,
                name: None,
                dns: None,
            };
            self.enrolled.insert(uid, survivor);
        }
    }

    /// The pods of this node as the model has them; complete once everything was listed.
    pub fn observe(&mut self, pods: Vec<LocalPod>, complete: bool, now: Instant) {
        self.complete |= complete;
        self.desired = pods.into_iter().map(|pod| (pod.uid.clone(), pod)).collect();
        for (uid, enrolled) in &mut self.enrolled {
            let Some(pod) = self.desired.get(uid) else { continue };
            enrolled.seen = true;
            enrolled.confirmed |= pod.membership == Membership::Member;
            enrolled.name = Some(pod.name.clone());
            enrolled.stage = match enrolled.stage {
                Stage::Leaving(_) if pod.membership == Membership::Member => Stage::Enrolled,
                Stage::Leaving(None) if !pod.annotated => Stage::Leaving(Some(now)),
                stage => stage,
            };
        }
        let Self { desired, enrolled, notes, .. } = self;
        notes.retain(|uid, _| desired.contains_key(uid) || enrolled.contains_key(uid));
    }

    /// The steps that are due now.
    pub fn plan(&self, now: Instant) -> Plan {
        let mut plan = Plan::default();
        if !self.complete {
            return plan;
        }
        let uids: BTreeSet<&String> = self.desired.keys().chain(self.enrolled.keys()).collect();
        for uid in uids.into_iter().filter(|uid| !self.busy.contains(*uid)) {
            let due = match self.notes.get(uid).and_then(|note| note.retry) {
                Some(retry) if retry > now => Due::At(retry),
                _ => self.due(uid, now),
            };
            match due {
                Due::Now(step) => plan.steps.push((uid.clone(), step)),
                Due::At(time) => plan.wake = Some(plan.wake.map_or(time, |wake| wake.min(time))),
                Due::Nothing => {}
            }
        }
        plan
    }

    /// A step begins: the pod has no other until `finish`. False when one is under way already.
    pub fn begin(&mut self, uid: &str) -> bool {
        self.disturb_proof(uid);
        self.busy.insert(uid.to_owned())
    }

    /// A step of `plan` ended.
    pub fn finish(&mut self, uid: &str, step: &Step, outcome: Outcome, now: Instant) {
        self.busy.remove(uid);
        if matches!(step, Step::Repair(_)) {
            return self.repaired(uid, outcome, now);
        }
        let note = self.notes.entry(uid.to_owned()).or_default();
        match outcome {
            Outcome::Failed { error, early } => {
                // What should have come long ago is missing.
                let mut patient =
                    || matches!(step, Step::Sweep) || now < *note.early.get_or_insert(now) + PATIENCE;
                let early = early && patient();
                note.attempts = if early { 0 } else { note.attempts.saturating_add(1) };
                note.retry = Some(now + if early { EARLY } else { backoff(note.attempts) });
                note.error = (!early).then_some(error);
                return;
            }
            // Telling of a failure does not end it.
            Outcome::Done if matches!(step, Step::Report(..)) => {}
            Outcome::Done => {
                note.attempts = 0;
                note.early = None;
                note.retry = None;
            }
        }
        match step {
            Step::Enrol(pod) => {
                self.enrolled(uid, Some(pod.name.clone()), None, now);
                if let Some(enrolled) = self.enrolled.get_mut(uid) {
                    // The step came of the model, which may have changed meanwhile.
                    enrolled.seen = true;
                    enrolled.confirmed = true;
                    enrolled.dns = Some(pod.dns);
                }
            }
            Step::Annotate(_, captured) => {
                note.annotated = Some((*captured, now));
                if let Some(enrolled) = self.enrolled.get_mut(uid).filter(|_| !captured) {
                    // The model may have seen it before this agent began.
                    let annotated = self.desired.get(uid).is_some_and(|pod| pod.annotated);
                    enrolled.stage = Stage::Leaving((!annotated).then_some(now));
                }
            }
            Step::Release | Step::Sweep => self.released(uid),
            Step::Report(_, condition, reported) => {
                note.reported.insert(*condition, (reported.as_ref().map(Reported::gist), now));
            }
            Step::Repair(_) => {}
        }
    }

    /// A pod was enrolled with its DNS queries captured, or without.
    pub fn enrolled_with(&mut self, uid: &str, dns: bool) {
        if let Some(enrolled) = self.enrolled.get_mut(uid) {
            enrolled.dns = Some(dns);
        }
    }

    /// A pod is captured and served now; by CNI, of this container, else of the one that it was.
    pub fn enrolled(&mut self, uid: &str, name: Option<ObjectName>, container: Option<String>, now: Instant) {
        let seen = self.desired.contains_key(uid);
        let container = container.or_else(|| self.enrolled.get(uid)?.container.clone());
        let enrolled = Enrolled {
            stage: Stage::Enrolled,
            container,
            seen,
            confirmed: false,
            since: now,
            name,
            dns: None,
        };
        self.enrolled.insert(uid.to_owned(), enrolled);
        self.proofs.remove(uid);
        if let Some(note) = self.notes.get_mut(uid) {
            note.error = None;
            note.early = None;
            note.retry = None;
            note.annotated = None;
        }
    }

    /// A pod is captured no more.
    pub fn released(&mut self, uid: &str) {
        self.enrolled.remove(uid);
        self.proofs.remove(uid);
        if !self.desired.contains_key(uid) {
            self.notes.remove(uid);
        }
    }

    /// A pod was released because the runtime takes its sandbox down. Its processes may be there a little longer, and
    /// the model may not know: it is not to be enrolled again as if it were running.
    pub fn deleted(&mut self, uid: &str, now: Instant) {
        self.released(uid);
        if let Some(note) =
            self.desired.contains_key(uid).then(|| self.notes.entry(uid.to_owned()).or_default())
        {
            note.retry = Some(now + AFTER_DEL);
        }
    }

    /// Others' eBPF programs that captured pods meet, by UID, as last looked for. What is news of them, by pod, an empty
    /// text where there is nothing any more.
    pub fn meet(&mut self, foreign: BTreeMap<String, String>) -> Vec<(String, String)> {
        let old = std::mem::replace(&mut self.foreign, foreign);
        let gone = old.keys().filter(|uid| !self.foreign.contains_key(*uid)).map(|uid| (uid, ""));
        let now = self.foreign.iter().filter(|(uid, text)| old.get(*uid) != Some(*text));
        let now = now.map(|(uid, text)| (uid, text.as_str()));
        gone.chain(now).map(|(uid, text)| (uid.clone(), text.to_owned())).collect()
    }

    /// Whether a step of the pod is under way.
    pub fn is_busy(&self, uid: &str) -> bool {
        self.busy.contains(uid)
    }

    /// A step outside of `plan` ended without changing anything.
    pub fn idle(&mut self, uid: &str) {
        self.busy.remove(uid);
    }

    /// Whether the pod is captured, as far as is known.
    pub fn is_enrolled(&self, uid: &str) -> bool {
        self.enrolled.contains_key(uid)
    }

    /// The enrolled pod that a CNI DEL is about: by UID or name, unless it was enrolled for another container since;
    /// whether that is certain, since after a restart the containers are not known.
    pub fn attached(&self, uid: Option<&str>, name: &ObjectName, container: &str) -> Option<(String, bool)> {
        let found = self.enrolled.iter().find(|(known, enrolled)| match uid {
            Some(uid) => *known == uid,
            None => enrolled.name.as_ref() == Some(name),
        });
        let (uid, enrolled) = found?;
        match &enrolled.container {
            Some(known) => (known == container).then(|| (uid.clone(), true)),
            None => Some((uid.clone(), false)),
        }
    }

    /// The pods whose container is not among these.
    pub fn detached(&self, containers: &BTreeSet<String>) -> Vec<String> {
        let gone = |enrolled: &Enrolled| {
            enrolled.container.as_ref().is_some_and(|known| !containers.contains(known))
        };
        self.enrolled.iter().filter(|(_, enrolled)| gone(enrolled)).map(|(uid, _)| uid.clone()).collect()
    }

    /// The runtime says that the pod's container is gone: it is swept with the next plan.
    pub fn detach(&mut self, uid: &str) {
        self.desired.remove(uid);
        if let Some(enrolled) = self.enrolled.get_mut(uid) {
            enrolled.seen = true;
        }
    }

    /// Whether no pod is enrolled.
    pub fn is_empty(&self) -> bool {
        self.enrolled.is_empty()
    }

    /// Whether what an earlier agent left is taken over or released, as far as that is possible now.
    pub fn is_settled(&self) -> bool {
        self.complete
            && self.busy.is_empty()
            && self.enrolled.values().all(|pod| pod.stage != Stage::Survived)
    }

    /// How many pods are enrolled, for how many the last step failed, and how many meet others' programs.
    pub fn counts(&self) -> (usize, usize, usize) {
        let failing = self.notes.values().filter(|note| note.error.is_some()).count();
        (self.enrolled.len(), failing, self.foreign.len())
    }
}

fn backoff(attempts: u32) -> Duration {
    Duration::from_secs(1 << attempts.saturating_sub(1).min(5)).min(RETRY_MAX)
}

/// The longest pause between attempts.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// The pause where the pod is not ready to be enrolled.
const EARLY: Duration = Duration::from_secs(1);
/// How long a pod that has an address may be without a process before that counts as a failure.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a pod is left alone after CNI DEL, unless CNI ADD comes.
const AFTER_DEL: Duration = Duration::from_secs(10);
