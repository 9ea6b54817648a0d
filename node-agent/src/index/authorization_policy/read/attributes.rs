//! The attributes that a rule names, each to the words of the wire; an error says why one cannot be decided.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::proto::security as wire;
use serde_json::Value;
use wire::string_match::MatchType;

/// What a policy leaves unsaid.
#[derive(Clone, Copy)]
pub(super) struct Here<'a> {
    /// The policy's own.
    pub(super) namespace: &'a str,
    /// The mesh's own.
    pub(super) trust_domain: &'a str,
}

/// Sets one attribute of a match, or says why it cannot.
pub(super) type Set = fn(&mut wire::Match, &str, &[&str], Here<'_>) -> Result<(), String>;

/// An empty list says nothing.
pub(super) fn attribute(
    set: Set,
    attributes: &mut wire::Match,
    field: &str,
    values: &Value,
    here: Here<'_>,
) -> Result<(), String> {
    let values = texts(values)?;
    if values.is_empty() { Ok(()) } else { set(attributes, field, &values, here) }
}

fn texts(values: &Value) -> Result<Vec<&str>, String> {
    let wrong = || "is no list of texts".to_owned();
    match values {
        Value::Null => Ok(Vec::new()),
        Value::Array(values) => values.iter().map(|value| value.as_str().ok_or_else(wrong)).collect(),
        _ => Err(wrong()),
    }
}

pub(super) fn source(
    set: &mut wire::Match,
    field: &str,
    values: &[&str],
    here: Here<'_>,
) -> Result<(), String> {
    match field {
        "principals" => set.principals = principals(values, here)?,
        "notPrincipals" => set.not_principals = principals(values, here)?,
        "namespaces" => set.namespaces = namespaces(values)?,
        "notNamespaces" => set.not_namespaces = namespaces(values)?,
        "serviceAccounts" => set.service_accounts = accounts(values, here.namespace)?,
        "notServiceAccounts" => set.not_service_accounts = accounts(values, here.namespace)?,
        "ipBlocks" => set.source_ips = prefixes(values)?,
        "notIpBlocks" => set.not_source_ips = prefixes(values)?,
        _ => return Err(NEEDS_WAYPOINT.to_owned()),
    }
    Ok(())
}

pub(super) fn operation(
    set: &mut wire::Match,
    field: &str,
    values: &[&str],
    _: Here<'_>,
) -> Result<(), String> {
    match field {
        "ports" => set.destination_ports = ports(values)?,
        "notPorts" => set.not_destination_ports = ports(values)?,
        _ => return Err(NEEDS_WAYPOINT.to_owned()),
    }
    Ok(())
}

/// A condition is an attribute of the source or the operation under another name.
pub(super) fn condition(one: &Value, here: Here<'_>) -> Result<wire::Match, String> {
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
        attribute(set, &mut attributes, field, &one[values], here)
            .map_err(|reason| format!("({key}) {reason}"))?;
    }
    match attributes == wire::Match::default() {
        true => Err(format!("({key}) has no values")),
        false => Ok(attributes),
    }
}

fn destination(set: &mut wire::Match, field: &str, values: &[&str], _: Here<'_>) -> Result<(), String> {
    match field {
        "values" => set.destination_ips = prefixes(values)?,
        _ => set.not_destination_ips = prefixes(values)?,
    }
    Ok(())
}

const NEEDS_WAYPOINT: &str = "cannot be decided without a waypoint";

/// The trust domain that a pattern names, if that is another than the mesh's own.
pub(super) fn foreign<'a>(pattern: &'a wire::StringMatch, own: &str) -> Option<&'a str> {
    let (MatchType::Exact(text) | MatchType::Prefix(text)) = pattern.match_type.as_ref()? else {
        return None;
    };
    let (domain, _) = text.split_once('/').filter(|_| !text.starts_with("spiffe://"))?;
    (domain != own && !domain.contains('*')).then_some(domain)
}

/// What is left of a pattern without its `*` at one end.
pub(super) fn text_of(pattern: &wire::StringMatch) -> Option<&str> {
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

/// Policies are written for `cluster.local`, and hold in a mesh by another name.
fn principals(values: &[&str], here: Here<'_>) -> Result<Vec<wire::StringMatch>, String> {
    let own = |value: &&str| match value.split_once('/') {
        Some((WELL_KNOWN, rest)) => format!("{}/{rest}", here.trust_domain),
        _ => (*value).to_owned(),
    };
    let values: Vec<String> = values.iter().map(own).collect();
    patterns(&values.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The trust domain that stands for the mesh's own.
const WELL_KNOWN: &str = "cluster.local";

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
