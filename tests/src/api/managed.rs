//! `metadata.managedFields`: who set which field, and server-side apply, which follows from it. Pure.
//! Reference: `sigs.k8s.io/structured-merge-diff/merge` and `k8s.io/apimachinery/pkg/util/managedfields`.
//! **Invariant:** a field that nobody applies any more goes, and one that another manager set is changed only by force.

mod compare;
mod entry;
mod fields;
mod merge;
mod shape;

use serde_json::{Value, json};

use super::cluster::Part;
use super::kinds::Kind;
use super::meta;
use super::status::Status;
use compare::Comparison;
use entry::{Entry, Operation};
use fields::Fields;
use shape::Shape;

/// Fields of every object that the server sets.
const SERVERS: [&str; 8] = [
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "selfLink",
    "managedFields",
];

/// One write of one manager.
pub(super) struct Writer<'a> {
    pub(super) kind: &'a Kind,
    /// As the client names itself.
    pub(super) name: &'a str,
    pub(super) part: Part,
    pub(super) force: bool,
}

impl Writer<'_> {
    /// Who manages what after `old` was replaced by `new`. `said` is what the new object itself says of it, which
    /// counts instead of what `old` says unless it is empty; a list with one empty entry stands for no managers.
    pub(super) fn update(&self, old: &Value, new: &Value, said: Option<&Value>) -> Value {
        let said = said.filter(|said| said.as_array().is_some_and(|entries| !entries.is_empty()));
        let Some(mut entries) = entry::parse(said.unwrap_or(&old["metadata"]["managedFields"])) else {
            return json!([]);
        };
        let changes = self.compare(old, new);
        let mine = self.entry(Operation::Update);
        let unchanged = changes.changed.is_empty() && changes.removed.is_empty();
        let before = entry::take(&mut entries, &mine).unwrap_or_else(|| mine.clone());
        hand_over(&mut entries, &changes);
        let fields = before.fields.without(&changes.removed).union(&changes.changed);
        let time = if unchanged { before.time } else { mine.time.clone() };
        entries.push(Entry { fields, time, ..mine });
        entry::to_json(entries)
    }

    /// The object after `config` was applied to it, with its managers; none is an object that is not there yet.
    pub(super) fn apply(&self, live: Option<&Value>, config: &Value) -> Result<Value, Status> {
        if self.name.is_empty() {
            let cause = ("fieldManager".to_owned(), "Required value: is required for apply patch".to_owned());
            return Err(Status::invalid("PatchOptions", "meta.k8s.io", "", &[cause]));
        }
        if config.pointer("/metadata/managedFields").is_some_and(|said| !said.is_null()) {
            return Err(Status::bad_request("metadata.managedFields must be nil"));
        }
        let config = self.config(config);
        let shape = self.shape();
        let old = live.cloned().unwrap_or_else(|| json!({}));
        let mut entries = entry::parse(&old["metadata"]["managedFields"]).unwrap_or_default();
        if entries.is_empty() && live.is_some() {
            let first = Writer { name: "before-first-apply", ..*self };
            let fields = self.compare(&json!({}), &old).changed;
            entries.push(Entry { fields, ..first.entry(Operation::Update) });
        }
        let mut mine = self.entry(Operation::Apply);
        let before = entry::take(&mut entries, &mine);
        mine.fields = self.owned(compare::named(shape, &config));
        let last = before.as_ref().map(|entry| entry.fields.clone()).unwrap_or_default();

        let mut new = old.clone();
        merge::merge(shape, &mut new, &config);
        let kept = entries.iter().fold(mine.fields.clone(), |kept, other| kept.union(&other.fields));
        merge::remove(shape, &mut new, &last.without(&mine.fields), Some(&kept));
        let changes = self.compare(&old, &new);
        self.check_conflicts(&entries, &changes)?;
        hand_over(&mut entries, &changes);
        let unchanged = changes.changed.is_empty() && changes.removed.is_empty() && last == mine.fields;
        if let Some(before) = before.filter(|_| unchanged) {
            mine.time = before.time;
        }
        entries.push(mine);
        meta::metadata(&mut new).insert("managedFields".to_owned(), entry::to_json(entries));
        Ok(new)
    }

    fn shape(&self) -> Shape<'_> {
        Shape::of(self.kind.custom.as_ref().map(|custom| &custom.schema))
    }

    fn entry(&self, operation: Operation) -> Entry {
        Entry {
            manager: self.name.to_owned(),
            operation,
            api_version: self.kind.api_version(),
            subresource: self.part.subresource().to_owned(),
            time: meta::now(),
            fields: Fields::default(),
        }
    }

    fn compare(&self, old: &Value, new: &Value) -> Comparison {
        let Comparison { changed, removed } = compare::compare(self.shape(), old, new);
        Comparison { changed: self.owned(changed), removed: self.owned(removed) }
    }

    /// Those of the fields that clients can own in this part of the object.
    fn owned(&self, mut fields: Fields) -> Fields {
        fields.owned = false;
        fields.below.remove("f:apiVersion");
        fields.below.remove("f:kind");
        if let Some(metadata) = fields.below.get_mut("f:metadata") {
            metadata.owned = false;
            metadata
                .below
                .retain(|name, _| !SERVERS.iter().any(|server| name.strip_prefix("f:") == Some(server)));
        }
        fields.below.retain(|name, _| match self.part {
            Part::Whole | Part::Scale => !(self.kind.status && name == "f:status"),
            Part::Status => name == "f:status" || name == "f:metadata" && self.kind.group.is_empty(),
        });
        fields
    }

    /// The configuration without what this part of the object does not take, and without nulls, which say nothing.
    fn config(&self, config: &Value) -> Value {
        let mut config = config.clone();
        drop_nulls(&mut config);
        meta::map(&mut config).retain(|name, _| match self.part {
            Part::Whole | Part::Scale => !(self.kind.status && name == "status"),
            Part::Status => ["apiVersion", "kind", "metadata", "status"].contains(&name.as_str()),
        });
        config
    }

    fn check_conflicts(&self, others: &[Entry], changes: &Comparison) -> Result<(), Status> {
        if self.force {
            return Ok(());
        }
        let conflicts: Vec<(&Entry, Vec<String>)> = others
            .iter()
            .map(|other| (other, other.fields.intersection(&changes.changed).paths()))
            .filter(|(_, paths)| !paths.is_empty())
            .collect();
        if conflicts.is_empty() { Ok(()) } else { Err(refusal(&conflicts)) }
    }
}

