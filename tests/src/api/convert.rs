//! Versions of objects: what is stored, and what each version of a kind shows of it. Pure.

use serde_json::Value;

use super::kinds::Kind;
use super::structure::prune;
use super::{events, meta};

/// The group whose events are the core group's in another form.
pub(super) const EVENTS: &str = "events.k8s.io";

/// A stored object as its kind's version shows it. A custom resource has that version's fields only, and its defaults.
pub(super) fn serve(kind: &Kind, stored: &Value) -> Value {
    let mut object = stored.clone();
    if let Some(custom) = &kind.custom {
        object["apiVersion"] = kind.api_version().into();
        prune::object(&custom.schema, &mut object);
        custom.fill(&mut object);
    } else if kind.group == EVENTS && !meta::name(stored).is_empty() {
        events::from_core(&mut object);
    }
    object
}

/// Makes the object one of the version that is stored. For custom resources the conversion is of strategy None: their
/// versions differ in name.
pub(super) fn to_storage(kind: &Kind, object: &mut Value) {
    if let Some(custom) = &kind.custom {
        object["apiVersion"] = format!("{}/{}", kind.group, custom.storage).into();
    } else if kind.group == EVENTS {
        events::to_core(object);
    }
}
