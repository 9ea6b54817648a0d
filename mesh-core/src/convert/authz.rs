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
    let scope = match known("scope", message.scope)? {
        wire::Scope::Global => Scope::Global,
        wire::Scope::Namespace => Scope::Namespace,
        wire::Scope::WorkloadSelector => Scope::Selected,
    };
    Ok(Authorization {
        namespace: names.share(required("namespace", &message.namespace)?),
        name: names.share(required("name", &message.name)?),
        scope,
        dry_run: message.dry_run,
    })
}
