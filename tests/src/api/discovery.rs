//! Discovery: which groups, versions and kinds there are, in the classic form and aggregated.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::kinds::{Kind, Kinds, priority};
use super::openapi;

/// A document and its content type, for a path outside the resources.
pub(super) struct Document {
    pub(super) content_type: &'static str,
    pub(super) body: Value,
}

const JSON: &str = "application/json";
const AGGREGATED: [(&str, &str, &str); 2] = [
    (
        "v=v2;",
        "apidiscovery.k8s.io/v2",
        "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
    ),
    (
        "v=v2beta1;",
        "apidiscovery.k8s.io/v2beta1",
        "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList",
    ),
];

/// Answers a GET of `path`, if it is one of ours.
pub(super) fn document(kinds: &Kinds, path: &str, accept: &str) -> Option<Document> {
    let plain = |body: Value| Some(Document { content_type: JSON, body });
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let aggregated = AGGREGATED.iter().find(|(version, ..)| {
        let wanted = |part: &str| {
            let part = format!("{};", part.replace(' ', ""));
            part.contains("as=APIGroupDiscoveryList") && part.contains(version)
        };
        accept.split(',').any(wanted)
    });
    match (segments[..].as_ref(), aggregated) {
        (["api" | "apis"], Some((_, api_version, content_type))) => {
            let body = aggregate(kinds, segments[0] == "api", api_version);
            Some(Document { content_type, body })
        }
        (["api"], None) => plain(
            json!({"kind": "APIVersions", "apiVersion": "v1", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        ),
        (["apis"], None) => {
            let groups: Vec<Value> =
                groups(kinds).iter().map(|(name, versions)| group(name, versions)).collect();
            plain(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
        }
        (["apis", name], _) => {
            let groups = groups(kinds);
            plain(group(name, groups.get(*name)?))
        }
        (["api", version], _) => resources(kinds, "", version).and_then(plain),
        (["apis", name, version], _) => resources(kinds, name, version).and_then(plain),
        (["version"], _) => plain(version()),
        (["openapi", "v3"], _) => plain(openapi::index(kinds)),
        (["openapi", "v3", "api", version], _) => openapi::group(kinds, "", version).and_then(plain),
        (["openapi", "v3", "apis", name, version], _) => openapi::group(kinds, name, version).and_then(plain),
        _ => None,
    }
}

/// What `kubectl version` shows; the version whose behaviour the server follows.
fn version() -> Value {
    json!({
        "major": "1", "minor": "33", "gitVersion": "v1.33.0+ambit-lab", "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "rustc", "platform": "linux/amd64",
    })
}

/// Versions by group, without the core group.
fn groups(kinds: &Kinds) -> BTreeMap<String, Vec<String>> {
    let mut groups = BTreeMap::<String, Vec<String>>::new();
    for kind in kinds.all().filter(|kind| !kind.group.is_empty()) {
        let versions = groups.entry(kind.group.clone()).or_default();
        if !versions.contains(&kind.version) {
            versions.push(kind.version.clone());
        }
    }
    for versions in groups.values_mut() {
        versions.sort_by(|a, b| priority(b).cmp(&priority(a)).then(a.cmp(b)));
    }
    groups
}

fn group(name: &str, versions: &[String]) -> Value {
    let versions: Vec<Value> = versions
        .iter()
        .map(|version| json!({"groupVersion": format!("{name}/{version}"), "version": version}))
        .collect();
    json!({
        "kind": "APIGroup", "apiVersion": "v1", "name": name, "versions": versions,
        "preferredVersion": versions.first(),
    })
}

/// The kinds of one version of a group.
pub(super) fn of_version<'a>(kinds: &'a Kinds, group: &'a str, version: &'a str) -> Vec<&'a Arc<Kind>> {
    kinds.all().filter(|kind| kind.group == group && kind.version == version).collect()
}

/// A subresource: name, group, version and kind of its body, verbs.
type Subresource = (&'static str, String, String, String, &'static [&'static str]);

fn subresources(kind: &Kind) -> Vec<Subresource> {
    const READ_WRITE: &[&str] = &["get", "patch", "update"];
    let own = |name, verbs| (name, kind.group.clone(), kind.version.clone(), kind.kind.clone(), verbs);
    let other = |name, group: &str, object: &str, verbs| {
        (name, group.to_owned(), "v1".to_owned(), object.to_owned(), verbs)
    };
    let mut found = Vec::new();
    if kind.status {
        found.push(own("status", READ_WRITE));
    }
    if kind.scale.is_some() {
        found.push(other("scale", "autoscaling", "Scale", READ_WRITE));
    }
    match kind.resource().as_str() {
        "pods" => {
            found.push(own("log", &["get"]));
            found.push(other("eviction", "policy", "Eviction", &["create"]));
            found.push(other("binding", "", "Binding", &["create"]));
        }
        "serviceaccounts" => {
            found.push(other("token", "authentication.k8s.io", "TokenRequest", &["create"]));
        }
        _ => {}
    }
    found
}

fn resources(kinds: &Kinds, group: &str, version: &str) -> Option<Value> {
    let served = of_version(kinds, group, version);
    if served.is_empty() {
        return None;
    }
    let mut list = Vec::new();
    for kind in &served {
        let mut resource = json!({
            "name": kind.plural, "singularName": kind.singular, "namespaced": kind.namespaced,
            "kind": kind.kind, "verbs": kind.verbs(),
        });
        if !kind.short_names.is_empty() {
            resource["shortNames"] = json!(kind.short_names);
        }
        if !kind.categories.is_empty() {
            resource["categories"] = json!(kind.categories);
        }
        list.push(resource);
        for (name, group, version, object, verbs) in subresources(kind) {
            list.push(json!({
                "name": format!("{}/{name}", kind.plural), "singularName": "", "namespaced": kind.namespaced,
                "group": group, "version": version, "kind": object, "verbs": verbs,
            }));
        }
    }
    Some(json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": served[0].api_version(),
        "resources": list,
    }))
}

fn aggregate(kinds: &Kinds, core: bool, api_version: &str) -> Value {
    let mut groups = groups(kinds);
    if core {
        groups = BTreeMap::from([(String::new(), vec!["v1".to_owned()])]);
    }
    let items: Vec<Value> = groups
        .iter()
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| {
                    let served = of_version(kinds, group, version);
                    let resources: Vec<Value> =
                        served.into_iter().map(|kind| aggregated_resource(kind)).collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            json!({"metadata": {"name": group, "creationTimestamp": null}, "versions": versions})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": api_version, "metadata": {}, "items": items})
}

fn aggregated_resource(kind: &Kind) -> Value {
    let subresources: Vec<Value> = subresources(kind)
        .into_iter()
        .map(|(name, group, version, object, verbs)| {
            let object = json!({"group": group, "version": version, "kind": object});
            json!({"subresource": name, "responseKind": object, "verbs": verbs})
        })
        .collect();
    json!({
        "resource": kind.plural, "singularResource": kind.singular, "verbs": kind.verbs(),
        "responseKind": {"group": kind.group, "version": kind.version, "kind": kind.kind},
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "shortNames": kind.short_names, "categories": kind.categories, "subresources": subresources,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::document;
    use crate::api::kinds::Kinds;

    #[test]
    fn definitions_add_to_discovery() {
        let mut kinds = Kinds::new();
        let version = |name: &str, served: bool| {
            let schema = json!({"openAPIV3Schema": {"type": "object"}});
            json!({"name": name, "served": served, "storage": name == "v1", "schema": schema})
        };
        assert!(document(&kinds, "/apis/x.io/v1", "").is_none());
        kinds.define(&json!({
            "metadata": {"name": "things.x.io"},
            "spec": {
                "group": "x.io", "scope": "Namespaced",
                "versions": [
                    version("v1beta1", true), version("v1", true), version("v2alpha1", true), version("v0", false),
                ],
            },
            "status": {"acceptedNames": {"kind": "Thing", "plural": "things"}},
        }));
        let list = document(&kinds, "/apis/x.io/v1", "").unwrap().body;
        assert_eq!(list["resources"][0]["kind"], "Thing");
        assert!(document(&kinds, "/apis/x.io/v0", "").is_none());
        let group = document(&kinds, "/apis/x.io", "").unwrap().body;
        let versions = group["versions"].as_array().unwrap().iter().map(|version| &version["version"]);
        assert_eq!(versions.collect::<Vec<_>>(), ["v1", "v1beta1", "v2alpha1"]);
        kinds.forget("things.x.io");
        assert!(document(&kinds, "/apis/x.io", "").is_none());
    }

    #[test]
    fn the_newest_aggregated_form_that_is_asked_for() {
        let kinds = Kinds::new();
        let beta = "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList";
        let both = format!(
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,{beta},application/json"
        );
        for (accept, expect) in [(both.as_str(), "v2;as"), (beta, "v2beta1;as")] {
            assert!(document(&kinds, "/apis", accept).unwrap().content_type.contains(expect));
        }
        assert_eq!(document(&kinds, "/apis", "application/json").unwrap().body["kind"], "APIGroupList");
    }
}
