//! `istio.security.Authorization` to [`Authorization`].

use ipnet::IpNet;

use super::{InvalidPart, Names, ip, known, required};
use crate::authz::{Authorization, Clause, Match, Rule, Rules, Scope, ServiceAccount, Text, Values};
use crate::proto::security as wire;

/// Why a policy is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAuthorization {
    /// A field that other messages have too.
    #[error(transparent)]
    Part(#[from] InvalidPart),
    /// A pattern that says nothing.
    #[error("{0} has a match without a value")]
    NoPattern(&'static str),
    /// More than 65535.
    #[error("{0} is no port")]
    Port(u32),
}

/// Converts a policy.
///
/// # Errors
/// When a field is invalid; the resource is to be refused as a whole.
pub fn convert(
    message: &wire::Authorization,
    names: &mut Names,
) -> Result<Authorization, InvalidAuthorization> {
    let namespace = required("namespace", &message.namespace)?;
    let name = required("name", &message.name)?;
    let rules = message.rules.iter().map(|message| rule(message, names)).collect::<Result<_, _>>()?;
    let audit = message.extensions.iter().any(|extension| extension.name == AUDIT);
    Ok(Authorization {
        key: format!("{namespace}/{name}").into(),
        namespace: names.share(namespace),
        scope: scope(message)?,
        dry_run: message.dry_run && !audit,
        rules: match known("action", message.action)? {
            _ if audit => Rules::Audit(rules),
            wire::Action::Allow => Rules::Allow(rules),
            wire::Action::Deny => Rules::Deny(rules),
        },
    })
}

/// The extension that says that a policy is an AUDIT one. The wire has no such action: to proxies that do not know the
/// extension it is a DENY on trial, which refuses nobody.
pub const AUDIT: &str = "ambit.io/audit";

/// What stands for a policy that was refused: it denies whatever the policy may have selected, and no more. Its name
/// is the resource's, since its own may be what is wrong with it; `message` is None when nothing of it could be read.
pub fn refused(
    resource: &str,
    message: Option<&wire::Authorization>,
    reason: &str,
    root_namespace: &str,
    names: &mut Names,
) -> Authorization {
    let (namespace, _) = resource.split_once('/').unwrap_or_default();
    let scope = match message.map(scope) {
        // Of no namespace at all, it may be meant for everyone, and so it may in the root namespace.
        _ if namespace.is_empty() => Scope::Global,
        Some(Ok(scope)) => scope,
        _ if namespace == root_namespace => Scope::Global,
        _ => Scope::Unreadable,
    };
    Authorization {
        key: resource.into(),
        namespace: names.share(namespace),
        scope,
        dry_run: message.is_some_and(|message| message.dry_run),
        rules: Rules::Refused(reason.into()),
    }
}

fn scope(message: &wire::Authorization) -> Result<Scope, InvalidPart> {
    Ok(match known("scope", message.scope)? {
        wire::Scope::Global => Scope::Global,
        wire::Scope::Namespace => Scope::Namespace,
        wire::Scope::WorkloadSelector => Scope::Selected,
    })
}

/// A clause without matches is always true, and left out; one whose matches are all empty never is (as in Istio).
fn rule(message: &wire::Rule, names: &mut Names) -> Result<Rule, InvalidAuthorization> {
    let clauses = message.clauses.iter().filter(|clause| !clause.matches.is_empty());
    let clauses = clauses.map(|clause| {
        let matches = clause.matches.iter().map(|message| one_match(message, names));
        let matches = matches.filter(|one| one.as_ref().map_or(true, |one| !one.is_empty()));
        matches.collect::<Result<_, _>>().map(Clause)
    });
    clauses.collect::<Result<_, _>>().map(Rule)
}

fn one_match(message: &wire::Match, names: &mut Names) -> Result<Match, InvalidAuthorization> {
    Ok(Match {
        namespaces: Values {
            any: texts("namespaces", &message.namespaces, names)?,
            none: texts("not_namespaces", &message.not_namespaces, names)?,
        },
        principals: Values {
            any: texts("principals", &message.principals, names)?,
            none: texts("not_principals", &message.not_principals, names)?,
        },
        service_accounts: Values {
            any: accounts(&message.service_accounts, names),
            none: accounts(&message.not_service_accounts, names),
        },
        source_ips: Values { any: prefixes(&message.source_ips)?, none: prefixes(&message.not_source_ips)? },
        destination_ips: Values {
            any: prefixes(&message.destination_ips)?,
            none: prefixes(&message.not_destination_ips)?,
        },
        destination_ports: Values {
            any: ports(&message.destination_ports)?,
            none: ports(&message.not_destination_ports)?,
        },
    })
}

fn texts(
    field: &'static str,
    messages: &[wire::StringMatch],
    names: &mut Names,
) -> Result<Box<[Text]>, InvalidAuthorization> {
    use wire::string_match::MatchType;
    let text = |message: &wire::StringMatch| match &message.match_type {
        Some(MatchType::Exact(text)) => Ok(Text::Exact(names.share(text))),
        Some(MatchType::Prefix(text)) => Ok(Text::Prefix(names.share(text))),
        Some(MatchType::Suffix(text)) => Ok(Text::Suffix(names.share(text))),
        Some(MatchType::Presence(_)) => Ok(Text::Present),
        None => Err(InvalidAuthorization::NoPattern(field)),
    };
    messages.iter().map(text).collect()
}

fn accounts(messages: &[wire::ServiceAccountMatch], names: &mut Names) -> Box<[ServiceAccount]> {
    let account = |message: &wire::ServiceAccountMatch| ServiceAccount {
        namespace: names.share(&message.namespace),
        name: names.share(&message.service_account),
    };
    messages.iter().map(account).collect()
}

/// IPv4-mapped prefixes are folded, as addresses are.
fn prefixes(messages: &[wire::Address]) -> Result<Box<[IpNet]>, InvalidAuthorization> {
    let prefix = |message: &wire::Address| {
        let address = ip(&message.address)?;
        let mapped = address.is_ipv4() && message.address.len() == 16;
        let invalid = || InvalidPart::PrefixLength { address, length: message.length };
        let length = message.length.checked_sub(if mapped { 96 } else { 0 }).ok_or_else(invalid)?;
        let length = u8::try_from(length).map_err(|_| invalid())?;
        Ok(IpNet::new(address, length).map_err(|_| invalid())?.trunc())
    };
    messages.iter().map(prefix).collect()
}

fn ports(values: &[u32]) -> Result<Box<[u16]>, InvalidAuthorization> {
    let port = |value: &u32| u16::try_from(*value).map_err(|_| InvalidAuthorization::Port(*value));
    values.iter().map(port).collect()
}
