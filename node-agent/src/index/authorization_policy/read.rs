//! An AuthorizationPolicy's spec to what a proxy can decide at layer 4 (`istio.security.Authorization`).
//!
//! What a proxy cannot decide, for want of a request or because it makes no sense, is resolved towards refusal and
//! reported. An ALLOW rule is left out as a whole, as in Istio. Of a DENY rule the condition is left out, so that the
//! rule denies at least what was meant; in Istio a rule of which nothing is left denies nothing. An AUDIT rule notes more
//! in the same way. CUSTOM, whose decision is somewhere else, is taken for DENY.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::convert::authz::AUDIT;
use mesh_core::proto::security as wire;
use serde_json::{Map, Value};
use wire::string_match::MatchType;

use super::super::event::{Custom, ObjectName};
use super::super::pod::Labels;
use super::AuthorizationPolicy;

/// Istio's annotation: the policy is evaluated and logged, but not enforced.
const DRY_RUN: &str = "istio.io/dry-run";

/// Reads what can be read, and says what cannot.
pub(super) fn read(
    root_namespace: &str,
    name: &ObjectName,
    object: &Custom,
) -> (AuthorizationPolicy, Vec<String>) {
    let mut reader = Reader { namespace: &name.namespace, action: Action::Deny, faults: Vec::new() };
    let spec = &object.spec;
    if is_targeted(spec) {
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
        ..about(root_namespace, name, &selector)
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

/// Whether a waypoint is to enforce it.
fn is_targeted(spec: &Value) -> bool {
    spec["targetRef"].is_object() || spec["targetRefs"].as_array().is_some_and(|refs| !refs.is_empty())
}

/// Sets one attribute of a match, or says why it cannot.
type Set = fn(&mut wire::Match, &str, &[&str], &str) -> Result<(), String>;

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
    namespace: &'a str,
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
        let read = |(i, rule)| self.rule(&format!("spec.rules[{i}]"), rule);
        rules.iter().enumerate().filter_map(read).collect()
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
                        let set = attribute(set, &mut attributes, field, values, self.namespace);
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
            match condition(one, self.namespace) {
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

    /// Notes patterns that match nobody, in Istio neither: most likely something else was meant.
    fn futile(&mut self, path: &str, attributes: &wire::Match) {
        let wire::Match { principals, not_principals, service_accounts, not_service_accounts, .. } =
            attributes;
        let odd = |text: &&str| text.contains('*') || text.starts_with("spiffe://");
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

/// An empty list says nothing.
fn attribute(
    set: Set,
    attributes: &mut wire::Match,
    field: &str,
    values: &Value,
    namespace: &str,
) -> Result<(), String> {
    let values = texts(values)?;
    if values.is_empty() { Ok(()) } else { set(attributes, field, &values, namespace) }
}

fn texts(values: &Value) -> Result<Vec<&str>, String> {
    let wrong = || "is no list of texts".to_owned();
    match values {
        Value::Null => Ok(Vec::new()),
        Value::Array(values) => values.iter().map(|value| value.as_str().ok_or_else(wrong)).collect(),
        _ => Err(wrong()),
    }
}

fn source(set: &mut wire::Match, field: &str, values: &[&str], namespace: &str) -> Result<(), String> {
    match field {
        "principals" => set.principals = patterns(values)?,
        "notPrincipals" => set.not_principals = patterns(values)?,
        "namespaces" => set.namespaces = namespaces(values)?,
        "notNamespaces" => set.not_namespaces = namespaces(values)?,
        "serviceAccounts" => set.service_accounts = accounts(values, namespace)?,
        "notServiceAccounts" => set.not_service_accounts = accounts(values, namespace)?,
        "ipBlocks" => set.source_ips = prefixes(values)?,
        "notIpBlocks" => set.not_source_ips = prefixes(values)?,
        _ => return Err(NEEDS_WAYPOINT.to_owned()),
    }
    Ok(())
}

fn operation(set: &mut wire::Match, field: &str, values: &[&str], _: &str) -> Result<(), String> {
    match field {
        "ports" => set.destination_ports = ports(values)?,
        "notPorts" => set.not_destination_ports = ports(values)?,
        _ => return Err(NEEDS_WAYPOINT.to_owned()),
    }
    Ok(())
}

/// A condition is an attribute of the source or the operation under another name.
fn condition(one: &Value, namespace: &str) -> Result<wire::Match, String> {
    let key = one["key"].as_str().ok_or("has no key")?;
    let (set, fields): (Set, [&str; 2]) = match key {
        "source.principal" => (source, ["principals", "notPrincipals"]),
        "source.namespace" => (source, ["namespaces", "notNamespaces"]),
        "source.serviceAccount" => (source, ["serviceAccounts", "notServiceAccounts"]),
        "source.ip" => (source, ["ipBlocks", "notIpBlocks"]),
        "destination.ip" => (destination, ["values", "notValues"]),
        "destination.port" => (operation, ["ports", "notPorts"]),
        _ => return Err(format!("({key}) {NEEDS_WAYPOINT}")),
    };
    let mut attributes = wire::Match::default();
    for (field, values) in fields.into_iter().zip(["values", "notValues"]) {
        attribute(set, &mut attributes, field, &one[values], namespace)
            .map_err(|reason| format!("({key}) {reason}"))?;
    }
    match attributes == wire::Match::default() {
        true => Err(format!("({key}) has no values")),
        false => Ok(attributes),
    }
}

fn destination(set: &mut wire::Match, field: &str, values: &[&str], _: &str) -> Result<(), String> {
    match field {
        "values" => set.destination_ips = prefixes(values)?,
        _ => set.not_destination_ips = prefixes(values)?,
    }
    Ok(())
}

const NEEDS_WAYPOINT: &str = "cannot be decided without a waypoint";

/// What is left of a pattern without its `*` at one end.
fn text_of(pattern: &wire::StringMatch) -> Option<&str> {
    match pattern.match_type.as_ref()? {
        MatchType::Exact(text) | MatchType::Prefix(text) | MatchType::Suffix(text) => Some(text),
        MatchType::Presence(_) => None,
    }
}

/// `*` is anything, `*x` ends in x, `x*` begins with x.
fn patterns(values: &[&str]) -> Result<Vec<wire::StringMatch>, String> {
    let pattern = |value: &&str| {
        let kind = match *value {
            "" => return Err("has an empty text".to_owned()),
            "*" => MatchType::Presence(wire::Presence {}),
            value => match (value.strip_prefix('*'), value.strip_suffix('*')) {
                (Some(end), _) => MatchType::Suffix(end.to_owned()),
                (None, Some(start)) => MatchType::Prefix(start.to_owned()),
                (None, None) => MatchType::Exact(value.to_owned()),
            },
        };
        Ok(wire::StringMatch { match_type: Some(kind) })
    };
    values.iter().map(pattern).collect()
}

/// Waypoints take a `*` anywhere in a namespace.
fn namespaces(values: &[&str]) -> Result<Vec<wire::StringMatch>, String> {
    let inner = |value: &&&str| {
        value.strip_prefix('*').or_else(|| value.strip_suffix('*')).unwrap_or(value).contains('*')
    };
    match values.iter().find(inner) {
        Some(value) => Err(format!("has {value:?}: a * is understood at one end only")),
        None => patterns(values),
    }
}

/// `namespace/name`, or `name` of the policy's own namespace.
fn accounts(values: &[&str], own: &str) -> Result<Vec<wire::ServiceAccountMatch>, String> {
    let account = |value: &&str| {
        let (namespace, name) = value.split_once('/').unwrap_or((own, value));
        if namespace.is_empty() || name.is_empty() || name.contains('/') {
            return Err(format!("has {value:?}, which is no service account"));
        }
        Ok(wire::ServiceAccountMatch { namespace: namespace.to_owned(), service_account: name.to_owned() })
    };
    values.iter().map(account).collect()
}

/// An address is a prefix of full length.
fn prefixes(values: &[&str]) -> Result<Vec<wire::Address>, String> {
    let prefix = |value: &&str| {
        let whole = || value.parse::<IpAddr>().map(IpNet::from).ok();
        let wrong = || format!("has {value:?}, which is neither an IP address nor a prefix");
        let prefix = value.parse::<IpNet>().ok().or_else(whole).ok_or_else(wrong)?;
        let address = match prefix.network() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        Ok(wire::Address { address, length: prefix.prefix_len().into() })
    };
    values.iter().map(prefix).collect()
}

fn ports(values: &[&str]) -> Result<Vec<u32>, String> {
    let port = |value: &&str| match value.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port.into()),
        _ => Err(format!("has {value:?}, which is no port")),
    };
    values.iter().map(port).collect()
}

#[cfg(test)]
mod tests;
