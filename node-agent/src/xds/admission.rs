//! Who may have a stream, and what it is told on it.
//!
//! Over the socket on the node: its ztunnel, everything. Over the network: whoever proves to be a service account.
//! The accounts of proxies are told everything by the agent of their own node; any other account is told what is of its
//! namespace. A pure decision.

use std::collections::{BTreeSet, HashMap};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use super::scope::Scope;
use crate::ca::attest::ServiceAccount;

/// The settings of the decision about strangers.
#[derive(Clone, Debug)]
pub struct Rules {
    /// This agent's.
    pub node: String,
    /// Whose policies are about all of the mesh.
    pub root_namespace: String,
    /// Who is told everything.
    pub proxies: BTreeSet<ServiceAccount>,
}

/// Why a service account gets no stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A proxy of another node.
    #[error("service account {account} is told everything by the agent of its own node only: its pod is on {}, this is {here}", node.as_deref().unwrap_or("no node that its token says"))]
    Elsewhere {
        /// Whose token.
        account: ServiceAccount,
        /// Where the token says that its pod runs.
        node: Option<String>,
        /// This node.
        here: String,
    },
    /// More than one proxy of its pods could need.
    #[error("service account {0} has {MAX_OF_ACCOUNT} streams open with this agent already")]
    TooMany(ServiceAccount),
    /// More than the accounts of one namespace may have, so that none has them all.
    #[error(
        "the service accounts of namespace {0} have {MAX_OF_NAMESPACE} streams open with this agent already"
    )]
    Namespace(String),
    /// The agent's limit.
    #[error("this agent has as many streams open as it may for such accounts")]
    Full,
}

impl Rules {
    /// Whether an account is a proxy's.
    pub fn is_proxy(&self, account: &ServiceAccount) -> bool {
        self.proxies.contains(account)
    }

    /// What an account is told. `node`: where its pod runs, as far as is known.
    ///
    /// # Errors
    /// When it has to ask elsewhere.
    pub fn scope(&self, account: &ServiceAccount, node: Option<&str>) -> Result<Scope, Refusal> {
        if !self.is_proxy(account) {
            let [own, root] = [&account.namespace, &self.root_namespace].map(|name| Arc::from(name.as_str()));
            return Ok(Scope::Namespace { own, root });
        }
        if node != Some(&self.node) {
            let (account, node) = (account.clone(), node.map(str::to_owned));
            return Err(Refusal::Elsewhere { account, node, here: self.node.clone() });
        }
        Ok(Scope::Everything)
    }
}

/// How many streams there are of each account, proxies' apart from others'. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Seats(Arc<Mutex<HashMap<(ServiceAccount, Kind), usize>>>);

/// Whose streams are counted together. Half are for proxies alone: whoever may make service accounts keeps none out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// What is told everything.
    Proxy,
    /// Any other account.
    Other,
}

/// A stream's seat, free again when dropped.
#[derive(Debug)]
pub struct Seat {
    seats: Seats,
    key: (ServiceAccount, Kind),
}

impl Seats {
    /// # Errors
    /// When there is none for this account.
    pub fn take(&self, account: &ServiceAccount, kind: Kind) -> Result<Seat, Refusal> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |wanted: &dyn Fn(&ServiceAccount) -> bool| -> usize {
            let of_kind = taken.iter().filter(|((other, of), _)| *of == kind && wanted(other));
            of_kind.map(|(_, count)| count).sum()
        };
        if sum(&|other| other == account) >= MAX_OF_ACCOUNT {
            return Err(Refusal::TooMany(account.clone()));
        }
        if kind == Kind::Other && sum(&|other| other.namespace == account.namespace) >= MAX_OF_NAMESPACE {
            return Err(Refusal::Namespace(account.namespace.clone()));
        }
        if sum(&|_| true) >= MAX_OF_KIND {
            return Err(Refusal::Full);
        }
        let key = (account.clone(), kind);
        *taken.entry(key.clone()).or_default() += 1;
        Ok(Seat { seats: self.clone(), key })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.seats.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

impl FromStr for ServiceAccount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text
            .trim()
            .split_once('/')
            .filter(|(namespace, name)| !namespace.is_empty() && !name.is_empty() && !name.contains('/'));
        let (namespace, name) = parts.ok_or_else(|| format!("{text:?} is not <namespace>/<name>"))?;
        Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

/// Streams over the network at once of proxies, and as many of others.
const MAX_OF_KIND: usize = 128;
/// Of the latter of one namespace.
const MAX_OF_NAMESPACE: usize = 32;
/// Of these of one service account: its pods on this node, and what restarted ones have not given up yet.
const MAX_OF_ACCOUNT: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn account(text: &str) -> ServiceAccount {
        text.parse().unwrap()
    }

    #[test]
    fn proxies_are_told_everything_on_their_own_node_and_others_their_namespace() {
        let rules = Rules {
            node: "n1".into(),
            root_namespace: "istio-system".into(),
            proxies: ["ambit-system/ztunnel", "edge/gateway"].map(account).into(),
        };
        let own = |own: &str| Ok(Scope::Namespace { own: own.into(), root: "istio-system".into() });
        let elsewhere = |who: &str, node: Option<&str>| {
            let node = node.map(str::to_owned);
            Err(Refusal::Elsewhere { account: account(who), node, here: "n1".into() })
        };
        for (who, node, expected) in [
            ("ambit-system/ztunnel", Some("n1"), Ok(Scope::Everything)),
            ("edge/gateway", Some("n1"), Ok(Scope::Everything)),
            ("edge/gateway", Some("n2"), elsewhere("edge/gateway", Some("n2"))),
            ("edge/gateway", None, elsewhere("edge/gateway", None)),
            ("shop/ztunnel", Some("n1"), own("shop")),
            ("edge/other", Some("n2"), own("edge")),
            ("edge/other", None, own("edge")),
        ] {
            assert_eq!(rules.scope(&account(who), node), expected, "{who} on {node:?}");
        }
    }

    #[test]
    fn seats_are_counted_by_account_namespace_and_altogether() {
        let (seats, first) = (Seats::default(), account("n0/0"));
        let take = |account: &ServiceAccount| seats.take(account, Kind::Other);
        let mut taken: Vec<Seat> = (0..MAX_OF_ACCOUNT).map(|_| take(&first).unwrap()).collect();
        assert_eq!(take(&first).unwrap_err(), Refusal::TooMany(first.clone()));
        taken.pop();
        taken.push(take(&first).unwrap());
        for n in MAX_OF_ACCOUNT..MAX_OF_NAMESPACE {
            taken.push(take(&account(&format!("n0/{}", n / MAX_OF_ACCOUNT))).unwrap());
        }
        assert_eq!(take(&account("n0/more")).unwrap_err(), Refusal::Namespace("n0".to_owned()));
        for n in MAX_OF_NAMESPACE..MAX_OF_KIND {
            taken.push(take(&account(&format!("n{}/{n}", n / MAX_OF_NAMESPACE))).unwrap());
        }
        assert_eq!(take(&account("b/b")).unwrap_err(), Refusal::Full);
        taken.push(seats.take(&account("edge/gateway"), Kind::Proxy).unwrap());
        taken.clear();
        assert!(seats.0.lock().unwrap().is_empty());
    }

    #[test]
    fn accounts_are_read() {
        for bad in ["", "a", "/a", "a/", "a/b/c"] {
            assert!(bad.parse::<ServiceAccount>().is_err(), "{bad:?}");
        }
        assert_eq!(account(" a/b ").to_string(), "a/b");
    }
}
