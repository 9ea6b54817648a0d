//! Events have two forms, of the core group and of `events.k8s.io`, and are stored in the first. Pure.
//! Reference: `k8s.io/kubernetes/pkg/apis/events/v1/conversion.go`.

use serde_json::Value;

use super::kinds::Kind;
use super::meta::{self, namespace, text};
use super::structure::check::Faults;

/// The names of one field in the core group and in `events.k8s.io`.
const NAMES: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// A core event as `events.k8s.io` has it.
pub(super) fn from_core(event: &mut Value) {
    rename(event, |(core, events)| (core, events));
    event["apiVersion"] = "events.k8s.io/v1".into();
}

/// An event of `events.k8s.io` as the core group has it.
pub(super) fn to_core(event: &mut Value) {
    rename(event, |(core, events)| (events, core));
    event["apiVersion"] = "v1".into();
}

fn rename(event: &mut Value, direction: fn((&'static str, &'static str)) -> (&'static str, &'static str)) {
    let fields = meta::map(event);
    for (from, to) in NAMES.map(direction) {
        if let Some(value) = fields.remove(from) {
            fields.insert(to.to_owned(), value);
        }
    }
}

/// The path in a core event of what `events.k8s.io` has at this path.
pub(super) fn path_in_core(path: &str) -> String {
    let (first, rest) = path.split_at(path.find('.').unwrap_or(path.len()));
    let core = NAMES.iter().find(|(_, events)| *events == first).map_or(first, |(core, _)| core);
    format!("{core}{rest}")
}

/// What is wrong with an event. Those made by way of `events.k8s.io` say who reports them, and what was done.
pub(super) fn faults(kind: &Kind, event: &Value, new: bool) -> Faults {
    let mut faults = Vec::new();
    let about = if kind.group.is_empty() { "involvedObject" } else { "regarding" };
    let place = text(event, &format!("/{about}/namespace"));
    // What has no namespace is told of in the default one.
    let told = if place.is_empty() { "default" } else { place };
    if told != namespace(event) && !(place.is_empty() && namespace(event) == "kube-system") {
        let why = format!("Invalid value: {place:?}: does not match event.namespace");
        faults.push((format!("{about}.namespace"), why));
    }
    if new && !kind.group.is_empty() {
        for field in ["eventTime", "reportingController", "reportingInstance", "action", "reason"] {
            if text(event, &format!("/{field}")).is_empty() {
                faults.push((field.to_owned(), "Required value".to_owned()));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{from_core, to_core};

    #[test]
    fn there_and_back() {
        let core = json!({
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": "e"}, "involvedObject": {"kind": "Pod", "name": "p"},
            "message": "m", "reason": "R", "type": "Normal", "count": 2, "reportingComponent": "c",
            "source": {"component": "c"}, "firstTimestamp": "2025-01-01T00:00:00Z", "lastTimestamp": "2025-01-01T00:00:01Z",
        });
        let mut event = core.clone();
        from_core(&mut event);
        assert_eq!(
            (&event["apiVersion"], &event["regarding"]["name"]),
            (&json!("events.k8s.io/v1"), &json!("p"))
        );
        assert_eq!(
            (&event["note"], &event["deprecatedCount"], event.get("message")),
            (&json!("m"), &json!(2), None)
        );
        to_core(&mut event);
        assert_eq!(event, core);
    }
}
