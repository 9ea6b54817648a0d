//! CustomResourceDefinitions: what a definition makes of its objects, and the life of the definition itself.
//! `check` refuses definitions, `structural` their schemas, `names` decides which names are accepted.
//! **Invariant:** a kind is served only while its definition's names are accepted, and objects are stored in the
//! definition's storage version.

pub(super) mod check;
mod expressions;
mod names;
mod structural;

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize as _;
use serde_json::{Value, json};

use super::cluster::{Cluster, Deletion};
use super::kinds::Kind;
use super::meta;
use super::status::Status;
use super::structure::{Schema, fill, prune};

/// The resource that definitions are stored under.
pub(super) const DEFINITIONS: &str = "customresourcedefinitions.apiextensions.k8s.io";

/// What a definition says of one version of its kind.
#[derive(Debug)]
pub(super) struct Custom {
    /// The definition's uid: the kinds of a definition that was made anew are others.
    pub(super) uid: String,
    /// Version that objects are stored in.
    pub(super) storage: String,
    pub(super) schema: Schema,
    /// `openAPIV3Schema` as written.
    pub(super) source: Value,
}

impl Custom {
    /// None if the schema cannot be read, which `check` refuses before.
    pub(super) fn new(definition: &Value, version: &Value) -> Option<Self> {
        let source = version.pointer("/schema/openAPIV3Schema")?.clone();
        let storage = meta::items(definition, "/spec/versions").find(|version| version["storage"] == true)?;
        Some(Self {
            uid: meta::uid(definition).to_owned(),
            storage: meta::text(storage, "/name").to_owned(),
            schema: Schema::parse(&source).ok()?,
            source,
        })
    }

    /// Drops what is not specified from an object as sent, its metadata included; the paths of what was dropped.
    pub(super) fn prune(&self, object: &mut Value) -> Result<Vec<String>, String> {
        let mut dropped = prune::object(&self.schema, object);
        if let Some(metadata) = object.get_mut("metadata").filter(|metadata| !metadata.is_null()) {
            let typed = ObjectMeta::deserialize(&*metadata).map_err(|error| error.to_string())?;
            let typed = serde_json::to_value(typed).map_err(|error| error.to_string())?;
            meta::map(metadata).retain(|name, value| {
                let known = typed.get(name).is_some();
                if !known && !value.is_null() {
                    dropped.push(format!("metadata.{name}"));
                }
                known
            });
        }
        Ok(dropped)
    }

    /// Sets the defaults of an object.
    pub(super) fn fill(&self, object: &mut Value) {
        fill::fill(&self.schema, object);
    }
}

/// What a new definition's status starts with, before its names were looked at.
pub(super) fn first_status(definition: &Value) -> Value {
    json!({"storedVersions": names::stored(definition, &Value::Null)})
}

impl Cluster {
    /// Whether objects of a custom kind may be created: not while the definition is going away, nor after. The kind was
    /// looked up before the request's body was read.
    pub(super) fn check_definition(&self, kind: &Kind) -> Result<(), Status> {
        if !self.kinds.serves(kind) {
            return Err(Status::unknown_path());
        }
        let definition = self.store.get(DEFINITIONS, "", &kind.resource());
        if kind.custom.is_some() && definition.is_some_and(|definition| meta::is_terminating(definition)) {
            let mut status = Status::method_not_allowed();
            "create not allowed while custom resource definition is terminating"
                .clone_into(&mut status.message);
            return Err(status);
        }
        Ok(())
    }

