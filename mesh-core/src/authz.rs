//! May a connection pass: the question, the policies that bear on it, the answer.
//!
//! **Invariant:** fails closed. Rules are not evaluated yet, so every enforced policy that applies to the
//! destination denies, and says that it does because this version cannot evaluate it.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use crate::addr::{ClientAddr, Target};
use crate::identity::Identity;
use crate::workload::Workload;

/// An authorization policy, as far as it is understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    /// Namespace of the policy.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Which destinations it is about.
    pub scope: Scope,
    /// Logged, not enforced.
    pub dry_run: bool,
    /// Why the resource was refused; then this stands for whatever it may have denied.
    pub refused: Option<Arc<str>>,
}

/// Which destinations a policy is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of the mesh.
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that name it ([`Workload::authorization_policies`]).
    Selected,
    /// It could not be read: those of its namespace, and those that name it.
    Unreadable,
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

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Go on.
    Allow,
    /// Refuse, and say why.
    Deny(Denial),
}

/// Why a connection is denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    /// `<namespace>/<name>` of a policy whose rules this version cannot evaluate.
    CannotEvaluate(Arc<str>),
    /// A policy that could not be read: what it may have selected is denied.
    Refused {
        /// `<namespace>/<name>`
        policy: Arc<str>,
        /// What is wrong with it.
        reason: Arc<str>,
    },
    /// The destination's own resource was refused, so which policies select it is not known.
    UnknownSelection {
        /// What is wrong with it.
        reason: Arc<str>,
    },
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CannotEvaluate(policy) => {
                write!(f, "policy {policy} applies, and this version cannot evaluate its rules")
            }
            Self::Refused { policy, reason } => write!(
                f,
                "policy {policy} is not valid ({reason}), so everything that it may select is denied until it is \
                 corrected or removed"
            ),
            Self::UnknownSelection { reason } => write!(
                f,
                "the pod's own resource is not valid ({reason}), so it is not known which policies select it"
            ),
        }
    }
}

impl Authorization {
    /// WDS resource name.
    pub fn key(&self) -> Arc<str> {
        format!("{}/{}", self.namespace, self.name).into()
    }

    fn applies_to(&self, key: &str, destination: &Workload) -> bool {
        let namespace = || self.namespace == destination.namespace;
        let named = || destination.authorization_policies.iter().any(|name| **name == *key);
        match self.scope {
            Scope::Global => true,
            Scope::Namespace => namespace(),
            Scope::Selected => named(),
            Scope::Unreadable => namespace() || named(),
        }
    }
}

/// Decides about a connection to `destination` with the policies known.
pub fn decide(
    policies: &HashMap<Arc<str>, Arc<Authorization>>,
    destination: &Workload,
    _connection: &Connection,
) -> Decision {
    let applying =
        policies.iter().find(|(key, policy)| !policy.dry_run && policy.applies_to(key, destination));
    match applying {
        Some((key, policy)) => Decision::Deny(match &policy.refused {
            Some(reason) => Denial::Refused { policy: key.clone(), reason: reason.clone() },
            None => Denial::CannotEvaluate(key.clone()),
        }),
        None => Decision::Allow,
    }
}
