//! From one signing key to another without a moment in which peers refuse each other. Pure.
//!
//! What the mesh does with its CA is one value, [`State`], which all replicas share: the key that signs, and the roots
//! that everybody is told to trust, each with the time since when. When the user's Secret has another key, its roots
//! are trusted at once and the old key goes on signing (overlap), until every certificate that is still valid came with
//! the new root: a lifetime, and what clocks may differ by. Then the new key signs, and the old root stays trusted for
//! as long again (retiring).
//!
//! **Invariant:** nothing is signed by a key before everybody trusts its root, and no root goes before what it vouches
//! for has expired, unless the user says so, or the old key can sign no more.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::ca::authority::Material;
use crate::ca::issue::Times;

/// A key with its certificates, as far as rotation has to know them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What is to sign.
    pub material: Material,
    /// PEM of its roots.
    pub roots: Vec<String>,
    /// The one of them that what it signs leads to.
    pub anchor: String,
    /// First moment in which all certificates up to the anchor are valid.
    pub from: SystemTime,
    /// Last moment.
    pub until: SystemTime,
}

/// What the user's Secret asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its files.
    pub candidate: Candidate,
    /// Whatever breaks: this key and these roots now, and no others.
    pub at_once: bool,
}

/// A root that everybody is told to trust.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The certificate.
    pub pem: String,
    /// Milliseconds since 1970; zero for those that were there before everything.
    since: u64,
    /// When it goes, in milliseconds since 1970; only for one that nothing is signed for any more.
    until: Option<u64>,
}

/// What all replicas of the CA do.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    /// Signs.
    pub signing: Material,
    /// How it came about, and how it goes on.
    pub record: Record,
}

/// The part of it that is no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Everybody is told to trust them.
    pub roots: Vec<Root>,
    /// The longest that certificates of the signing key may live, in milliseconds.
    lifetime: u64,
    /// When another key is to sign, in milliseconds since 1970, if one is to.
    switch_at: Option<u64>,
}

/// Where a rotation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// There is none.
    Steady,
    /// The roots of another key are trusted already, the old one signs.
    Overlap,
    /// The new key signs, the old one's root is still trusted.
    Retiring,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Steady, Self::Overlap, Self::Retiring];

    /// For metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::Overlap => "overlap",
            Self::Retiring => "retiring",
        }
    }
}

impl State {
    /// A CA that begins with this key: nobody has heard of another.
    pub fn new(wanted: &Candidate, times: Times) -> Self {
        let roots = wanted.roots.iter().map(|pem| Root { pem: pem.clone(), since: 0, until: None }).collect();
        let record = Record { roots, lifetime: milliseconds(times.lifetime), switch_at: None };
        Self { signing: wanted.material.clone(), record }
    }

    /// PEM of all roots that everybody is told to trust.
    pub fn trusted(&self) -> String {
        self.record.roots.iter().map(|root| root.pem.as_str()).collect()
    }

    /// Where it stands, and until when.
    pub fn phase(&self) -> (Phase, Option<SystemTime>) {
        if let Some(at) = self.record.switch_at {
            return (Phase::Overlap, Some(moment(at)));
        }
        match self.record.roots.iter().filter_map(|root| root.until).max() {
            Some(until) => (Phase::Retiring, Some(moment(until))),
            None => (Phase::Steady, None),
        }
    }

    /// How it goes on at `now`. `signing` is the state's own key, `None` once that has expired; `wanted` is what the
    /// user's Secret asks for, `None` if that cannot be told; `published` is what everybody can read.
    #[must_use]
    pub fn next(
        &self,
        signing: Option<&Candidate>,
        wanted: Option<&Wanted>,
        published: &str,
        now: SystemTime,
        times: Times,
    ) -> Self {
        let mut next = self.clone();
        let lifetime = milliseconds(times.lifetime);
        next.record.lifetime = next.record.lifetime.max(lifetime);
        next.record.roots.retain(|root| root.until.is_none_or(|until| now < moment(until)));
        let Some(Wanted { candidate, at_once }) = wanted else { return next };
        for pem in &candidate.roots {
            match next.record.roots.iter_mut().find(|root| root.pem == *pem) {
                Some(root) => root.until = None,
                None => {
                    next.record.roots.push(Root { pem: pem.clone(), since: since_1970(now), until: None });
                }
            }
        }
        let is_wanted = |root: &Root| candidate.roots.contains(&root.pem);
        next.record.switch_at = None;
        if *at_once {
            next.signing = candidate.material.clone();
            next.record.roots.retain(is_wanted);
        } else if candidate.material != self.signing {
            let at = next.switch_at(signing, candidate, times);
            if signing.is_none() || now >= at && published.contains(&candidate.anchor) {
                let until = since_1970(now + next.valid(times));
                for root in next.record.roots.iter_mut().filter(|root| !is_wanted(root)) {
                    root.until = root.until.or(signing.filter(|old| old.anchor == root.pem).map(|_| until));
                }
                next.signing = candidate.material.clone();
                next.record.lifetime = lifetime;
                next.record.roots.retain(|root| is_wanted(root) || root.until.is_some());
                return next;
            }
            next.record.switch_at = Some(since_1970(at));
            let of_signing = |root: &Root| signing.is_some_and(|signing| signing.roots.contains(&root.pem));
            next.record.roots.retain(|root| is_wanted(root) || of_signing(root) || root.until.is_some());
        } else {
            next.record.roots.retain(|root| is_wanted(root) || root.until.is_some());
        }
        next
    }

    /// When everybody trusts the candidate's root, or the old key is about to end.
    fn switch_at(&self, signing: Option<&Candidate>, candidate: &Candidate, times: Times) -> SystemTime {
        let anchor = self.record.roots.iter().find(|root| root.pem == candidate.anchor);
        let known = moment(anchor.map_or(0, |root| root.since)) + self.valid(times);
        let last = signing.map_or(UNIX_EPOCH, |signing| signing.until - times.skew);
        known.min(last).max(candidate.from)
    }

    /// For how long something of the signing key may be valid somewhere.
    fn valid(&self, times: Times) -> Duration {
        Duration::from_millis(self.record.lifetime) + times.skew
    }
}

/// Without the key.
impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("record", &self.record).finish_non_exhaustive()
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn since_1970(at: SystemTime) -> u64 {
    milliseconds(at.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// A number that somebody wrote may be beyond what the clock can say.
fn moment(milliseconds: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_millis(milliseconds)).unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests;
