//! Which pods' capture is to be proved when, what was found, and what follows of it: a repair, and what to say.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::due::Due;
use super::{Outcome, Stage, Step, Table, backoff};
use crate::datapath::{Flaw, Part};
use crate::index::pod::Reported;

/// What is known of one pod's capture.
#[derive(Debug, Default)]
pub(super) struct Proved {
    /// As last found; none before the first proof.
    flaws: Option<Vec<Flaw>>,
    /// When to prove it next; none: at once.
    next: Option<Instant>,
    under_way: bool,
    /// Proofs in a row that came to nothing certain.
    doubts: u32,
    /// Repairs since all was well, and when there may be another one.
    repairs: u32,
    retry: Option<Instant>,
    /// One has been made since the last proof.
    repaired: bool,
    /// Why the last one failed.
    error: Option<String>,
}

/// How pods are captured; for metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captures {
    /// Pods that were found as they have to be.
    pub whole: usize,
    /// Pods of which a part was not, by part.
    pub flawed: BTreeMap<Part, usize>,
    /// Parts that were put back since the agent's start.
    pub repairs: BTreeMap<Part, u64>,
}

impl Table {
    /// The pods whose capture is to be proved now, which counts as begun, and when to ask again.
    pub fn to_prove(&mut self, now: Instant) -> (BTreeSet<String>, Option<Instant>) {
        let Self { enrolled, busy, proofs, .. } = self;
        proofs.retain(|uid, _| enrolled.contains_key(uid));
        let (mut due, mut wake) = (BTreeSet::new(), None::<Instant>);
        for (uid, _) in enrolled.iter().filter(|(_, pod)| pod.stage == Stage::Enrolled) {
            let proved = proofs.entry(uid.clone()).or_default();
            match proved.next {
                // Its end comes here again.
                _ if proved.under_way || busy.contains(uid) => {}
                Some(next) if next > now => wake = Some(wake.map_or(next, |wake| wake.min(next))),
                _ => {
                    proved.under_way = true;
                    due.insert(uid.clone());
                }
            }
        }
        (due, wake)
    }

    /// A proof has ended; none: it came to nothing. The parts that it found wrong and that were not before, in words, and
    /// an empty text where all is well again: news for the log.
    pub fn proved(&mut self, uid: &str, found: Option<Vec<Flaw>>, now: Instant) -> Option<String> {
        // Else a step began meanwhile: it was about something else.
        let proved = self.proofs.get_mut(uid).filter(|proved| proved.under_way)?;
        proved.under_way = false;
        proved.next = Some(now + PERIOD);
        let found = found?;
        if !found.is_empty() && !found.iter().any(|flaw| flaw.certain) && proved.doubts < DOUBTS {
            proved.doubts += 1;
            proved.next = Some(now + SOON);
            return None;
        }
        let old = proved.flaws.replace(found).unwrap_or_default();
        let now_flawed: BTreeSet<Part> = proved.flaws.iter().flatten().map(|flaw| flaw.part).collect();
        let old_flawed: BTreeSet<Part> = old.iter().map(|flaw| flaw.part).collect();
        if std::mem::take(&mut proved.repaired) {
            for part in old_flawed.difference(&now_flawed).filter(|part| part.repairable()) {
                *self.repairs.entry(*part).or_default() += 1;
            }
        }
        if now_flawed.is_empty() {
            (proved.doubts, proved.repairs, proved.retry, proved.error) = (0, 0, None, None);
        }
        (old_flawed != now_flawed).then(|| details(proved.flaws.iter().flatten()))
    }

    /// A step of the pod begins: what is being proved now is not what is there afterwards.
    pub(super) fn disturb_proof(&mut self, uid: &str) {
        if let Some(proved) = self.proofs.get_mut(uid).filter(|proved| proved.under_way) {
            (proved.under_way, proved.next) = (false, None);
        }
    }

