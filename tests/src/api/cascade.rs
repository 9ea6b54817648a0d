//! What follows from a deletion: grace for pods, finalizers, dependents of a deleted owner, the content of a
//! namespace, the resources of a definition.
//! **Invariant:** an object with finalizers is never removed.

use std::sync::Arc;

use serde_json::Value;

use super::cluster::{Cluster, Deletion};
use super::definition::DEFINITIONS;
use super::kinds::Kind;
use super::meta;
use super::status::Status;

/// Grace of a pod that names none, in seconds.
const POD_GRACE: u64 = 30;

impl Cluster {
    /// Deletes an object, or marks it when it must wait for a kubelet, finalizers or a namespace's content.
    /// The answer is its last state, or the state it waits in (then it has a `deletionTimestamp`).
    pub(super) fn delete(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        deletion: &Deletion,
    ) -> Result<Arc<Value>, Status> {
        let object = self.get(kind, namespace, name)?;
        check_preconditions(kind, &object, deletion)?;
        if kind.kind == "Namespace" && ["default", "kube-system", "kube-public"].contains(&name) {
            return Err(Status::forbidden("namespaces", "", name, "this namespace may not be deleted"));
        }
        if deletion.dry_run {
            return Ok(object);
        }
        if deletion.orphan {
            self.orphan_dependents(meta::uid(&object));
        }
        match kind.resource().as_str() {
            "namespaces" => return Ok(self.delete_namespace(kind, &object)),
            DEFINITIONS => return Ok(self.delete_definition(&object)),
            _ => {}
        }
        let grace = if kind.kind == "Pod" { pod_grace(&object, deletion.grace) } else { 0 };
        if grace == 0 && !meta::has_finalizers(&object) {
            return Ok(self.remove(kind, &object));
        }
        Ok(self.mark(kind, &object, grace))
    }

    /// Removes what waited only for this change.
    pub(super) fn remove_if_released(&mut self, kind: &Kind, object: &Value) {
        let grace = object["metadata"]["deletionGracePeriodSeconds"].as_u64().unwrap_or(0);
        if meta::is_terminating(object) && !meta::has_finalizers(object) && grace == 0 {
            match kind.resource().as_str() {
                "namespaces" => self.finish_namespace(meta::name(object)),
                DEFINITIONS => self.finish_definition(meta::name(object)),
                _ => drop(self.remove(kind, object)),
            }
        }
    }

    /// Whether any object has this uid.
    pub(super) fn is_alive(&self, uid: &str) -> bool {
        self.store.all().any(|(_, object)| meta::uid(object) == uid)
    }

    fn mark(&mut self, kind: &Kind, object: &Arc<Value>, grace: u64) -> Arc<Value> {
        let waits = object["metadata"]["deletionGracePeriodSeconds"].as_u64();
        if meta::is_terminating(object) && waits.is_some_and(|waits| waits <= grace) {
            return object.clone();
        }
        let mut marked = (**object).clone();
        let seconds = i64::try_from(grace).unwrap_or(i64::MAX);
        marked["metadata"]["deletionTimestamp"] = meta::time_after(seconds).into();
        marked["metadata"]["deletionGracePeriodSeconds"] = grace.into();
        if kind.generation {
            let generation = marked["metadata"]["generation"].as_u64().unwrap_or(0);
            marked["metadata"]["generation"] = (generation + 1).into();
        }
        self.store.put(&kind.resource(), marked)
    }

    fn remove(&mut self, kind: &Kind, object: &Value) -> Arc<Value> {
        let (namespace, name) = (meta::namespace(object), meta::name(object));
        let last = self.store.remove(&kind.resource(), namespace, name);
        self.collect_dependents(meta::uid(object));
        self.finish_namespace(namespace);
        if kind.custom.is_some() {
            self.finish_definition(&kind.resource());
        }
        last.unwrap_or_else(|| Arc::new(object.clone()))
    }

    /// Background garbage collection: dependents go when no owner is left.
    pub(super) fn collect_dependents(&mut self, owner: &str) {
        for (kind, object) in self.dependents(owner) {
            let mut owners = meta::items(&object, "/metadata/ownerReferences");
            if !owners.any(|reference| self.is_alive(meta::text(reference, "/uid"))) {
                // Whatever stands in the way, such as a finalizer, ends with the dependent being marked.
                drop(self.delete(&kind, meta::namespace(&object), meta::name(&object), &Deletion::default()));
            }
        }
    }

    fn orphan_dependents(&mut self, owner: &str) {
        for (kind, object) in self.dependents(owner) {
            let mut freed = (*object).clone();
            if let Some(references) = freed["metadata"]["ownerReferences"].as_array_mut() {
                references.retain(|reference| meta::text(reference, "/uid") != owner);
            }
            self.store.put(&kind.resource(), freed);
        }
    }

    fn dependents(&self, owner: &str) -> Vec<(Arc<Kind>, Arc<Value>)> {
        self.objects_where(|object| {
            meta::items(object, "/metadata/ownerReferences")
                .any(|reference| meta::text(reference, "/uid") == owner)
        })
    }

    fn objects_where(&self, wanted: impl Fn(&Value) -> bool) -> Vec<(Arc<Kind>, Arc<Value>)> {
        self.store
            .all()
            .filter(|(_, object)| wanted(object))
            .filter_map(|(resource, object)| Some((self.kinds.of_resource(resource)?, object.clone())))
            .collect()
    }

    fn delete_namespace(&mut self, kind: &Kind, namespace: &Arc<Value>) -> Arc<Value> {
        let name = meta::name(namespace);
        let mut marked = (**namespace).clone();
        if !meta::is_terminating(namespace) {
            marked["metadata"]["deletionTimestamp"] = meta::now().into();
            marked["status"]["phase"] = "Terminating".into();
            self.store.put(&kind.resource(), marked.clone());
        }
        for (kind, object) in self.objects_where(|object| meta::namespace(object) == name) {
            drop(self.delete(&kind, name, meta::name(&object), &Deletion::default()));
        }
        self.finish_namespace(name);
        self.store.get("namespaces", "", name).cloned().unwrap_or_else(|| Arc::new(marked))
    }

    /// Removes a namespace that is being deleted once nothing is left in it.
    fn finish_namespace(&mut self, name: &str) {
        let Some(namespace) = self.store.get("namespaces", "", name).cloned() else { return };
        let empty = !self.store.all().any(|(_, object)| meta::namespace(object) == name);
        if meta::is_terminating(&namespace) && empty && !meta::has_finalizers(&namespace) {
            self.store.remove("namespaces", "", name);
            self.collect_dependents(meta::uid(&namespace));
        }
    }
}

/// The grace a pod gets: none when no kubelet has it or it has ended.
fn pod_grace(pod: &Value, asked: Option<u64>) -> u64 {
    let ended = ["Succeeded", "Failed"].contains(&meta::text(pod, "/status/phase"));
    if meta::text(pod, "/spec/nodeName").is_empty() || ended {
        return 0;
    }
    let own = pod.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_u64);
    asked.or(own).unwrap_or(POD_GRACE)
}

fn check_preconditions(kind: &Kind, object: &Value, deletion: &Deletion) -> Result<(), Status> {
    for (what, wanted, path) in [
        ("UID", &deletion.uid, "/metadata/uid"),
        ("ResourceVersion", &deletion.version, "/metadata/resourceVersion"),
    ] {
        let found = meta::text(object, path);
        if let Some(wanted) = wanted
            && wanted != found
        {
            let why = format!(
                "Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}"
            );
            return Err(Status::conflict(&kind.plural, &kind.group, meta::name(object), &why));
        }
    }
    Ok(())
}
