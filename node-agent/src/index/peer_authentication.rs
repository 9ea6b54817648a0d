//! PeerAuthentication: must clients prove who they are. Istio's precedence: a policy that selects the workload before
//! its namespace's before the root namespace's; of several of one rank the oldest; UNSET takes the next rank's word, and
//! where nobody says anything plaintext is let in (PERMISSIVE).
//!
//! DISABLE lets plaintext in too; the tunnel stays open beside it, as in Istio's ambient mode. A selector in the root
//! namespace selects nothing, also as there. What cannot be understood is taken for STRICT, and reported.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mesh_core::proto::security as wire;
use serde_json::Value;

use super::by_namespace::ByNamespace;
use super::event::{Custom, Kind, ObjectName};
use super::pod::{Labels, Pod, selects};
use super::{Changes, Config, Index, PolicyKey};

/// Istio's name of the policy that stands for STRICT.
const STRICT: &str = "istio_converted_static_strict";
/// Istio's name of a policy that a PeerAuthentication with ports is made into begins so.
const PORTS: &str = "converted_peer_authentication_";

/// Whether plaintext is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Permissive,
    Strict,
}

/// What the model keeps of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PeerAuthentication {
    /// Seconds since 1970.
    created: i64,
    /// Empty: all of the namespace.
    selector: Labels,
    /// None: UNSET.
    mode: Option<Mode>,
    ports: BTreeMap<u16, Option<Mode>>,
}

impl PeerAuthentication {
    /// Reads what can be read, and says what cannot.
    fn read(root_namespace: &str, name: &ObjectName, object: &Custom) -> (Self, Vec<String>) {
        let mut faults = Vec::new();
        let spec = &object.spec;
        let selector = &spec["selector"]["matchLabels"];
        let selector = match selector {
            Value::Null => Labels::new(),
            labels => serde_json::from_value(labels.clone()).unwrap_or_else(|_| {
                faults.push(
                    "spec.selector.matchLabels is no map of texts: the policy selects all pods".to_owned(),
                );
                Labels::new()
            }),
        };
        let mode = mode("spec.mtls.mode", &spec["mtls"]["mode"], &mut faults);
        let mut ports = BTreeMap::new();
        for (port, mtls) in spec["portLevelMtls"].as_object().into_iter().flatten() {
            let field = format!("spec.portLevelMtls.{port}.mode");
            match port.parse() {
                Ok(number) if number > 0 => {
                    ports.insert(number, self::mode(&field, &mtls["mode"], &mut faults));
                }
                _ => faults.push(format!("spec.portLevelMtls has {port:?}, which is no port")),
            }
        }
        if selector.is_empty() && !ports.is_empty() {
            faults.push("spec.portLevelMtls needs a selector, and is left out".to_owned());
            ports.clear();
        }
        if *name.namespace == *root_namespace && !selector.is_empty() {
            faults.push("spec.selector of a policy in the root namespace selects nothing".to_owned());
        }
        let created = object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second());
        (Self { created, selector, mode, ports }, faults)
    }

    /// Ports that differ from the rest.
    fn exceptions(&self, base: Mode) -> impl Iterator<Item = u16> + '_ {
        self.ports
            .iter()
            .filter(move |(_, mode)| mode.is_some_and(|mode| mode != base))
            .map(|(port, _)| *port)
    }
}

