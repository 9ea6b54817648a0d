//! The kinds this server knows: one table of built-in ones, and those that CustomResourceDefinitions add.
//! Everything that differs by kind and is plain data is a column here; behaviour is in `defaults` and `validate`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::convert;
use super::definition::Custom;
use super::jsonpath::Path;
use super::meta;

/// What the server knows of one kind in one version.
#[derive(Clone, Debug)]
pub(super) struct Kind {
    pub(super) group: String,
    pub(super) version: String,
    /// Such as `Pod`.
    pub(super) kind: String,
    pub(super) plural: String,
    pub(super) singular: String,
    pub(super) short_names: Vec<String>,
    pub(super) categories: Vec<String>,
    pub(super) namespaced: bool,
    /// Has the subresource `status`.
    pub(super) status: bool,
    /// The subresource `scale`, if it has one.
    pub(super) scale: Option<Scale>,
    /// Counts changes outside metadata and status in `metadata.generation`.
    pub(super) generation: bool,
    /// Only a question to the server: created, answered, never stored.
    pub(super) review: bool,
    /// The fields that a custom resource adds to those that any object can be selected by.
    pub(super) selectable: Vec<String>,
    /// `additionalPrinterColumns` of a custom resource.
    pub(super) columns: Vec<Value>,
    /// What a CustomResourceDefinition says of it; none for a built-in kind.
    pub(super) custom: Option<Arc<Custom>>,
}

/// Where the numbers of a `Scale` are in an object, as JSON pointers.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    pub(super) wanted: String,
    pub(super) running: String,
    /// A label selector as text; a built-in kind makes it of `spec.selector`.
    pub(super) selector: Option<String>,
}

impl Kind {
    /// Where objects are stored, shared by all versions: `pods`, `deployments.apps`. Events of both groups are the same.
    pub(super) fn resource(&self) -> String {
        let group = if self.group == convert::EVENTS { "" } else { &self.group };
        resource(&self.plural, group)
    }

    /// `v1`, `apps/v1`.
    pub(super) fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// The verbs discovery tells.
    pub(super) fn verbs(&self) -> &'static [&'static str] {
        if self.review {
            return &["create"];
        }
        &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
    }

    /// Whether a replacement has to say which version it is based on.
    pub(super) fn versioned(&self) -> bool {
        self.custom.is_some() || ["Lease", "CustomResourceDefinition"].contains(&self.kind.as_str())
    }

    fn of_row(row: &Row) -> Self {
        Self {
            group: row.group.to_owned(),
            version: "v1".to_owned(),
            kind: row.kind.to_owned(),
            plural: row.plural.to_owned(),
            singular: row.kind.to_lowercase(),
            short_names: row.short.split_whitespace().map(str::to_owned).collect(),
            categories: if row.all { vec!["all".to_owned()] } else { Vec::new() },
            namespaced: row.namespaced,
            status: row.status,
            scale: row.scale.then(|| Scale {
                wanted: "/spec/replicas".to_owned(),
                running: "/status/replicas".to_owned(),
                selector: None,
            }),
            generation: row.generation,
            review: row.review,
            selectable: Vec::new(),
            columns: Vec::new(),
            custom: None,
        }
    }
}

/// The storage name of a resource: `pods`, `deployments.apps`.
pub(super) fn resource(plural: &str, group: &str) -> String {
    if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") }
}

/// All kinds served now. A definition's versions each have an entry.
#[derive(Debug)]
pub(super) struct Kinds {
    builtin: Vec<Arc<Kind>>,
    custom: BTreeMap<String, Vec<Arc<Kind>>>,
}

impl Kinds {
    /// The built-in ones.
    pub(super) fn new() -> Self {
        Self {
            builtin: ROWS.iter().map(|row| Arc::new(Kind::of_row(row))).collect(),
            custom: BTreeMap::new(),
        }
    }

