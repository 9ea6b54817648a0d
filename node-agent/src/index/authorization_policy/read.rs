//! An AuthorizationPolicy's spec to what a proxy can decide at layer 4 (`istio.security.Authorization`).
//!
//! What a proxy cannot decide, for want of a request or because it makes no sense, is resolved towards refusal and
//! reported. An ALLOW rule is left out as a whole, as in Istio. Of a DENY rule the condition is left out, so that the
//! rule denies at least what was meant; in Istio a rule of which nothing is left denies nothing. An AUDIT rule notes more
//! in the same way. CUSTOM, whose decision is somewhere else, is taken for DENY.
//!
//! In principals `cluster.local` stands for the mesh's own trust domain, whatever that is (Istio: of whole principals).

mod attributes;

use std::sync::Arc;

use mesh_core::convert::authz::AUDIT;
use mesh_core::proto::security as wire;
use serde_json::{Map, Value};

use super::super::Config;
use super::super::event::{Custom, ObjectName};
use super::super::pod::Labels;
use super::AuthorizationPolicy;
use attributes::{Here, Set, attribute, condition, foreign, operation, source, text_of};

/// Istio's annotation: the policy is evaluated and logged, but not enforced.
const DRY_RUN: &str = "istio.io/dry-run";

/// Reads what can be read, and says what cannot.
pub(super) fn read(
    config: &Config,
    name: &ObjectName,
    object: &Custom,
) -> (AuthorizationPolicy, Vec<String>) {
    let here = Here { namespace: &name.namespace, trust_domain: &config.trust_domain };
    let mut reader = Reader { here, action: Action::Deny, faults: Vec::new() };
    let spec = &object.spec;
    if is_targeted(spec) {
        reader.faults.push(NO_WAYPOINT.to_owned());
        return (AuthorizationPolicy { selector: Labels::new(), enforced: None }, reader.faults);
    }
    reader.action = reader.action(&spec["action"]);
    let selector = reader.selector(&spec["selector"]["matchLabels"]);
    let rules = match (&selector, reader.action) {
        // It may be about fewer than all: whom its rules let in is not to be let in to the others.
        (None, Action::Allow) => Vec::new(),
        _ => reader.rules(&spec["rules"]),
    };
    let selector = selector.unwrap_or_default();
    let audit = reader.action == Action::Audit;
    let extension = || wire::Extension { name: AUDIT.to_owned(), config: None };
    let enforced = wire::Authorization {
        dry_run: reader.dry_run(object) || audit,
        action: if reader.action == Action::Allow { wire::Action::Allow } else { wire::Action::Deny }.into(),
        rules,
        extensions: audit.then(extension).into_iter().collect(),
        ..about(&config.root_namespace, name, &selector)
    };
    (AuthorizationPolicy { selector, enforced: Some(Arc::new(enforced)) }, reader.faults)
}

/// What stands for one of which nothing is known but its name.
pub(super) fn unreadable(root_namespace: &str, name: &ObjectName) -> AuthorizationPolicy {
    let everything = wire::Authorization {
        action: wire::Action::Deny.into(),
        rules: vec![wire::Rule::default()],
        ..about(root_namespace, name, &Labels::new())
    };
    AuthorizationPolicy { selector: Labels::new(), enforced: Some(Arc::new(everything)) }
}

/// A policy that says nothing yet, about these workloads.
fn about(root_namespace: &str, name: &ObjectName, selector: &Labels) -> wire::Authorization {
    let scope = match *name.namespace == *root_namespace {
        _ if !selector.is_empty() => wire::Scope::WorkloadSelector,
        true => wire::Scope::Global,
        false => wire::Scope::Namespace,
    };
    wire::Authorization {
        name: name.name.to_string(),
        namespace: name.namespace.to_string(),
        scope: scope.into(),
        ..Default::default()
    }
}

const NO_WAYPOINT: &str =
    "spec.targetRefs needs a waypoint, and this mesh has none: the policy is enforced by nobody";

/// Whether a waypoint is to enforce it.
fn is_targeted(spec: &Value) -> bool {
    spec["targetRef"].is_object() || spec["targetRefs"].as_array().is_some_and(|refs| !refs.is_empty())
}