/// None: UNSET.
fn mode(field: &str, value: &Value, faults: &mut Vec<String>) -> Option<Mode> {
    match value {
        Value::Null => None,
        Value::String(text) if text.is_empty() || text == "UNSET" => None,
        Value::String(text) if text == "STRICT" => Some(Mode::Strict),
        Value::String(text) if text == "PERMISSIVE" || text == "DISABLE" => Some(Mode::Permissive),
        other => {
            faults.push(format!("{field} is {other}, which is no mode: it is taken for STRICT"));
            Some(Mode::Strict)
        }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct PeerAuthentications {
    all: ByNamespace<PeerAuthentication>,
    /// What a namespace's oldest policy without a selector says.
    modes: HashMap<Arc<str>, Mode>,
}

impl PeerAuthentications {
    pub(super) fn names(&self) -> Vec<ObjectName> {
        self.all.names()
    }

    /// What was there before, if it is another one, and whether its namespace says something else now.
    fn set(
        &mut self,
        name: &ObjectName,
        new: Option<PeerAuthentication>,
    ) -> Option<(Option<PeerAuthentication>, bool)> {
        if self.all.get(name) == new.as_ref() {
            return None;
        }
        let old = match new {
            Some(new) => self.all.put(name, new),
            None => self.all.remove(name),
        };
        let wide = self.all.of(&name.namespace).filter(|(_, one)| one.selector.is_empty());
        let mode = oldest(wide).and_then(|(_, one)| one.mode);
        let before = match mode {
            Some(mode) => self.modes.insert(name.namespace.clone(), mode),
            None => self.modes.remove(&name.namespace),
        };
        Some((old, before != mode))
    }

    /// The policy that stands for the ports of a PeerAuthentication, if it has ports that differ from the rest.
    pub(super) fn ports(&self, config: &Config, name: &ObjectName) -> Option<wire::Authorization> {
        let own = self.all.get(name)?;
        if *name.namespace == *config.root_namespace {
            return None;
        }
        let base = own.mode.unwrap_or_else(|| self.namespace_mode(config, &name.namespace));
        let exceptions: Vec<u32> = own.exceptions(base).map(u32::from).collect();
        let rules = match base {
            _ if exceptions.is_empty() => return None,
            // Plaintext, and to none of the ports that let it in.
            Mode::Strict => {
                let others = exceptions
                    .iter()
                    .map(|port| wire::Match { not_destination_ports: vec![*port], ..Default::default() });
                vec![rule(std::iter::once(plaintext()).chain(others))]
            }
            Mode::Permissive => exceptions
                .iter()
                .map(|port| rule([wire::Match { destination_ports: vec![*port], ..plaintext() }]))
                .collect(),
        };
        Some(deny(&name.namespace, &format!("{PORTS}{}", name.name), rules))
    }

    /// The policy that a workload is subject to.
    pub(super) fn of(&self, config: &Config, namespace: &str, labels: &Labels) -> Option<PolicyKey> {
        let own = (*namespace != *config.root_namespace).then(|| self.all.of(namespace));
        let selecting = own.into_iter().flatten().filter(|(_, one)| !one.selector.is_empty());
        let workload = oldest(selecting.filter(|(_, one)| selects(&one.selector, labels)));
        let base = workload.and_then(|(_, one)| one.mode);
        let base = base.unwrap_or_else(|| self.namespace_mode(config, namespace));
        match workload {
            Some((name, one)) if one.exceptions(base).next().is_some() => {
                Some(PolicyKey::Ports(ObjectName::new(namespace, name)))
            }
            _ => (base == Mode::Strict).then_some(PolicyKey::Strict),
        }
    }

    /// Where no policy that selects the workload has a word.
    fn namespace_mode(&self, config: &Config, namespace: &str) -> Mode {
        let of = |namespace: &str| self.modes.get(namespace).copied();
        of(namespace).or_else(|| of(&config.root_namespace)).unwrap_or(Mode::Permissive)
    }
}

/// Of the same second, the one whose name comes first.
fn oldest<'a>(
    all: impl Iterator<Item = (&'a Arc<str>, &'a PeerAuthentication)>,
) -> Option<(&'a Arc<str>, &'a PeerAuthentication)> {
    all.min_by_key(|(name, one)| (one.created, *name))
}

/// The policy that stands for STRICT, for the workloads that name it.
pub(super) fn strict(root_namespace: &str) -> wire::Authorization {
    deny(root_namespace, STRICT, vec![rule([plaintext()])])
}

/// Its name in xDS.
pub(super) fn strict_name(root_namespace: &str) -> String {
    format!("{root_namespace}/{STRICT}")
}

/// The name in xDS of the policy that stands for the ports of a PeerAuthentication.
pub(super) fn ports_name(name: &ObjectName) -> String {
    format!("{}/{PORTS}{}", name.namespace, name.name)
}

fn deny(namespace: &str, name: &str, rules: Vec<wire::Rule>) -> wire::Authorization {
    wire::Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: wire::Scope::WorkloadSelector.into(),
        action: wire::Action::Deny.into(),
        rules,
        ..Default::default()
    }
}

