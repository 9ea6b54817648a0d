//! What is due for one pod, and when.

use std::time::{Duration, Instant};

use super::{Enrolled, Stage, Step, Table};
use crate::index::local::LocalPod;
use crate::index::membership::Membership;
use crate::index::pod::{Condition, Reported};

impl Table {
    /// The next step of a pod.
    pub(super) fn due(&self, uid: &str, now: Instant) -> Due {
        match (self.desired.get(uid), self.enrolled.get(uid)) {
            (Some(pod), Some(enrolled)) => self.due_enrolled(pod, enrolled, now),
            (Some(pod), None) => self.due_outside(pod, now),
            (None, Some(enrolled)) if enrolled.seen => Due::Now(Step::Sweep),
            (None, Some(enrolled)) => self.due_unseen(uid, enrolled, now),
            (None, None) => Due::Nothing,
        }
    }

    fn due_enrolled(&self, pod: &LocalPod, enrolled: &Enrolled, now: Instant) -> Due {
        if pod.finished {
            return Due::Now(Step::Sweep);
        }
        let member = pod.membership == Membership::Member;
        match enrolled.stage {
            // Also when it is to leave: only what was taken over can be put back as it was.
            Stage::Survived => Due::Now(Step::Enrol(Box::new(pod.clone()))),
            Stage::Enrolled if member => {
                let repair = self.repair(&pod.uid, now);
                match repair {
                    Due::Now(_) => repair,
                    // The pod's annotation says otherwise than when it was enrolled.
                    _ if enrolled.dns.is_some_and(|dns| dns != pod.dns) => {
                        Due::Now(Step::Enrol(Box::new(pod.clone())))
                    }
                    _ => self.tell(pod, now).or(|| repair),
                }
            }
            // Enrolled on what the API server said, which the watch, of the namespace perhaps, is yet to show.
            Stage::Enrolled if !enrolled.confirmed => {
                Due::at(enrolled.since + SHOWS, now, || Step::Annotate(pod.name.clone(), false))
            }
            Stage::Enrolled => Due::Now(Step::Annotate(pod.name.clone(), false)),
            Stage::Leaving(Some(seen)) => Due::at(seen + self.grace, now, || Step::Release),
            // It is a patch that the model does not show: say it again, should it be lost.
            Stage::Leaving(None) => self.annotate(pod, false, now),
        }
    }

    /// What is to be said of a pod that is enrolled.
    fn tell(&self, pod: &LocalPod, now: Instant) -> Due {
        if !pod.annotated {
            return self.annotate(pod, true, now);
        }
        let disturbed = self.foreign.get(&pod.uid).map(disturbed);
        self.report(pod, Condition::Enrolled, disturbed, now).or(|| match self.verdict(&pod.uid) {
            Some(verdict) => self.report(pod, Condition::Captured, Some(verdict), now),
            None => Due::Nothing,
        })
    }

    /// Enrolled by CNI, and the watch is behind. It may also stay so: when the pod's end and its DEL were both missed.
    fn due_unseen(&self, uid: &str, enrolled: &Enrolled, now: Instant) -> Due {
        let annotated = self.notes.get(uid).is_some_and(|note| note.annotated.is_some());
        match &enrolled.name {
            Some(name) if !annotated => Due::Now(Step::Annotate(name.clone(), true)),
            _ => Due::at(enrolled.since + UNSEEN, now, || Step::Sweep),
        }
    }

    fn due_outside(&self, pod: &LocalPod, now: Instant) -> Due {
        if pod.finished {
            return Due::Nothing;
        }
        let failure = self.notes.get(&pod.uid).filter(|note| note.attempts >= TELL_AFTER);
        let condition = match &pod.membership {
            Membership::Member => failure.and_then(|note| note.error.clone()).map(failed),
            Membership::NotAsked => None,
            Membership::Refused(refusal) => Some(Reported {
                status: "False".to_owned(),
                reason: refusal.reason().to_owned(),
                message: refusal.to_string(),
            }),
        };
        let report = self.report(pod, Condition::Enrolled, condition, now);
        let report = report.or(|| self.report(pod, Condition::Captured, None, now));
        // Without an address the pod is not there yet; it will come by CNI, or be found once it is running.
        let enrol = pod.membership == Membership::Member && !pod.addresses.is_empty() && !pod.terminating;
        match report {
            Due::Now(_) => report,
            _ if enrol => Due::Now(Step::Enrol(Box::new(pod.clone()))),
            _ if pod.annotated && pod.membership != Membership::Member => self.annotate(pod, false, now),
            report => report,
        }
    }

    fn annotate(&self, pod: &LocalPod, captured: bool, now: Instant) -> Due {
        let said = self.notes.get(&pod.uid).and_then(|note| note.annotated);
        match said.filter(|(said, _)| *said == captured) {
            Some((_, at)) => Due::at(at + SHOWS, now, || Step::Annotate(pod.name.clone(), captured)),
            None => Due::Now(Step::Annotate(pod.name.clone(), captured)),
        }
    }

    fn report(&self, pod: &LocalPod, condition: Condition, wanted: Option<Reported>, now: Instant) -> Due {
        let shown = match condition {
            Condition::Enrolled => &pod.reported,
            Condition::Captured => &pod.proved,
        };
        let gist = wanted.as_ref().map(Reported::gist);
        if shown.as_ref().map(Reported::gist) == gist {
            return Due::Nothing;
        }
        let said = self.notes.get(&pod.uid).and_then(|note| note.reported.get(&condition));
        let step = || Step::Report(pod.name.clone(), condition, wanted);
        match said.filter(|(said, _)| *said == gist) {
            Some((_, at)) => Due::at(*at + SHOWS, now, step),
            None => Due::Now(step()),
        }
    }
}

/// When a step is due.
pub(super) enum Due {
    Now(Step),
    At(Instant),
    Nothing,
}

impl Due {
    pub(super) fn at(time: Instant, now: Instant, step: impl FnOnce() -> Step) -> Self {
        if time <= now { Self::Now(step()) } else { Self::At(time) }
    }

    /// This one now, else the other one; the sooner of both.
    fn or(self, other: impl FnOnce() -> Self) -> Self {
        match (self, other) {
            (Self::Now(step), _) => Self::Now(step),
            (Self::Nothing, other) => other(),
            (Self::At(time), other) => match other() {
                Self::At(other) => Self::At(time.min(other)),
                Self::Nothing => Self::At(time),
                now => now,
            },
        }
    }
}

fn failed(error: String) -> Reported {
    Reported { status: "False".to_owned(), reason: "EnrolmentFailed".to_owned(), message: error }
}

fn disturbed(foreign: &String) -> Reported {
    let message = format!("the pod is in the mesh, and meets eBPF programs of others: {foreign}");
    Reported { status: "True".to_owned(), reason: "ForeignPrograms".to_owned(), message }
}

/// Failures before the pod's status tells.
const TELL_AFTER: u32 = 2;
/// In which the watch shows a patch; after it, the patch is made again.
const SHOWS: Duration = Duration::from_secs(60);
/// A pod that CNI announced and the watch never showed.
const UNSEEN: Duration = Duration::from_secs(300);
