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

/// Holds an owner until its dependents are gone.
const FOREGROUND: &str = "foregroundDeletion";
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
        if deletion.foreground && !self.dependents(meta::uid(&object)).is_empty() {
            return Ok(self.delete_after_dependents(kind, &object, grace));
        }
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
        for owner in meta::items(object, "/metadata/ownerReferences") {
            self.release(meta::text(owner, "/uid"));
        }
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

    /// Foreground garbage collection: the owner is marked, its dependents are deleted, and it goes after them.
    fn delete_after_dependents(&mut self, kind: &Kind, object: &Arc<Value>, grace: u64) -> Arc<Value> {
        if waits_for_dependents(object) {
            return object.clone();
        }
        let mut held = (**object).clone();
        meta::push(&mut held["metadata"], "finalizers", FOREGROUND.into());
        let marked = self.mark(kind, &Arc::new(held), grace);
        let owner = meta::uid(object);
        for (kind, dependent) in self.dependents(owner) {
            let mut owners = meta::items(&dependent, "/metadata/ownerReferences");
            let others = |uid: &str| uid != owner && self.is_alive(uid);
            if !owners.any(|reference| others(meta::text(reference, "/uid"))) {
                let deletion = Deletion { foreground: true, ..Deletion::default() };
                drop(self.delete(&kind, meta::namespace(&dependent), meta::name(&dependent), &deletion));
            }
        }
        self.release(owner);
        self.get(kind, meta::namespace(object), meta::name(object)).unwrap_or(marked)
    }

    /// Lets an owner go that waits for its dependents, once none is left that blocks it.
    fn release(&mut self, owner: &str) {
        let waiting = self.objects_where(|object| meta::uid(object) == owner && waits_for_dependents(object));
        let Some((kind, object)) = waiting.into_iter().next() else { return };
        let blocks = |reference: &Value| reference["uid"] == owner && reference["blockOwnerDeletion"] == true;
        let blocked = self
            .dependents(owner)
            .iter()
            .any(|(_, dependent)| meta::items(dependent, "/metadata/ownerReferences").any(blocks));
        if !blocked {
            let mut freed = (*object).clone();
            if let Some(finalizers) = freed["metadata"]["finalizers"].as_array_mut() {
                finalizers.retain(|name| name != FOREGROUND);
            }
            let freed = self.store.put(&kind.resource(), freed);
            self.remove_if_released(&kind, &freed);
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

fn waits_for_dependents(object: &Value) -> bool {
    meta::is_terminating(object) && meta::items(object, "/metadata/finalizers").any(|name| name == FOREGROUND)
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::api::cluster::{Cluster, Deletion, Part, Write};
    use crate::api::meta;
    use crate::stack::Stack;

    /// A cluster with ConfigMaps of these names, each owned by the one before it.
    fn chain(names: &[&str], blocks: bool) -> Cluster {
        let mut cluster = Cluster::new(String::new(), Stack::V4).unwrap();
        let kind = cluster.kinds.named("configmaps").unwrap();
        let mut owners = json!([]);
        for name in names {
            let object =
                json!({"metadata": {"name": name, "ownerReferences": owners, "finalizers": ["x.io/hold"]}});
            let made = cluster.create(&kind, "default", object, Write::default()).unwrap();
            owners = json!([{
                "apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": meta::uid(&made), "blockOwnerDeletion": blocks,
            }]);
        }
        cluster
    }

    /// Takes the finalizer that the object was made with.
    fn let_go(cluster: &mut Cluster, name: &str) {
        let kind = cluster.kinds.named("configmaps").unwrap();
        let mut object = (*cluster.get(&kind, "default", name).unwrap()).clone();
        let finalizers = object["metadata"]["finalizers"].as_array_mut().unwrap();
        finalizers.retain(|name| name != "x.io/hold");
        cluster.replace(&kind, ("default", name), Part::Whole, object, Write::default()).unwrap();
    }

    /// `name:finalizers` of what is there, with a star if it is going away.
    fn left(cluster: &Cluster) -> String {
        let told = |object: &Value| {
            let holds: Vec<&str> = meta::items(object, "/metadata/finalizers")
                .map(|name| &name.as_str().unwrap()[..3])
                .collect();
            let star = if meta::is_terminating(object) { "*" } else { "" };
            format!("{}{star}:{}", meta::name(object), holds.join(","))
        };
        let objects = cluster.store.list("configmaps", Some("default"));
        let own = objects.filter(|object| meta::name(object).len() == 1);
        own.map(|object| told(object)).collect::<Vec<_>>().join(" ")
    }

    fn delete(cluster: &mut Cluster, name: &str, foreground: bool) {
        let kind = cluster.kinds.named("configmaps").unwrap();
        let deletion = Deletion { foreground, ..Deletion::default() };
        cluster.delete(&kind, "default", name, &deletion).unwrap();
    }

    #[test]
    fn an_owner_goes_after_its_dependents_if_asked_to() {
        let mut cluster = chain(&["a", "b", "c"], true);
        delete(&mut cluster, "a", true);
        assert_eq!(left(&cluster), "a*:x.i,for b*:x.i,for c*:x.i");
        delete(&mut cluster, "a", true);
        let_go(&mut cluster, "a");
        assert_eq!(left(&cluster), "a*:for b*:x.i,for c*:x.i");
        let_go(&mut cluster, "c");
        assert_eq!(left(&cluster), "a*:for b*:x.i");
        let_go(&mut cluster, "b");
        assert_eq!(left(&cluster), "");
    }

    #[test]
    fn a_dependent_that_does_not_block_is_not_waited_for() {
        let mut cluster = chain(&["a", "b"], false);
        delete(&mut cluster, "a", true);
        assert_eq!(left(&cluster), "a*:x.i b*:x.i");
    }

    #[test]
    fn by_default_dependents_go_after_their_owner() {
        let mut cluster = chain(&["a", "b"], true);
        delete(&mut cluster, "a", false);
        assert_eq!(left(&cluster), "a*:x.i b:x.i");
        let_go(&mut cluster, "a");
        assert_eq!(left(&cluster), "b*:x.i");
    }
}