/// A condition that does not narrow the rule is left out.
type Clause = Option<wire::Clause>;

/// Something of an ALLOW rule cannot be decided.
struct LeftOut;

/// What becomes of what the rules match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Allow,
    Deny,
    Audit,
}

struct Reader<'a> {
    here: Here<'a>,
    action: Action,
    faults: Vec<String>,
}

impl Reader<'_> {
    /// None: it cannot be read.
    fn selector(&mut self, labels: &Value) -> Option<Labels> {
        if labels.is_null() {
            return Some(Labels::new());
        }
        let read = serde_json::from_value(labels.clone()).ok();
        if read.is_none() {
            let allows = if self.action == Action::Allow { ", and allows nothing" } else { "" };
            let fault = "spec.selector.matchLabels is no map of texts: the policy is about all pods";
            self.faults.push(format!("{fault}{allows}"));
        }
        read
    }

    fn action(&mut self, action: &Value) -> Action {
        match action {
            Value::Null => Action::Allow,
            Value::String(text) if text.is_empty() || text == "ALLOW" => Action::Allow,
            Value::String(text) if text == "DENY" => Action::Deny,
            Value::String(text) if text == "AUDIT" => Action::Audit,
            Value::String(text) if text == "CUSTOM" => {
                let fault = "spec.action CUSTOM needs a waypoint, which asks the provider: what the rules match is denied";
                self.faults.push(fault.to_owned());
                Action::Deny
            }
            other => {
                self.faults.push(format!("spec.action is {other}, which is no action: it is taken for DENY"));
                Action::Deny
            }
        }
    }

    fn dry_run(&mut self, object: &Custom) -> bool {
        let annotation = object.metadata.annotations.as_ref().and_then(|all| all.get(DRY_RUN));
        match annotation.map(String::as_str) {
            // What Go's strconv.ParseBool takes.
            Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
            None | Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
            Some(other) => {
                self.faults.push(format!("annotation {DRY_RUN} is {other:?}: the policy is enforced"));
                false
            }
        }
    }

    fn rules(&mut self, rules: &Value) -> Vec<wire::Rule> {
        let rules = match rules {
            Value::Null => return Vec::new(),
            Value::Array(rules) => rules,
            _ => {
                self.faults.push(format!("spec.rules is no list: {}", self.consequence()));
                return match self.action {
                    Action::Allow => Vec::new(),
                    Action::Deny | Action::Audit => vec![wire::Rule::default()],
                };
            }
        };
        // One that is left out keeps its place, so that the others are told by the numbers that they have in the policy.
        let read = |(i, rule)| self.rule(&format!("spec.rules[{i}]"), rule).unwrap_or_else(never);
        rules.iter().enumerate().map(read).collect()
    }

    /// None: left out.
    fn rule(&mut self, path: &str, rule: &Value) -> Option<wire::Rule> {
        let empty = Map::new();
        let fields = match rule {
            Value::Null => &empty,
            Value::Object(fields) => fields,
            _ => {
                let left_out = self.fault(&format!("{path} is no rule")).is_err();
                return (!left_out).then(wire::Rule::default);
            }
        };
        let (mut clauses, mut left_out) = (Vec::new(), false);
        for (field, value) in fields {
            let path = format!("{path}.{field}");
            let all = match field.as_str() {
                "from" => self.alternatives(&path, value, "source", source).map(Vec::from_iter),
                "to" => self.alternatives(&path, value, "operation", operation).map(Vec::from_iter),
                "when" => self.conditions(&path, value),
                _ => self.fault(&format!("{path} is not known")).map(|()| Vec::new()),
            };
            match all {
                Ok(all) => clauses.extend(all),
                Err(LeftOut) => left_out = true,
            }
        }
        (!left_out).then_some(wire::Rule { clauses })
    }

    /// One of them is enough.
    fn alternatives(&mut self, path: &str, list: &Value, inner: &str, set: Set) -> Result<Clause, LeftOut> {
        let (mut matches, mut anything, mut result) = (Vec::new(), false, Ok(()));
        for (i, one) in self.list(path, list)?.iter().enumerate() {
            let path = format!("{path}[{i}].{inner}");
            let mut attributes = wire::Match::default();
            let mut faults = Vec::new();
            match one[inner].as_object() {
                Some(fields) if one.as_object().is_some_and(|one| one.len() == 1) => {
                    for (field, values) in fields {
                        let set = attribute(set, &mut attributes, field, values, self.here);
                        faults.extend(set.err().map(|reason| format!("{path}.{field} {reason}")));
                    }
                    self.futile(&path, &attributes);
                }
                _ => faults.push(format!("{path} is missing, or not alone")),
            }
            let says_nothing = attributes == wire::Match::default();
            if says_nothing && faults.is_empty() {
                faults.push(format!("{path} says nothing"));
            }
            for fault in faults {
                result = self.fault(&fault);
            }
            anything |= says_nothing;
            matches.push(attributes);
        }
        result?;
        Ok((!anything && !matches.is_empty()).then_some(wire::Clause { matches }))
    }

    /// Each of them has to hold.
    fn conditions(&mut self, path: &str, list: &Value) -> Result<Vec<wire::Clause>, LeftOut> {
        let (mut clauses, mut result) = (Vec::new(), Ok(()));
        for (i, one) in self.list(path, list)?.iter().enumerate() {
            match condition(one, self.here) {
                Ok(attributes) => {
                    self.futile(&format!("{path}[{i}]"), &attributes);
                    clauses.push(wire::Clause { matches: vec![attributes] });
                }
                Err(reason) => result = self.fault(&format!("{path}[{i}] {reason}")),
            }
        }
        result.map(|()| clauses)
    }

    fn list<'v>(&mut self, path: &str, list: &'v Value) -> Result<&'v [Value], LeftOut> {
        match list {
            Value::Null => Ok(&[]),
            Value::Array(list) => Ok(list),
            _ => self.fault(&format!("{path} is no list")).map(|()| [].as_slice()),
        }
    }

    /// Notes patterns that match nobody of this mesh, in Istio neither: most likely something else was meant.
    fn futile(&mut self, path: &str, attributes: &wire::Match) {
        let wire::Match { principals, not_principals, service_accounts, not_service_accounts, .. } =
            attributes;
        let odd = |text: &&str| text.contains('*') || text.starts_with("spiffe://");
        let own = self.here.trust_domain;
        let domains = principals.iter().chain(not_principals).filter_map(|pattern| foreign(pattern, own));
        self.faults.extend(domains.map(|domain| {
            format!("{path} is about the trust domain {domain:?}, and so about nobody of this mesh, which is {own:?}")
        }));
        let principals = principals.iter().chain(not_principals).filter_map(text_of);
        let accounts = service_accounts.iter().chain(not_service_accounts);
        let accounts = accounts.flat_map(|account| [account.namespace.as_str(), &account.service_account]);
        let fault = |text| {
            format!(
                "{path} has {text:?}, which matches nobody: a * is understood at one end of a principal only, and no \
                 principal has a scheme"
            )
        };
        self.faults.extend(principals.chain(accounts).filter(odd).map(fault));
    }

    /// Notes what cannot be decided; of an ALLOW policy it takes the rule along.
    fn fault(&mut self, fault: &str) -> Result<(), LeftOut> {
        self.faults.push(format!("{fault}: {}", self.consequence()));
        match self.action {
            Action::Allow => Err(LeftOut),
            Action::Deny | Action::Audit => Ok(()),
        }
    }

    fn consequence(&self) -> &'static str {
        match self.action {
            Action::Allow => "the rule is left out and allows nothing",
            Action::Deny => "the rule denies whatever else it says, without this",
            Action::Audit => "the rule notes whatever else it says, without this",
        }
    }
}

/// A clause whose matches are all empty never matches (as in Istio).
fn never() -> wire::Rule {
    wire::Rule { clauses: vec![wire::Clause { matches: vec![wire::Match::default()] }] }
}

#[cfg(test)]
mod tests;
