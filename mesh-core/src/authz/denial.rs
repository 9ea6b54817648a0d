//! Why a connection is denied, in words.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use super::Attribute;

/// Why a connection is denied. Policies are named as in xDS, `<namespace>/<name>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    /// A DENY policy matches.
    Denied {
        /// Which.
        policy: Arc<str>,
        /// Which of its rules, from 0.
        rule: usize,
        /// The client did not prove who it is, which is what such rules are mostly about.
        plaintext: bool,
    },
    /// There are ALLOW policies, and none of them matches.
    NotAllowed {
        /// One of them.
        policy: Arc<str>,
        /// How many there are besides.
        others: usize,
        /// The client did not prove who it is.
        plaintext: bool,
        /// The rule of these policies that would have allowed it with the least changes. Not for the client: it is told
        /// why it is refused, not what would have let it in.
        nearest: Option<Arc<Nearest>>,
    },
    /// A policy that could not be read: what it may have selected is denied.
    Refused {
        /// Which.
        policy: Arc<str>,
        /// What is wrong with it.
        reason: Arc<str>,
    },
    /// The destination names a policy that is not known.
    UnknownPolicy(Arc<str>),
    /// The destination's own resource was refused, so which policies select it is not known.
    UnknownSelection {
        /// What is wrong with it.
        reason: Arc<str>,
    },
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unproved = |plaintext: &bool| if *plaintext { "; the client did not use mutual TLS" } else { "" };
        match self {
            Self::Denied { policy, rule, plaintext } => {
                write!(f, "policy {policy} denies it by its rule {rule}{}", unproved(plaintext))
            }
            Self::NotAllowed { policy, others: 0, plaintext, .. } => {
                write!(f, "policy {policy} does not allow it{}", unproved(plaintext))
            }
            Self::NotAllowed { policy, others, plaintext, .. } => {
                write!(f, "neither policy {policy} nor {others} more allow it{}", unproved(plaintext))
            }
            Self::Refused { policy, reason } => write!(
                f,
                "policy {policy} is not valid ({reason}), so everything that it may select is denied until it is \
                 corrected or removed"
            ),
            Self::UnknownPolicy(policy) => {
                write!(f, "the pod is subject to policy {policy}, which is not known")
            }
            Self::UnknownSelection { reason } => write!(
                f,
                "the pod's own resource is not valid ({reason}), so it is not known which policies select it"
            ),
        }
    }
}

impl Denial {
    /// The policy that denies, or one of those that do not allow.
    pub fn policy(&self) -> Option<&Arc<str>> {
        match self {
            Self::Denied { policy, .. }
            | Self::NotAllowed { policy, .. }
            | Self::Refused { policy, .. }
            | Self::UnknownPolicy(policy) => Some(policy),
            Self::UnknownSelection { .. } => None,
        }
    }

    /// The rule that almost allowed it.
    pub fn nearest(&self) -> Option<&Nearest> {
        match self {
            Self::NotAllowed { nearest, .. } => nearest.as_deref(),
            _ => None,
        }
    }
}

/// A rule that would have allowed a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nearest {
    /// Of this policy.
    pub policy: Arc<str>,
    /// From 0.
    pub rule: usize,
    /// If it were not for these.
    pub misses: BTreeSet<Attribute>,
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let misses: Vec<&str> = self.misses.iter().map(|attribute| attribute.as_str()).collect();
        write!(f, "rule {} of policy {}, but for {}", self.rule, self.policy, misses.join(" and "))
    }
}
