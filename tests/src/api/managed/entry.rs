//! One entry of `metadata.managedFields`: a manager, what it did, and the fields that are its own.

use serde_json::{Value, json};

use super::super::meta::text;
use super::fields::Fields;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    Apply,
    Update,
}

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) manager: String,
    pub(super) operation: Operation,
    pub(super) api_version: String,
    /// Empty for the object itself.
    pub(super) subresource: String,
    pub(super) time: String,
    pub(super) fields: Fields,
}

impl Entry {
    fn is_of(&self, other: &Self) -> bool {
        self.manager == other.manager
            && self.operation == other.operation
            && self.api_version == other.api_version
            && self.subresource == other.subresource
    }

    /// As conflicts name it.
    pub(super) fn told(&self) -> String {
        let mut told = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            told += &format!(" with subresource {:?}", self.subresource);
        }
        if self.operation == Operation::Update {
            told += &format!(" using {}", self.api_version);
            if !self.time.is_empty() {
                told += &format!(" at {}", self.time);
            }
        }
        told
    }
}

/// Reads `managedFields`; none if it says that all managers are to be forgotten.
pub(super) fn parse(managed: &Value) -> Option<Vec<Entry>> {
    let entries = managed.as_array().map_or(&[][..], Vec::as_slice);
    if let [entry] = entries
        && entry.as_object().is_some_and(serde_json::Map::is_empty)
    {
        return None;
    }
    Some(entries.iter().map(read).collect())
}

fn read(entry: &Value) -> Entry {
    let field = |name: &str| text(entry, name).to_owned();
    Entry {
        manager: field("/manager"),
        operation: if text(entry, "/operation") == "Apply" { Operation::Apply } else { Operation::Update },
        api_version: field("/apiVersion"),
        subresource: field("/subresource"),
        time: field("/time"),
        fields: Fields::parse(&entry["fieldsV1"]),
    }
}

/// Takes the entry of the same manager and operation out of the list.
pub(super) fn take(entries: &mut Vec<Entry>, wanted: &Entry) -> Option<Entry> {
    let at = entries.iter().position(|entry| entry.is_of(wanted))?;
    Some(entries.remove(at))
}

/// Writes `managedFields`: who applies first, then by time; managers of nothing are left out.
pub(super) fn to_json(mut entries: Vec<Entry>) -> Value {
    entries.retain(|entry| !entry.fields.is_empty());
    entries.sort_by(|a, b| (a.operation, &a.time, &a.manager).cmp(&(b.operation, &b.time, &b.manager)));
    let written = entries.iter().map(|entry| {
        let operation = if entry.operation == Operation::Apply { "Apply" } else { "Update" };
        let mut written = json!({
            "manager": entry.manager, "operation": operation, "apiVersion": entry.api_version, "time": entry.time,
            "fieldsType": "FieldsV1", "fieldsV1": entry.fields.to_json(),
        });
        if !entry.subresource.is_empty() {
            written["subresource"] = entry.subresource.as_str().into();
        }
        written
    });
    written.collect()
}
