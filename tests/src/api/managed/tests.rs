use serde_json::{Value, json};

use super::Writer;
use crate::api::cluster::Part;
use crate::api::kinds::{Kind, Kinds};
use crate::api::status::Status;

fn deployments() -> std::sync::Arc<Kind> {
    Kinds::new().named("deployments").unwrap()
}

fn apply(kind: &Kind, name: &str, force: bool, live: Option<&Value>, spec: &Value) -> Result<Value, Status> {
    let config =
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": spec});
    Writer { kind, name, part: Part::Whole, force }.apply(live, &config)
}

fn update(kind: &Kind, name: &str, old: &Value, new: &Value) -> Value {
    let mut new = new.clone();
    let managed = Writer { kind, name, part: Part::Whole, force: false }.update(old, &new, None);
    new["metadata"]["managedFields"] = managed;
    new
}

/// `manager operation: fields` of each entry.
fn owners(object: &Value) -> Vec<String> {
    let told = |entry: &Value| {
        let fields = super::Fields::parse(&entry["fieldsV1"]).paths().join(" ");
        format!("{} {}: {fields}", entry["manager"].as_str().unwrap(), entry["operation"].as_str().unwrap())
    };
    object["metadata"]["managedFields"].as_array().unwrap().iter().map(told).collect()
}

#[test]
fn what_is_no_longer_applied_goes() {
    let kind = deployments();
    let first = apply(&kind, "a", false, None, &json!({"replicas": 1, "paused": true})).unwrap();
    assert_eq!(owners(&first), ["a Apply: .spec.paused .spec.replicas"]);
    let second = apply(&kind, "a", false, Some(&first), &json!({"replicas": 1})).unwrap();
    assert_eq!(second["spec"], json!({"replicas": 1}));
    assert_eq!(owners(&second), ["a Apply: .spec.replicas"]);
    // The same again changes nothing, not even the time.
    let again = apply(&kind, "a", false, Some(&second), &json!({"replicas": 1})).unwrap();
    assert_eq!(again, second);
}

#[test]
fn a_shared_field_stays_until_its_last_owner_lets_go() {
    let kind = deployments();
    let first = apply(&kind, "a", false, None, &json!({"replicas": 1})).unwrap();
    let both = apply(&kind, "b", false, Some(&first), &json!({"replicas": 1, "paused": true})).unwrap();
    assert_eq!(owners(&both), ["a Apply: .spec.replicas", "b Apply: .spec.paused .spec.replicas"]);
    let without = apply(&kind, "a", false, Some(&both), &json!({"minReadySeconds": 5})).unwrap();
    assert_eq!(without["spec"], json!({"replicas": 1, "paused": true, "minReadySeconds": 5}));
    assert_eq!(owners(&without), ["a Apply: .spec.minReadySeconds", "b Apply: .spec.paused .spec.replicas"]);
}

#[test]
fn another_value_is_a_conflict_unless_forced() {
    let kind = deployments();
    let first = apply(&kind, "a", false, None, &json!({"replicas": 1, "paused": true})).unwrap();
    let refused = apply(&kind, "b", false, Some(&first), &json!({"replicas": 2})).unwrap_err();
    assert_eq!((refused.code, refused.reason), (409, "Conflict"));
    assert_eq!(refused.message, "Apply failed with 1 conflict: conflict with \"a\": .spec.replicas");
    assert_eq!(
        refused.details["causes"],
        json!([{"reason": "FieldManagerConflict", "message": "conflict with \"a\"", "field": ".spec.replicas"}])
    );
    let refused =
        apply(&kind, "b", false, Some(&first), &json!({"replicas": 2, "paused": false})).unwrap_err();
    assert_eq!(
        refused.message,
        "Apply failed with 2 conflicts: conflicts with \"a\":\n- .spec.paused\n- .spec.replicas"
    );
    let forced = apply(&kind, "b", true, Some(&first), &json!({"replicas": 2})).unwrap();
    assert_eq!(owners(&forced), ["a Apply: .spec.paused", "b Apply: .spec.replicas"]);
    assert_eq!(forced["spec"], json!({"replicas": 2, "paused": true}));
}