    /// All, built-in first.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Kind>> {
        self.builtin.iter().chain(self.custom.values().flatten())
    }

    /// The kind a request path names.
    pub(super) fn find(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Kind>> {
        self.all()
            .find(|kind| kind.group == group && kind.version == version && kind.plural == plural)
            .cloned()
    }

    /// The kind an object says it is.
    pub(super) fn of_object(&self, object: &Value) -> Option<Arc<Kind>> {
        let (api_version, name) = (meta::text(object, "/apiVersion"), meta::text(object, "/kind"));
        self.all().find(|kind| kind.kind == name && kind.api_version() == api_version).cloned()
    }

    /// The kind for a word as `kubectl` takes it: plural, `plural.group`, singular or short name.
    pub(super) fn named(&self, word: &str) -> Option<Arc<Kind>> {
        let lower = word.to_lowercase();
        self.all()
            .find(|kind| {
                kind.plural == lower
                    || resource(&kind.plural, &kind.group) == lower
                    || kind.singular == lower
                    || kind.short_names.contains(&lower)
            })
            .cloned()
    }

    /// A kind stored under this name; of several versions any one.
    pub(super) fn of_resource(&self, resource: &str) -> Option<Arc<Kind>> {
        self.all().find(|kind| kind.resource() == resource).cloned()
    }

    /// Whether this kind is still served, by the same definition.
    pub(super) fn serves(&self, kind: &Kind) -> bool {
        let uid = |kind: &Kind| kind.custom.as_ref().map(|custom| custom.uid.clone());
        let found = self.find(&kind.group, &kind.version, &kind.plural);
        found.is_some_and(|found| uid(&found) == uid(kind))
    }

    /// Serves the versions of a CustomResourceDefinition, in place of what it said before: the stable and the newest
    /// first.
    pub(super) fn define(&mut self, definition: &Value) {
        let mut versions: Vec<Arc<Kind>> = meta::items(definition, "/spec/versions")
            .filter(|version| version["served"].as_bool() == Some(true))
            .filter_map(|version| custom(definition, version).map(Arc::new))
            .collect();
        versions
            .sort_by(|a, b| priority(&b.version).cmp(&priority(&a.version)).then(a.version.cmp(&b.version)));
        self.custom.insert(meta::name(definition).to_owned(), versions);
    }

    /// Stops serving a definition's kinds.
    pub(super) fn forget(&mut self, definition: &str) {
        self.custom.remove(definition);
    }
}

/// Stable before beta before alpha, then by the numbers; other names come last.
/// Reference: `k8s.io/apimachinery/pkg/version`.
pub(super) fn priority(version: &str) -> (u8, u32, u32) {
    let parse = |version: &str| -> Option<(u8, u32, u32)> {
        let rest = version.strip_prefix('v')?;
        for (stage, rank) in [("alpha", 1), ("beta", 2)] {
            if let Some((major, minor)) = rest.split_once(stage) {
                return Some((rank, major.parse().ok()?, minor.parse().ok()?));
            }
        }
        Some((3, rest.parse().ok()?, 0))
    };
    parse(version).unwrap_or_default()
}

fn custom(definition: &Value, version: &Value) -> Option<Kind> {
    let names = |field: &str| meta::text(definition, &format!("/status/acceptedNames/{field}")).to_owned();
    let words = |field: &str| {
        meta::items(definition, &format!("/status/acceptedNames/{field}"))
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    };
    let kind = names("kind");
    let singular = names("singular");
    let scale = version.pointer("/subresources/scale").and_then(|scale| {
        let pointer = |field: &str| Path::parse(meta::text(scale, &format!("/{field}"))).ok()?.pointer();
        Some(Scale {
            wanted: pointer("specReplicasPath")?,
            running: pointer("statusReplicasPath")?,
            selector: pointer("labelSelectorPath"),
        })
    });
    Some(Kind {
        group: meta::text(definition, "/spec/group").to_owned(),
        version: meta::text(version, "/name").to_owned(),
        plural: names("plural"),
        singular: if singular.is_empty() { kind.to_lowercase() } else { singular },
        kind,
        short_names: words("shortNames"),
        categories: words("categories"),
        namespaced: meta::text(definition, "/spec/scope") == "Namespaced",
        status: version.pointer("/subresources/status").is_some(),
        scale,
        generation: true,
        review: false,
        selectable: meta::items(version, "/selectableFields")
            .map(|field| meta::text(field, "/jsonPath").trim_start_matches('.').to_owned())
            .collect(),
        columns: meta::items(version, "/additionalPrinterColumns").cloned().collect(),
        custom: Some(Arc::new(Custom::new(definition, version)?)),
    })
}