/// Each match a clause of its own: all have to match.
fn rule(matches: impl IntoIterator<Item = wire::Match>) -> wire::Rule {
    let clause = |one| wire::Clause { matches: vec![one] };
    wire::Rule { clauses: matches.into_iter().map(clause).collect() }
}

/// A client that did not prove who it is.
fn plaintext() -> wire::Match {
    let present = wire::string_match::MatchType::Presence(wire::Presence {});
    wire::Match {
        not_principals: vec![wire::StringMatch { match_type: Some(present) }],
        ..Default::default()
    }
}

impl Index {
    pub(super) fn apply_peer_authentication(
        &mut self,
        name: &ObjectName,
        object: &Custom,
        changes: &mut Changes,
    ) {
        let (new, faults) = PeerAuthentication::read(&self.config.root_namespace, name, object);
        self.note(Kind::PeerAuthentication, name, object, faults, changes);
        let selectors = [new.selector.clone()];
        if let Some((old, wide)) = self.peer_authentications.set(name, Some(new)) {
            let selectors = old.into_iter().map(|old| old.selector).chain(selectors).collect::<Vec<_>>();
            self.touch_peer_authentication(name, &selectors, wide, changes);
        }
    }

    /// What was known of it stays; else it is taken for STRICT in all of its namespace, which is said. It counts as the
    /// oldest.
    pub(super) fn unreadable_peer_authentication(
        &mut self,
        name: &ObjectName,
        changes: &mut Changes,
    ) -> Option<&'static str> {
        if self.peer_authentications.all.get(name).is_some() {
            return None;
        }
        let strict = PeerAuthentication {
            created: i64::MIN,
            selector: Labels::new(),
            mode: Some(Mode::Strict),
            ports: BTreeMap::new(),
        };
        if let Some((_, wide)) = self.peer_authentications.set(name, Some(strict)) {
            self.touch_peer_authentication(name, &[Labels::new()], wide, changes);
        }
        Some("it is taken for STRICT, for all of its namespace")
    }

    pub(super) fn delete_peer_authentication(&mut self, name: &ObjectName, changes: &mut Changes) {
        self.readings.remove(&(Kind::PeerAuthentication, name.clone()));
        if let Some((Some(old), wide)) = self.peer_authentications.set(name, None) {
            self.touch_peer_authentication(name, &[old.selector], wide, changes);
        }
    }

    /// The pods that it selects or selected; and where its namespace says something else than before, `wide`, all that
    /// inherits from it: its namespace's pods and policies, or everyone's.
    fn touch_peer_authentication(
        &self,
        name: &ObjectName,
        selectors: &[Labels],
        wide: bool,
        changes: &mut Changes,
    ) {
        changes.policies.insert(PolicyKey::Ports(name.clone()));
        let everyone = wide && *name.namespace == *self.config.root_namespace;
        let pods = || self.pods_of_namespace.get(&name.namespace).into_iter().flatten();
        if everyone {
            changes.policies.extend(self.peer_authentications.names().into_iter().map(PolicyKey::Ports));
            self.pods.values().for_each(|pod| self.touch_pod(pod, changes));
        } else if wide {
            let named = |name: &Arc<str>, namespace: &Arc<str>| ObjectName {
                namespace: namespace.clone(),
                name: name.clone(),
            };
            let others = self.peer_authentications.all.of(&name.namespace);
            changes.policies.extend(others.map(|(other, _)| PolicyKey::Ports(named(other, &name.namespace))));
            pods().filter_map(|pod| self.pods.get(pod)).for_each(|pod| self.touch_pod(pod, changes));
        } else {
            let selected = |pod: &&Pod| selectors.iter().any(|selector| selects(selector, &pod.labels));
            let pods = pods().filter_map(|pod| self.pods.get(pod)).filter(selected);
            pods.for_each(|pod| self.touch_pod(pod, changes));
        }
    }
}
