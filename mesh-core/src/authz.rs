//! May a connection pass: the question, the policies that bear on it, the answer.
//!
//! Evaluated as Istio's ztunnel does: a DENY that matches denies; then, if there is any ALLOW, one of them has to match.
//! **Invariant:** fails closed. A policy that could not be read denies whatever it may select, and so does one that a
//! workload names and that is not known.

mod denial;
mod rule;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

pub use denial::{Denial, Nearest};
pub use rule::{Attribute, Clause, Match, Rule, ServiceAccount, Text, Values};

use crate::addr::{ClientAddr, Target};
use crate::identity::Identity;

/// An authorization policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    /// Its name in xDS, `<namespace>/<name>`.
    pub key: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Which destinations it is about.
    pub scope: Scope,
    /// On trial: not enforced, but logged (Istio's annotation `istio.io/dry-run`).
    pub dry_run: bool,
    /// What it says.
    pub rules: Rules,
}

/// Which destinations a policy is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of the mesh.
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that name it ([`crate::workload::Workload::authorization_policies`]).
    Selected,
    /// It could not be read: those of its namespace, and those that name it.
    Unreadable,
}

/// What a policy says of the destinations that it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rules {
    /// Nothing else may come, but what one of them matches (or one of another such policy).
    Allow(Box<[Rule]>),
    /// What one of them matches may not come.
    Deny(Box<[Rule]>),
    /// What one of them matches is to be noted, whether it may come or not.
    Audit(Box<[Rule]>),
    /// The resource was refused, for this reason: nothing may come.
    Refused(Arc<str>),
}

/// What is asked: who wants to reach what. `peer` is None when there was no mutual TLS.
#[derive(Clone, Debug)]
pub struct Connection {
    /// What the client proved to be.
    pub peer: Option<Identity>,
    /// The far end of the TCP connection.
    pub client: ClientAddr,
    /// What it wants to reach.
    pub target: Target,
}

/// The policies that are about one destination; all others cost nothing.
#[derive(Clone, Debug, Default)]
pub struct Applying {
    /// Those that are known.
    pub policies: Vec<Arc<Authorization>>,
    /// One that the destination names and that is not known.
    pub unknown: Option<Arc<str>>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Go on.
    Allow,
    /// Refuse, and say why.
    Deny(Denial),
}

/// Decides about a connection to the destination that these policies are about.
pub fn decide(applying: &Applying, connection: &Connection) -> Decision {
    decide_by(applying, connection, |policy| !policy.dry_run)
}

/// Why the connection would be denied if the policies that are on trial ([`Authorization::dry_run`]) were in force
/// beside the others; what cannot be read is not on trial. None if it would be allowed, or none is on trial.
pub fn rehearse(applying: &Applying, connection: &Connection) -> Option<Denial> {
    let on_trial = |policy: &Authorization| policy.dry_run && !matches!(policy.rules, Rules::Refused(_));
    if !applying.policies.iter().any(|policy| on_trial(policy)) {
        return None;
    }
    match decide_by(applying, connection, |policy| !policy.dry_run || on_trial(policy)) {
        Decision::Allow => None,
        Decision::Deny(denial) => Some(denial),
    }
}

/// Which policy on trial denies a connection by a rule of its own, whatever those in force say.
pub fn rehearse_denials(applying: &Applying, connection: &Connection) -> Option<Denial> {
    let asked = rule::Asked::new(connection);
    applying.policies.iter().filter(|policy| policy.dry_run).find_map(|policy| {
        let Rules::Deny(rules) = &policy.rules else { return None };
        let rule = rules.iter().position(|rule| rule.matches(&asked))?;
        Some(Denial::Denied { policy: policy.key.clone(), rule, plaintext: connection.peer.is_none() })
    })
}

/// The AUDIT policies that match, each with the first of its rules that does.
pub fn audited(applying: &Applying, connection: &Connection) -> Vec<Audited> {
    let asked = rule::Asked::new(connection);
    let matching = applying.policies.iter().filter_map(|policy| {
        let Rules::Audit(rules) = &policy.rules else { return None };
        let rule = rules.iter().position(|rule| rule.matches(&asked))?;
        Some(Audited { policy: policy.key.clone(), rule })
    });
    matching.collect()
}

/// A policy wants a connection to be noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audited {
    /// Its name in xDS, `<namespace>/<name>`.
    pub policy: Arc<str>,
    /// Which of its rules matches, from 0.
    pub rule: usize,
}

impl fmt::Display for Audited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "policy {}, rule {}", self.policy, self.rule)
    }
}

fn decide_by(
    applying: &Applying,
    connection: &Connection,
    counts: impl Fn(&Authorization) -> bool,
) -> Decision {
    let plaintext = connection.peer.is_none();
    if let Some(policy) = &applying.unknown {
        return Decision::Deny(Denial::UnknownPolicy(policy.clone()));
    }
    let asked = rule::Asked::new(connection);
    let mut allows = Vec::new();
    for policy in applying.policies.iter().filter(|policy| counts(policy)) {
        match &policy.rules {
            Rules::Refused(reason) => {
                let (policy, reason) = (policy.key.clone(), reason.clone());
                return Decision::Deny(Denial::Refused { policy, reason });
            }
            Rules::Deny(rules) => {
                if let Some(rule) = rules.iter().position(|rule| rule.matches(&asked)) {
                    return Decision::Deny(Denial::Denied { policy: policy.key.clone(), rule, plaintext });
                }
            }
            Rules::Allow(rules) => allows.push((policy, &**rules)),
            Rules::Audit(_) => {}
        }
    }
    let Some((first, _)) = allows.first() else { return Decision::Allow };
    if allows.iter().any(|(_, rules)| rules.iter().any(|rule| rule.matches(&asked))) {
        return Decision::Allow;
    }
    let (policy, others) = (first.key.clone(), allows.len() - 1);
    let nearest = nearest(&allows, &asked).map(Arc::new);
    Decision::Deny(Denial::NotAllowed { policy, others, plaintext, nearest })
}

/// Of all rules the first that misses the least; one that nothing matches is near to nobody.
fn nearest(allows: &[(&Arc<Authorization>, &[Rule])], asked: &rule::Asked<'_>) -> Option<Nearest> {
    let rules = allows
        .iter()
        .flat_map(|(policy, rules)| rules.iter().enumerate().map(move |(i, rule)| (policy, i, rule)));
    let missing = rules.filter_map(|(policy, i, rule)| Some((policy, i, rule.misses(asked)?)));
    let (policy, rule, misses) = missing.min_by_key(|(_, _, misses)| misses.len())?;
    Some(Nearest { policy: policy.key.clone(), rule, misses })
}