#[test]
fn updates_take_what_they_change() {
    let kind = deployments();
    let first = apply(&kind, "a", false, None, &json!({"replicas": 1, "paused": true})).unwrap();
    let mut scaled = first.clone();
    scaled["spec"]["replicas"] = 5.into();
    let scaled = update(&kind, "scaler", &first, &scaled);
    assert_eq!(owners(&scaled), ["a Apply: .spec.paused", "scaler Update: .spec.replicas"]);
    let refused =
        apply(&kind, "a", false, Some(&scaled), &json!({"replicas": 1, "paused": true})).unwrap_err();
    let start = "Apply failed with 1 conflict: conflict with \"scaler\" using apps/v1 at 20";
    assert!(
        refused.message.starts_with(start) && refused.message.ends_with("Z: .spec.replicas"),
        "{refused}"
    );
    // With the value that is there, both have it.
    let shared = apply(&kind, "a", false, Some(&scaled), &json!({"replicas": 5, "paused": true})).unwrap();
    assert_eq!(owners(&shared), ["a Apply: .spec.paused .spec.replicas", "scaler Update: .spec.replicas"]);
    let mut removed = shared.clone();
    removed["spec"].as_object_mut().unwrap().remove("replicas");
    assert_eq!(owners(&update(&kind, "scaler", &shared, &removed)), ["a Apply: .spec.paused"]);
}

#[test]
fn items_with_keys_have_owners_of_their_own() {
    let kind = deployments();
    let containers = |list: Value| json!({"template": {"spec": {"containers": list}}});
    let first = containers(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]));
    let first = apply(&kind, "x", false, None, &first).unwrap();
    let sidecar = containers(json!([{"name": "s", "image": "2"}, {"name": "a", "tty": true}]));
    let second = apply(&kind, "y", false, Some(&first), &sidecar).unwrap();
    let third =
        apply(&kind, "x", false, Some(&second), &containers(json!([{"name": "b", "image": "1"}]))).unwrap();
    let list = &third["spec"]["template"]["spec"]["containers"];
    assert_eq!(list.as_array().unwrap().len(), 3, "{list}");
    for item in [
        json!({"name": "s", "image": "2"}),
        json!({"name": "a", "tty": true}),
        json!({"name": "b", "image": "1"}),
    ] {
        assert!(list.as_array().unwrap().contains(&item), "{item} in {list}");
    }
}

#[test]
fn status_is_of_the_subresource() {
    let kind = deployments();
    let live = apply(&kind, "a", false, None, &json!({"replicas": 1})).unwrap();
    let config = json!({"spec": {"replicas": 9}, "status": {"replicas": 1}});
    let whole = Writer { kind: &kind, name: "b", part: Part::Whole, force: true }
        .apply(Some(&live), &config)
        .unwrap();
    assert_eq!((&whole["spec"]["replicas"], &whole["status"]), (&json!(9), &Value::Null));
    let status = Writer { kind: &kind, name: "b", part: Part::Status, force: false }
        .apply(Some(&live), &config)
        .unwrap();
    assert_eq!((&status["spec"]["replicas"], &status["status"]), (&json!(1), &json!({"replicas": 1})));
    let entry = &status["metadata"]["managedFields"][1];
    assert_eq!(
        (&entry["subresource"], &entry["fieldsV1"]),
        (&json!("status"), &json!({"f:status": {"f:replicas": {}}}))
    );
}

#[test]
fn managers_can_be_named_and_forgotten() {
    let kind = deployments();
    let live = apply(&kind, "a", false, None, &json!({"replicas": 1})).unwrap();
    let writer = Writer { kind: &kind, name: "b", part: Part::Whole, force: false };
    assert_eq!(writer.update(&live, &live, Some(&json!([{}]))), json!([]));
    assert_eq!(writer.update(&live, &live, Some(&json!([]))), live["metadata"]["managedFields"]);
    // Of an object without managers everything is of those that were before the first apply.
    let mut bare = live;
    bare["metadata"]["managedFields"] = json!([]);
    let refused = apply(&kind, "b", false, Some(&bare), &json!({"replicas": 2})).unwrap_err();
    assert!(refused.message.contains("conflict with \"before-first-apply\" using apps/v1"), "{refused}");
    let nameless = Writer { kind: &kind, name: "", part: Part::Whole, force: false };
    assert_eq!(nameless.apply(None, &json!({})).unwrap_err().code, 422);
    let said = json!({"metadata": {"managedFields": [{"manager": "x"}]}});
    assert_eq!(writer.apply(None, &said).unwrap_err().code, 400);
}