/// One built-in kind; all are version v1 of their group.
struct Row {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static str,
    namespaced: bool,
    status: bool,
    scale: bool,
    generation: bool,
    review: bool,
    all: bool,
}

impl Row {
    const fn namespaced(
        group: &'static str,
        kind: &'static str,
        plural: &'static str,
        short: &'static str,
    ) -> Self {
        let (status, scale, generation, review, all) = (false, false, false, false, false);
        Self { group, kind, plural, short, namespaced: true, status, scale, generation, review, all }
    }

    const fn cluster(
        group: &'static str,
        kind: &'static str,
        plural: &'static str,
        short: &'static str,
    ) -> Self {
        let mut row = Self::namespaced(group, kind, plural, short);
        row.namespaced = false;
        row
    }

    const fn status(mut self) -> Self {
        self.status = true;
        self
    }

    const fn scale(mut self) -> Self {
        self.scale = true;
        self
    }

    const fn generation(mut self) -> Self {
        self.generation = true;
        self
    }

    const fn review(mut self) -> Self {
        self.review = true;
        self
    }

    const fn in_all(mut self) -> Self {
        self.all = true;
        self
    }
}

const APPS: &str = "apps";
const BATCH: &str = "batch";
const RBAC: &str = "rbac.authorization.k8s.io";
const AUTHN: &str = "authentication.k8s.io";
const AUTHZ: &str = "authorization.k8s.io";

const ROWS: &[Row] = &[
    Row::cluster("", "Namespace", "namespaces", "ns").status(),
    Row::cluster("", "Node", "nodes", "no").status(),
    Row::namespaced("", "Pod", "pods", "po").status().in_all(),
    Row::namespaced("", "Service", "services", "svc").status().in_all(),
    Row::namespaced("", "Endpoints", "endpoints", "ep"),
    Row::namespaced("", "ServiceAccount", "serviceaccounts", "sa"),
    Row::namespaced("", "Secret", "secrets", ""),
    Row::namespaced("", "ConfigMap", "configmaps", "cm"),
    Row::namespaced("", "Event", "events", "ev"),
    Row::namespaced("discovery.k8s.io", "EndpointSlice", "endpointslices", "").generation(),
    Row::namespaced("networking.k8s.io", "NetworkPolicy", "networkpolicies", "netpol").generation(),
    Row::namespaced(APPS, "Deployment", "deployments", "deploy").status().scale().generation().in_all(),
    Row::namespaced(APPS, "ReplicaSet", "replicasets", "rs").status().scale().generation().in_all(),
    Row::namespaced(APPS, "DaemonSet", "daemonsets", "ds").status().generation().in_all(),
    Row::namespaced(BATCH, "Job", "jobs", "").status().generation().in_all(),
    Row::namespaced(BATCH, "CronJob", "cronjobs", "cj").status().generation().in_all(),
    Row::namespaced(RBAC, "Role", "roles", ""),
    Row::namespaced(RBAC, "RoleBinding", "rolebindings", ""),
    Row::cluster(RBAC, "ClusterRole", "clusterroles", ""),
    Row::cluster(RBAC, "ClusterRoleBinding", "clusterrolebindings", ""),
    Row::namespaced("coordination.k8s.io", "Lease", "leases", ""),
    Row::namespaced("events.k8s.io", "Event", "events", "ev"),
    Row::cluster("apiextensions.k8s.io", "CustomResourceDefinition", "customresourcedefinitions", "crd crds")
        .status()
        .generation(),
    Row::cluster(AUTHN, "TokenReview", "tokenreviews", "").review(),
    Row::cluster(AUTHN, "SelfSubjectReview", "selfsubjectreviews", "").review(),
    Row::cluster(AUTHZ, "SubjectAccessReview", "subjectaccessreviews", "").review(),
    Row::cluster(AUTHZ, "SelfSubjectAccessReview", "selfsubjectaccessreviews", "").review(),
    Row::cluster(AUTHZ, "SelfSubjectRulesReview", "selfsubjectrulesreviews", "").review(),
];
