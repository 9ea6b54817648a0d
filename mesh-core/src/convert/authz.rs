//! `istio.security.Authorization` to [`Authorization`].

use super::{InvalidPart, Names, known, required};
use crate::authz::{Authorization, Scope};
use crate::proto::security as wire;

/// Converts a policy. Its rules are not read yet; see [`crate::authz`] for what that means.
///
/// # Errors
/// When a field is invalid; the resource is to be refused as a whole.
pub fn convert(message: &wire::Authorization, names: &mut Names) -> Result<Authorization, InvalidPart> {
    let _: wire::Action = known("action", message.action)?;
    let scope = scope(message)?;
    Ok(Authorization {
        namespace: names.share(required("namespace", &message.namespace)?),
        name: names.share(required("name", &message.name)?),
        scope,
        dry_run: message.dry_run,
        refused: None,
    })
}

fn scope(message: &wire::Authorization) -> Result<Scope, InvalidPart> {
    Ok(match known("scope", message.scope)? {
        wire::Scope::Global => Scope::Global,
        wire::Scope::Namespace => Scope::Namespace,
        wire::Scope::WorkloadSelector => Scope::Selected,
    })
}

/// What stands for a policy that was refused: it denies whatever the policy may have selected, and no more. Its name
/// is the resource's, since its own may be what is wrong with it; `message` is None when nothing of it could be read.
pub fn refused(
    resource: &str,
    message: Option<&wire::Authorization>,
    reason: &str,
    root_namespace: &str,
    names: &mut Names,
) -> Authorization {
    let (namespace, name) = resource.split_once('/').unwrap_or(("", resource));
    let scope = match message.map(scope) {
        Some(Ok(scope)) => scope,
        // In the root namespace, or in none, it may have been meant for everyone.
        _ if namespace == root_namespace || namespace.is_empty() => Scope::Global,
        _ => Scope::Unreadable,
    };
    Authorization {
        namespace: names.share(namespace),
        name: names.share(name),
        scope,
        dry_run: message.is_some_and(|message| message.dry_run),
        refused: Some(reason.into()),
    }
}
