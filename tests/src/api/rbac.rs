//! Role-based access control: which rules apply to a user, and whether one allows a request. Pure: it reads the
//! stored roles and bindings. Reference: `k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac`.

use serde_json::{Value, json};

use super::Asked;
use super::cluster::Cluster;
use super::meta::{items, namespace, text};
use super::status::Status;
use super::token::User;

/// What a request wants to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    /// `get`, `list`, `watch`, `create`, …
    pub(super) verb: String,
    pub(super) group: String,
    /// Plural, without subresource.
    pub(super) resource: String,
    pub(super) subresource: String,
    /// Empty for the cluster's scope.
    pub(super) namespace: String,
    /// Empty for collections.
    pub(super) name: String,
    /// The path, when it names no resource; then only it and the verb count.
    pub(super) path: Option<String>,
}

impl Attributes {
    /// 403 as the real server words it.
    pub(super) fn refusal(&self, user: &User) -> Status {
        if let Some(path) = &self.path {
            return Status::forbidden_path(&user.name, &self.verb, path);
        }
        let resource = self.full_resource();
        let place = match self.namespace.as_str() {
            "" => "at the cluster scope".to_owned(),
            namespace => format!("in the namespace \"{namespace}\""),
        };
        let why = format!(
            "User \"{}\" cannot {} resource \"{resource}\" in API group \"{}\" {place}",
            user.name, self.verb, self.group
        );
        Status::forbidden(&self.resource, &self.group, &self.name, &why)
    }

    /// The same for whoever looks at what was asked.
    pub(super) fn asked(&self, granted: bool) -> Asked {
        let Self { verb, group, namespace, name, path, .. } = self.clone();
        let resource = path.unwrap_or_else(|| self.full_resource());
        Asked { verb, group, resource, namespace, name, granted }
    }

    fn full_resource(&self) -> String {
        if self.subresource.is_empty() {
            self.resource.clone()
        } else {
            format!("{}/{}", self.resource, self.subresource)
        }
    }
}

/// What everyone may read of the API.
const PUBLIC: [&str; 8] =
    ["/api", "/apis", "/healthz", "/livez", "/openapi", "/readyz", "/version", "/.well-known"];
/// What every authenticated user may ask about themselves.
const OWN_REVIEWS: [&str; 3] = ["selfsubjectaccessreviews", "selfsubjectreviews", "selfsubjectrulesreviews"];

impl Cluster {
    /// Whether `user` may do this. Administrators and kubelets may do everything.
    pub(super) fn allows(&self, user: &User, wanted: &Attributes) -> bool {
        is_almighty(user)
            || is_public(user, wanted)
            || self.rules_of(user, &wanted.namespace).into_iter().any(|rule| rule_allows(rule, wanted))
    }

    /// What `user` may do in a namespace: `SubjectRulesReviewStatus`.
    pub(super) fn rights(&self, user: &User, namespace: &str) -> Value {
        let paths: Vec<String> =
            PUBLIC.iter().flat_map(|path| [(*path).to_owned(), format!("{path}/*")]).collect();
        let mut rules = vec![
            json!({"verbs": ["create"], "apiGroups": ["authentication.k8s.io", "authorization.k8s.io"], "resources": OWN_REVIEWS}),
            json!({"verbs": ["get"], "nonResourceURLs": paths}),
        ];
        if is_almighty(user) {
            rules.push(json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}));
            rules.push(json!({"verbs": ["*"], "nonResourceURLs": ["*"]}));
        }
        rules.extend(self.rules_of(user, namespace).into_iter().cloned());
        let (outside, resources): (Vec<Value>, Vec<Value>) =
            rules.into_iter().partition(|rule| rule["nonResourceURLs"].is_array());
        json!({"resourceRules": resources, "nonResourceRules": outside, "incomplete": false})
    }

    /// The rules that bindings of the cluster and of a namespace (none if empty) give to `user`.
    fn rules_of<'a>(&'a self, user: &User, place: &'a str) -> Vec<&'a Value> {
        let bound = |resource: &str, scope: Option<&'a str>| {
            self.store
                .list(&format!("{resource}.rbac.authorization.k8s.io"), scope)
                .filter(|binding| {
                    items(binding, "/subjects").any(|subject| is_subject(user, subject, namespace(binding)))
                })
                .flat_map(|binding| self.rules(binding))
                .collect::<Vec<_>>()
        };
        let mut rules = bound("clusterrolebindings", None);
        if !place.is_empty() {
            rules.extend(bound("rolebindings", Some(place)));
        }
        rules
    }

    /// The rules of the role a binding refers to.
    fn rules<'a>(&'a self, binding: &Value) -> impl Iterator<Item = &'a Value> + use<'a> {
        let (resource, scope) = match text(binding, "/roleRef/kind") {
            "ClusterRole" => ("clusterroles.rbac.authorization.k8s.io", ""),
            _ => ("roles.rbac.authorization.k8s.io", namespace(binding)),
        };
        let role = self.store.get(resource, scope, text(binding, "/roleRef/name"));
        role.into_iter().flat_map(|role| items(role, "/rules"))
    }
}

