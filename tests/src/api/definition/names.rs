//! Which names of a definition are accepted, and the conditions that tell it. Pure.
//! Reference: `k8s.io/apiextensions-apiserver/pkg/controller/status/naming_controller.go`.

use serde_json::{Value, json};

use super::super::meta::{self, items, text};

/// The status of `definition`, whose neighbours of the same group have these accepted names.
pub(super) fn status(definition: &Value, others: &[&Value]) -> Value {
    let mut status = definition["status"].clone();
    let mut accepted = status["acceptedNames"].clone();
    meta::map(&mut accepted);
    let mut refused = None;
    let names = &definition["spec"]["names"];
    for (field, reason) in [
        ("plural", "PluralConflict"),
        ("singular", "SingularConflict"),
        ("shortNames", "ShortNamesConflict"),
        ("kind", "KindConflict"),
        ("listKind", "ListKindConflict"),
    ] {
        let kinds = field.to_lowercase().ends_with("kind");
        let taken = |word: &&str| others.iter().any(|other| uses(other, word, kinds));
        let wanted: Vec<&str> = match &names[field] {
            Value::Array(words) => words.iter().filter_map(Value::as_str).collect(),
            word => word.as_str().into_iter().collect(),
        };
        match wanted.iter().find(|word| taken(word)) {
            Some(word) => refused = refused.or(Some((reason, format!("{word:?} is already in use")))),
            None if names[field].is_null() => drop(meta::map(&mut accepted).remove(field)),
            None => accepted[field] = names[field].clone(),
        }
    }
    match &names["categories"] {
        Value::Null => drop(meta::map(&mut accepted).remove("categories")),
        categories => accepted["categories"] = categories.clone(),
    }
    status["acceptedNames"] = accepted;
    status["storedVersions"] = stored(definition, &definition["status"]);
    let established = holds(&status, "Established");
    match &refused {
        None => set(&mut status, "NamesAccepted", true, "NoConflicts", "no conflicts found"),
        Some((reason, why)) => set(&mut status, "NamesAccepted", false, reason, why),
    }
    match &refused {
        _ if established => {}
        None => set(
            &mut status,
            "Established",
            true,
            "InitialNamesAccepted",
            "the initial names have been accepted",
        ),
        Some(_) => set(&mut status, "Established", false, "NotAccepted", "not all names are accepted"),
    }
    status
}

/// Whether a name is among these; kinds and resources are apart.
fn uses(names: &Value, word: &str, kinds: bool) -> bool {
    let fields: &[&str] = if kinds { &["/kind", "/listKind"] } else { &["/plural", "/singular"] };
    fields.iter().any(|field| text(names, field) == word)
        || !kinds && items(names, "/shortNames").any(|short| short == word)
}

/// The versions in which objects may be stored: those so far, and the one of now.
pub(super) fn stored(definition: &Value, status: &Value) -> Value {
    let mut stored: Vec<Value> = items(status, "/storedVersions").cloned().collect();
    for version in items(definition, "/spec/versions").filter(|version| version["storage"] == true) {
        if !stored.contains(&version["name"]) {
            stored.push(version["name"].clone());
        }
    }
    stored.into()
}

/// Whether the definition's kinds are served.
pub(super) fn is_established(definition: &Value) -> bool {
    holds(&definition["status"], "Established")
}

/// Tells in the status that the definition is going away.
pub(super) fn set_terminating(definition: &mut Value) {
    let why = "CustomResource deletion is in progress";
    set(&mut definition["status"], "Terminating", true, "InstanceDeletionInProgress", why);
}

fn holds(status: &Value, condition: &str) -> bool {
    items(status, "/conditions").any(|found| found["type"] == condition && found["status"] == "True")
}

/// Sets a condition; the time stays where its status does.
fn set(status: &mut Value, condition: &str, holds: bool, reason: &str, message: &str) {
    let value = if holds { "True" } else { "False" };
    let new = json!({
        "type": condition, "status": value, "lastTransitionTime": meta::now(), "reason": reason, "message": message,
    });
    let conditions = status["conditions"].as_array_mut();
    let found = conditions.and_then(|all| all.iter_mut().find(|found| found["type"] == condition));
    match found {
        Some(found) if found["status"] == value => {
            found["reason"] = reason.into();
            found["message"] = message.into();
        }
        Some(found) => *found = new,
        None => meta::push(status, "conditions", new),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::status;

    fn definition(names: &Value) -> Value {
        json!({"spec": {"group": "x.io", "names": names, "versions": [{"name": "v1", "storage": true}]}})
    }

    fn conditions(status: &Value) -> Vec<String> {
        let told = |condition: &Value| {
            format!(
                "{} {} {} {}",
                condition["type"].as_str().unwrap(),
                condition["status"].as_str().unwrap(),
                condition["reason"].as_str().unwrap(),
                condition["message"].as_str().unwrap()
            )
        };
        status["conditions"].as_array().unwrap().iter().map(told).collect()
    }

    #[test]
    fn free_names_are_accepted() {
        let names =
            json!({"plural": "things", "singular": "thing", "kind": "Thing", "listKind": "ThingList"});
        let status = status(&definition(&names), &[]);
        assert_eq!(status["acceptedNames"], names);
        assert_eq!(status["storedVersions"], json!(["v1"]));
        assert_eq!(
            conditions(&status),
            [
                "NamesAccepted True NoConflicts no conflicts found",
                "Established True InitialNamesAccepted the initial names have been accepted"
            ]
        );
    }

    #[test]
    fn names_of_others_are_not() {
        let other = json!({"plural": "others", "singular": "other", "shortNames": ["o"], "kind": "Thing"});
        let names =
            json!({"plural": "things", "singular": "thing", "shortNames": ["t", "o"], "kind": "Thing"});
        let refused = status(&definition(&names), &[&other]);
        assert_eq!(refused["acceptedNames"], json!({"plural": "things", "singular": "thing"}));
        assert_eq!(
            conditions(&refused),
            [
                "NamesAccepted False ShortNamesConflict \"o\" is already in use",
                "Established False NotAccepted not all names are accepted"
            ]
        );
        // What is established stays so, and is told when the conflict is over.
        let mut known = definition(&names);
        known["status"] = refused;
        let accepted = status(&known, &[]);
        assert_eq!(conditions(&accepted).len(), 2);
        known["status"] = accepted;
        assert!(conditions(&status(&known, &[&other]))[1].starts_with("Established True"));
    }

    #[test]
    fn versions_once_stored_stay_listed() {
        let mut known = definition(&json!({"kind": "Thing"}));
        known["status"] = json!({"storedVersions": ["v1alpha1"]});
        assert_eq!(status(&known, &[])["storedVersions"], json!(["v1alpha1", "v1"]));
    }
}
