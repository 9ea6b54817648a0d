//! In-process access to the API server for the lab's own kubelets, scheduler and controllers: the same rules,
//! defaults and errors as over HTTPS, without authentication, delay or outage.
//! Kinds are named as for `kubectl`: `pods`, `po`, `deployments.apps`; cluster-scoped objects have namespace "".

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::cluster::{Cluster, Deletion, Part, Write};
use super::kinds::Kind;
use super::patch::{Patch, PatchKind};
use super::select::Selector;
use super::shared::Shared;
use super::status::Status;
use super::watch::{Scope, Watch};

/// A cheap handle; clone it freely.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

/// The selected objects at one version of the cluster.
#[derive(Clone, Debug)]
pub struct List {
    /// In order of namespace and name.
    pub items: Vec<Arc<Value>>,
    /// Watch from here to miss nothing.
    pub version: u64,
}

impl Client {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Creates an object; its `kind`, `apiVersion` and `metadata.namespace` (default: `default`) say where.
    pub fn create(&self, object: Value) -> Result<Arc<Value>, Status> {
        self.shared.change(|cluster| {
            let (kind, namespace) = place(cluster, &object)?;
            cluster.create(&kind, &namespace, object, as_the_lab())
        })
    }

    /// Reads one object.
    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Result<Arc<Value>, Status> {
        let cluster = self.shared.cluster();
        cluster.get(&*named(&cluster, kind)?, namespace, name)
    }

    /// Reads the selected objects of one namespace, or of all with `None`.
    pub fn list(&self, kind: &str, namespace: Option<&str>, selector: &Selector) -> Result<List, Status> {
        let cluster = self.shared.cluster();
        let kind = named(&cluster, kind)?;
        let objects = cluster.store.list(&kind.resource(), namespace);
        let items = objects.filter(|object| selector.matches(object)).cloned().collect();
        Ok(List { items, version: cluster.store.version() })
    }

    /// Replaces an object except for its status. A `resourceVersion` in it must be the current one (else 409).
    pub fn update(&self, object: Value) -> Result<Arc<Value>, Status> {
        self.replace(object, Part::Whole)
    }

    /// Replaces an object's status.
    pub fn update_status(&self, object: Value) -> Result<Arc<Value>, Status> {
        self.replace(object, Part::Status)
    }

    /// Changes an object except for its status.
    pub fn patch(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        how: PatchKind,
        patch: Value,
    ) -> Result<Arc<Value>, Status> {
        self.patch_part(kind, (namespace, name), Part::Whole, Patch { kind: how, body: patch })
    }

    /// Changes an object's status; the patch holds `{"status": …}`.
    pub fn patch_status(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        how: PatchKind,
        patch: Value,
    ) -> Result<Arc<Value>, Status> {
        self.patch_part(kind, (namespace, name), Part::Status, Patch { kind: how, body: patch })
    }

    /// Deletes an object as `kubectl` does: a running pod only gets a `deletionTimestamp`, until its kubelet
    /// deletes it with a grace period of zero. `None` takes the object's own grace period.
    pub fn delete(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        grace: Option<Duration>,
    ) -> Result<Arc<Value>, Status> {
        self.shared.change(|cluster| {
            let kind = named(cluster, kind)?;
            let grace = grace.map(|grace| grace.as_secs());
            cluster.delete(&kind, namespace, name, &Deletion { grace, ..Deletion::default() })
        })
    }

    /// Events after `version` (from [`List::version`]), or with `None` first `Added` for all that is there.
    pub fn watch(
        &self,
        kind: &str,
        namespace: Option<&str>,
        selector: Selector,
        version: Option<u64>,
    ) -> Result<Watch, Status> {
        let kind = named(&self.shared.cluster(), kind)?;
        let scope = Scope { kind, namespace: namespace.map(str::to_owned), selector, user: None };
        Ok(Watch::new(self.shared.clone(), scope, version))
    }

    /// Holds the newest version of the cluster, and wakes after each change.
    pub fn changed(&self) -> tokio::sync::watch::Receiver<u64> {
        self.shared.changed()
    }

    /// The newest version of the cluster.
    pub fn version(&self) -> u64 {
        self.shared.cluster().store.version()
    }

    fn replace(&self, object: Value, part: Part) -> Result<Arc<Value>, Status> {
        self.shared.change(|cluster| {
            let (kind, namespace) = place(cluster, &object)?;
            let name = super::meta::name(&object).to_owned();
            cluster.replace(&kind, (&namespace, &name), part, object, as_the_lab())
        })
    }

    fn patch_part(
        &self,
        kind: &str,
        (namespace, name): (&str, &str),
        part: Part,
        patch: Patch,
    ) -> Result<Arc<Value>, Status> {
        self.shared.change(|cluster| {
            let kind = named(cluster, kind)?;
            cluster.patch(&kind, (namespace, name), part, &patch, as_the_lab())
        })
    }
}

/// The lab's own components are one manager of fields, which takes what it applies.
fn as_the_lab() -> Write {
    Write { manager: "ambit-lab".to_owned(), force: true, ..Write::default() }
}

fn named(cluster: &Cluster, word: &str) -> Result<Arc<Kind>, Status> {
    cluster.kinds.named(word).ok_or_else(|| Status::bad_request(format!("no kind is named {word:?}")))
}

/// The kind and namespace an object belongs to by what it says.
fn place(cluster: &Cluster, object: &Value) -> Result<(Arc<Kind>, String), Status> {
    let kind = cluster.kinds.of_object(object).ok_or_else(|| {
        let (version, kind) = (super::meta::text(object, "/apiVersion"), super::meta::text(object, "/kind"));
        Status::bad_request(format!("no kind {kind:?} in version {version:?}"))
    })?;
    let namespace = match (kind.namespaced, super::meta::namespace(object)) {
        (false, _) => "",
        (true, "") => "default",
        (true, namespace) => namespace,
    };
    Ok((kind, namespace.to_owned()))
}