    /// Decides which names of the group's definitions are accepted, and serves the kinds of those.
    pub(super) fn settle_definitions(&mut self, group: &str) {
        let in_group = |definition: &&Arc<Value>| meta::text(definition, "/spec/group") == group;
        let definitions: Vec<Arc<Value>> =
            self.store.list(DEFINITIONS, None).filter(in_group).cloned().collect();
        // Names that were accepted stay; a new definition has none yet.
        let mut accepted: Vec<Value> =
            definitions.iter().map(|definition| definition["status"]["acceptedNames"].clone()).collect();
        for (index, definition) in definitions.iter().enumerate() {
            let others =
                accepted.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, names)| names);
            let status = names::status(definition, &others.collect::<Vec<_>>());
            accepted[index] = status["acceptedNames"].clone();
            let mut settled = definition.clone();
            if definition["status"] != status {
                let mut changed = (**definition).clone();
                changed["status"] = status;
                settled = self.store.put(DEFINITIONS, changed);
            }
            if names::is_established(&settled) {
                self.kinds.define(&settled);
            }
        }
    }

    /// Deletes a definition's objects, and then the definition: at once, or when the last object with finalizers goes.
    pub(super) fn delete_definition(&mut self, definition: &Arc<Value>) -> Arc<Value> {
        let name = meta::name(definition);
        let mut marked = (**definition).clone();
        if !meta::is_terminating(definition) {
            marked["metadata"]["deletionTimestamp"] = meta::now().into();
            names::set_terminating(&mut marked);
            self.store.put(DEFINITIONS, marked.clone());
        }
        let objects: Vec<Arc<Value>> = self.store.list(name, None).cloned().collect();
        let kind = self.kinds.of_resource(name);
        for object in objects {
            let (namespace, name) = (meta::namespace(&object), meta::name(&object));
            match &kind {
                // Whatever stands in the way, such as a finalizer, ends with the object being marked.
                Some(kind) => drop(self.delete(kind, namespace, name, &Deletion::default())),
                None => drop(self.store.remove(meta::name(definition), namespace, name)),
            }
        }
        self.finish_definition(name);
        self.store.get(DEFINITIONS, "", name).cloned().unwrap_or_else(|| Arc::new(marked))
    }

    /// Removes a definition that is being deleted once it has no objects left.
    pub(super) fn finish_definition(&mut self, name: &str) {
        let Some(definition) = self.store.get(DEFINITIONS, "", name).cloned() else { return };
        let empty = self.store.list(name, None).next().is_none();
        if meta::is_terminating(&definition) && empty && !meta::has_finalizers(&definition) {
            self.kinds.forget(name);
            self.store.remove(DEFINITIONS, "", name);
            self.collect_dependents(meta::uid(&definition));
            self.settle_definitions(meta::text(&definition, "/spec/group"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::DEFINITIONS;
    use crate::api::cluster::{Cluster, Deletion, Write};
    use crate::stack::Stack;

    fn definition() -> Value {
        let schema = json!({"openAPIV3Schema": {"type": "object"}});
        json!({
            "metadata": {"name": "things.x.io"},
            "spec": {
                "group": "x.io", "scope": "Cluster", "names": {"kind": "Thing", "plural": "things"},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": schema}],
            },
        })
    }

    /// A request that found the kind before its definition went leaves nothing behind for the next one.
    #[test]
    fn nothing_is_made_of_a_kind_that_is_gone() {
        let mut cluster = Cluster::new(String::new(), Stack::V4).unwrap();
        let definitions = cluster.kinds.of_resource(DEFINITIONS).unwrap();
        cluster.create(&definitions, "", definition(), Write::default()).unwrap();
        let things = cluster.kinds.named("things").unwrap();
        let thing = || json!({"metadata": {"name": "a"}});
        cluster.create(&things, "", thing(), Write::default()).unwrap();
        cluster.delete(&definitions, "", "things.x.io", &Deletion::default()).unwrap();
        assert_eq!(cluster.create(&things, "", thing(), Write::default()).unwrap_err().code, 404);
        cluster.create(&definitions, "", definition(), Write::default()).unwrap();
        assert_eq!(cluster.create(&things, "", thing(), Write::default()).unwrap_err().code, 404);
        assert!(cluster.store.list("things.x.io", None).next().is_none());
    }
}
