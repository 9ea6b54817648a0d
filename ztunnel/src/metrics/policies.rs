//! What each policy did to connections, and what it would have done.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::{MAX_SAID, UNKNOWN};
use crate::report::Direction;

/// What becomes of connections.
const OUTCOMES: [&str; 4] = ["denied", "cut", "dry_run", "audit"];

/// Connections by policy; clones are the same.
#[derive(Clone, Debug)]
pub struct Policies {
    connections: Family<Labels, Counter>,
    /// Names that peers told.
    said: Arc<Mutex<HashSet<Box<str>>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    reporter: &'static str,
    policy: Box<str>,
    outcome: &'static str,
}

impl Policies {
    /// Registers the family.
    pub(super) fn register(registry: &mut Registry) -> Self {
        let connections = Family::default();
        registry.register(
            "ambit_policy_connections",
            "Connections that a policy had a say in, by outcome: denied, cut (open when it changed), dry_run (it would \
             have denied), audit",
            connections.clone(),
        );
        Self { connections, said: Arc::default() }
    }

    /// The policy is gone, and what it did with it.
    pub fn forget(&self, policy: &str) {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).remove(policy);
        for direction in [Direction::Outbound, Direction::Inbound] {
            for outcome in OUTCOMES {
                let labels = Labels { reporter: direction.reporter(), policy: policy.into(), outcome };
                self.connections.remove(&labels);
            }
        }
    }

    /// Counts a connection that a policy known here had this outcome for.
    pub fn count(&self, direction: Direction, policy: &str, outcome: &'static str) {
        let labels = Labels { reporter: direction.reporter(), policy: policy.into(), outcome };
        self.connections.get_or_create(&labels).inc();
    }

    /// The same where a peer names the policy: so many names are told apart, the rest are one.
    pub fn said(&self, direction: Direction, policy: &str, outcome: &'static str) {
        let known = {
            let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
            said.contains(policy) || (said.len() < MAX_SAID && said.insert(policy.into()))
        };
        self.count(direction, if known { policy } else { UNKNOWN }, outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_peers_say_makes_no_endless_series() {
        let mut registry = Registry::default();
        let policies = Policies::register(&mut registry);
        for i in 0..2 * MAX_SAID {
            policies.said(Direction::Outbound, &format!("shop/p{i}"), "denied");
        }
        policies.said(Direction::Outbound, "shop/p0", "denied");
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let series = text.lines().filter(|line| line.starts_with("ambit_policy_connections_total{"));
        assert_eq!(series.count(), MAX_SAID + 1);
        let labels = r#"{reporter="source",policy="shop/p0",outcome="denied"} 2"#;
        assert!(text.contains(labels), "{text}");
        let rest = format!(r#"policy="unknown",outcome="denied"}} {MAX_SAID}"#);
        assert!(text.contains(&rest), "{text}");
    }

    #[test]
    fn the_series_of_a_policy_go_with_it() {
        let mut registry = Registry::default();
        let policies = Policies::register(&mut registry);
        let encoded = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        };
        for outcome in OUTCOMES {
            policies.count(Direction::Inbound, "shop/a", outcome);
            policies.said(Direction::Outbound, "shop/a", outcome);
            policies.count(Direction::Inbound, "shop/b", outcome);
        }
        policies.forget("shop/a");
        assert!(!encoded().contains("shop/a"), "{}", encoded());
        assert_eq!(encoded().matches("shop/b").count(), OUTCOMES.len());
        assert!(policies.said.lock().unwrap().is_empty());
    }
}