/// What was changed is no longer the others', and what was removed is nobody's.
fn hand_over(others: &mut [Entry], changes: &Comparison) {
    for other in others {
        other.fields = other.fields.without(&changes.changed).without(&changes.removed);
    }
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// 409 in the words that `kubectl` shows.
fn refusal(conflicts: &[(&Entry, Vec<String>)]) -> Status {
    let causes: Vec<Value> = conflicts
        .iter()
        .flat_map(|(entry, paths)| paths.iter().map(move |path| (entry, path)))
        .map(|(entry, path)| {
            let message = format!("conflict with {}", entry.told());
            json!({"reason": "FieldManagerConflict", "message": message, "field": path})
        })
        .collect();
    let message = match conflicts {
        [(entry, paths)] if paths.len() == 1 => {
            format!("Apply failed with 1 conflict: conflict with {}: {}", entry.told(), paths[0])
        }
        _ => {
            let mut told: Vec<String> = conflicts
                .iter()
                .map(|(entry, paths)| format!("conflicts with {}:\n- {}", entry.told(), paths.join("\n- ")))
                .collect();
            told.sort();
            format!("Apply failed with {} conflicts: {}", causes.len(), told.join("\n"))
        }
    };
    Status::apply_conflict(message, causes)
}

#[cfg(test)]
mod tests;