    /// A repair ended.
    pub(super) fn repaired(&mut self, uid: &str, outcome: Outcome, now: Instant) {
        let Some(proved) = self.proofs.get_mut(uid) else { return };
        proved.repairs = proved.repairs.saturating_add(1);
        proved.retry = Some(now + backoff(proved.repairs));
        (proved.next, proved.repaired) = (None, outcome == Outcome::Done);
        proved.error = match outcome {
            Outcome::Done => None,
            Outcome::Failed { error, .. } => Some(error),
        };
    }

    /// The repair that is due.
    pub(super) fn repair(&self, uid: &str, now: Instant) -> Due {
        let Some(proved) = self.proofs.get(uid) else { return Due::Nothing };
        let parts = proved.flaws.iter().flatten().map(|flaw| flaw.part);
        let parts: BTreeSet<Part> = parts.filter(|part| part.repairable()).collect();
        // Once more only when the last one is known to have been of no use.
        if parts.is_empty() || proved.repaired {
            return Due::Nothing;
        }
        Due::at(proved.retry.unwrap_or(now), now, || Step::Repair(parts))
    }

    /// What there is to say of a pod's capture; none: nothing is known yet.
    pub(super) fn verdict(&self, uid: &str) -> Option<Reported> {
        let proved = self.proofs.get(uid)?;
        proved.flaws.as_ref().map(|flaws| condition(flaws, proved.error.as_deref()))
    }

    /// How pods are captured.
    pub fn captures(&self) -> Captures {
        let mut captures = Captures { repairs: self.repairs.clone(), ..Captures::default() };
        for flaws in self.proofs.values().filter_map(|proved| proved.flaws.as_ref()) {
            captures.whole += usize::from(flaws.is_empty());
            let parts: BTreeSet<Part> = flaws.iter().map(|flaw| flaw.part).collect();
            for part in parts {
                *captures.flawed.entry(part).or_default() += 1;
            }
        }
        captures
    }
}

fn details<'a>(flaws: impl Iterator<Item = &'a Flaw>) -> String {
    flaws.map(|flaw| flaw.detail.as_str()).collect::<Vec<_>>().join("; ")
}

fn condition(flaws: &[Flaw], error: Option<&str>) -> Reported {
    let Some(first) = flaws.first() else {
        let message = "what the pod opens and what comes to it meets ztunnel, and nothing leaves past it: proved from \
                       inside the pod";
        let (status, reason) = ("True".to_owned(), "Proved".to_owned());
        return Reported { status, reason, message: message.to_owned() };
    };
    let next = match (first.part, error) {
        (_, Some(error)) => format!(
            "the agent could not put it back and tries again: {error}; see `kubectl logs -n ambit-system -l \
             app=node-agent` for this node"
        ),
        (Part::Addresses, _) => "what it sends over TCP is dropped; with the label istio.io/dataplane-mode=none it is \
                                 out of the mesh"
            .to_owned(),
        (Part::Proxy, _) => "new connections wait for it; see `kubectl get pods -n ambit-system -l app=ztunnel -o wide`"
            .to_owned(),
        (Part::Guard, _) => "the agent puts it back; ordinary connections are captured all the same".to_owned(),
        (Part::Dns, _) => "the agent puts it back; until then names are looked up without the mesh".to_owned(),
        _ => "the agent puts it back; until then new TCP connections fail or wait, and none leaves in the clear".to_owned(),
    };
    let reason = match first.part {
        Part::Addresses => "AddressMissing",
        Part::Connect => "ConnectNotCaptured",
        Part::Rules => "RulesMissing",
        Part::Settings => "SettingsChanged",
        Part::SkLookup => "SkLookupMissing",
        Part::Listeners => "ListenersNotReached",
        Part::Dns => "DnsNotCaptured",
        Part::Guard => "GuardMissing",
        Part::Proxy => "ProxySilent",
    };
    Reported {
        status: "False".to_owned(),
        reason: reason.to_owned(),
        message: format!("{}: {next}", details(flaws.iter())),
    }
}

/// From one proof of a pod's capture to the next; a pod that lost a part is repaired right after the proof that finds it.
const PERIOD: Duration = Duration::from_secs(5);
/// After one that came to nothing certain; how often that is put down to a busy node.
const SOON: Duration = Duration::from_secs(1);
const DOUBTS: u32 = 2;