fn is_almighty(user: &User) -> bool {
    const GROUPS: [&str; 2] = ["system:masters", "system:nodes"];
    user.groups.iter().any(|group| GROUPS.contains(&group.as_str()))
}

/// What any user may do: read the API's description and ask about their own rights.
fn is_public(user: &User, wanted: &Attributes) -> bool {
    if let Some(path) = &wanted.path {
        let first = |known: &&str| {
            path == known || path.strip_prefix(*known).is_some_and(|rest| rest.starts_with('/'))
        };
        return wanted.verb == "get" && PUBLIC.iter().any(first);
    }
    let own = OWN_REVIEWS.contains(&wanted.resource.as_str());
    wanted.verb == "create" && own && user.groups.iter().any(|group| group == "system:authenticated")
}

fn is_subject(user: &User, subject: &Value, binding_namespace: &str) -> bool {
    let name = text(subject, "/name");
    match text(subject, "/kind") {
        "User" => user.name == name,
        "Group" => user.groups.iter().any(|group| group == name),
        "ServiceAccount" => {
            let own = text(subject, "/namespace");
            let namespace = if own.is_empty() { binding_namespace } else { own };
            user.name == format!("system:serviceaccount:{namespace}:{name}")
        }
        _ => false,
    }
}

fn rule_allows(rule: &Value, wanted: &Attributes) -> bool {
    let lists = |field: &str, value: &str| {
        items(rule, field).filter_map(Value::as_str).any(|listed| listed == "*" || listed == value)
    };
    if !lists("/verbs", &wanted.verb) {
        return false;
    }
    if let Some(path) = &wanted.path {
        return items(rule, "/nonResourceURLs").filter_map(Value::as_str).any(|listed| {
            listed == path || listed.strip_suffix('*').is_some_and(|start| path.starts_with(start))
        });
    }
    let any_parent = format!("*/{}", wanted.subresource);
    let resource = lists("/resources", &wanted.full_resource())
        || !wanted.subresource.is_empty()
            && items(rule, "/resources").filter_map(Value::as_str).any(|listed| listed == any_parent);
    let mut names = items(rule, "/resourceNames").filter_map(Value::as_str).peekable();
    lists("/apiGroups", &wanted.group)
        && resource
        && (names.peek().is_none() || names.any(|name| name == wanted.name))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::Attributes;
    use crate::api::cluster::{Cluster, Write};
    use crate::api::token::User;
    use crate::stack::Stack;

    fn cluster() -> Cluster {
        let mut cluster = Cluster::new(String::new(), Stack::V4).unwrap();
        let rule = |groups: &[&str], resources: &[&str], verbs: &[&str], names: &[&str]| json!({"apiGroups": groups, "resources": resources, "verbs": verbs, "resourceNames": names});
        let mut make = |kind: &str, metadata: Value, rest: Value| {
            let mut object =
                json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": metadata});
            object.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
            let kind = cluster.kinds.of_object(&object).unwrap();
            let namespace = if kind.namespaced { "default" } else { "" };
            cluster.create(&kind, namespace, object, Write::default()).unwrap();
        };
        let agent = json!({"kind": "ServiceAccount", "name": "agent", "namespace": "default"});
        let role_rules = json!({"rules": [
            rule(&[""], &["pods", "pods/log"], &["get", "list"], &[]),
            rule(&["apps"], &["*"], &["*"], &[]),
            rule(&[""], &["configmaps"], &["get"], &["only"]),
            rule(&[""], &["*/status"], &["patch"], &[]),
        ]});
        make("Role", json!({"name": "reader"}), role_rules);
        make(
            "ClusterRole",
            json!({"name": "nodes"}),
            json!({"rules": [
                rule(&[""], &["nodes"], &["watch"], &[]),
                {"nonResourceURLs": ["/metrics", "/debug/*"], "verbs": ["get"]},
            ]}),
        );
        let reference = |kind: &str, name: &str| json!({"kind": kind, "name": name});
        make(
            "RoleBinding",
            json!({"name": "reader"}),
            json!({"roleRef": reference("Role", "reader"), "subjects": [agent, {"kind": "User", "name": "jo"}]}),
        );
        make(
            "ClusterRoleBinding",
            json!({"name": "nodes"}),
            json!({"roleRef": reference("ClusterRole", "nodes"), "subjects": [agent]}),
        );
        cluster
    }

    /// `verb group/resource[/sub] namespace name`, with `-` for what is empty.
    fn attributes(wanted: &str) -> Attributes {
        let words: Vec<String> = wanted.split(' ').map(|word| word.replace('-', "")).collect();
        let mut resource = words[1].split('/').map(str::to_owned);
        let mut next = || resource.next().unwrap_or_default();
        Attributes {
            verb: words[0].clone(),
            group: next(),
            resource: next(),
            subresource: next(),
            namespace: words[2].clone(),
            name: words[3].clone(),
            path: None,
        }
    }

    #[test]
    fn bindings_decide() {
        let cluster = cluster();
        let agent = User::service_account("default", "agent", "1");
        for (wanted, expect) in [
            ("get -/pods default a", true),
            ("get -/pods/log default a", true),
            ("get -/pods/exec default a", false),
            ("delete -/pods default a", false),
            ("get -/pods other a", false),
            ("list -/pods - -", false),
            ("create apps/deployments default -", true),
            ("update apps/deployments/scale default a", true),
            ("get -/configmaps default only", true),
            ("get -/configmaps default other", false),
            ("patch -/services/status default a", true),
            ("patch -/services default a", false),
            ("watch -/nodes - -", true),
            ("get -/nodes - -", false),
        ] {
            assert_eq!(cluster.allows(&agent, &attributes(wanted)), expect, "{wanted}");
        }
        let other = User::service_account("other", "agent", "1");
        assert!(!cluster.allows(&other, &attributes("watch -/nodes - -")));
        assert!(cluster.allows(&User::new("jo", &[]), &attributes("get -/pods default a")));
        assert!(cluster.allows(&User::new("root", &["system:masters"]), &attributes("delete -/nodes - a")));
    }

    #[test]
    fn rights_are_listed() {
        let cluster = cluster();
        let jo = User::new("jo", &[]);
        let resources = |user: &User, namespace: &str| -> Vec<Value> {
            let rights = cluster.rights(user, namespace);
            let rules = rights["resourceRules"].as_array().unwrap().iter();
            rules.skip(1).map(|rule| rule["resources"][0].clone()).collect()
        };
        assert_eq!(resources(&jo, "default"), ["pods", "*", "configmaps", "*/status"]);
        assert_eq!(resources(&jo, "other"), [""; 0]);
        assert_eq!(resources(&User::new("root", &["system:masters"]), "other"), ["*"]);
        let agent = cluster.rights(&User::service_account("default", "agent", "1"), "other");
        assert_eq!(agent["nonResourceRules"][1]["nonResourceURLs"], json!(["/metrics", "/debug/*"]));
    }

    #[test]
    fn paths() {
        let cluster = cluster();
        let agent = User::service_account("default", "agent", "1");
        for (path, expect) in [
            ("/metrics", true),
            ("/debug/x", true),
            ("/secret", false),
            ("/apis/apps", true),
            ("/apix", false),
        ] {
            let wanted =
                Attributes { verb: "get".into(), path: Some(path.to_owned()), ..Attributes::default() };
            assert_eq!(cluster.allows(&agent, &wanted), expect, "{path}");
        }
    }

    #[test]
    fn refusals_read_as_the_real_ones() {
        let told = attributes("list -/pods default -").refusal(&User::new("jo", &[])).message;
        let expect = r#"pods is forbidden: User "jo" cannot list resource "pods" in API group "" in the namespace "default""#;
        assert_eq!(told, expect);
        let told = attributes("get apps/deployments - a").refusal(&User::new("jo", &[])).message;
        assert!(told.starts_with(r#"deployments.apps "a" is forbidden: User "jo" cannot get"#), "{told}");
        assert!(told.ends_with("at the cluster scope"), "{told}");
    }
}
