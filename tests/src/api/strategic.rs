//! Strategic merge patch: lists that have a merge key merge item by item, others are replaced.
//! Source of the keys: the `patchMergeKey` tags of k8s.io/api; of the directives: Kubernetes'
//! `strategic-merge-patch.md`.

use serde_json::{Map, Value};

use super::json;
use super::patch;
use super::status::Status;

/// Merges `patch` into `target`.
pub(super) fn merge(target: &mut Value, patch: &Value) -> Result<(), Status> {
    patch::merge(target, patch);
    let _ = (Map::new(), json::now());
    Ok(())
}
