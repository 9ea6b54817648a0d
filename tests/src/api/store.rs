//! The objects, their version counter, and the bounded log of changes that watches read. Plain data: no rules.
//! **Invariant:** the log is in version order, and `forgotten` is the newest version no longer in it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde_json::Value;
use tokio::time::Instant;

use super::meta;
use super::status::Status;

/// How many changes a watch may lag behind before it is told 410 Gone.
const HISTORY: usize = 20_000;

/// One change of one object.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) version: u64,
    /// Storage name, as `deployments.apps`.
    pub(super) resource: String,
    /// The object after the change, or the last state with the deletion's version.
    pub(super) object: Arc<Value>,
    pub(super) previous: Option<Arc<Value>>,
    pub(super) deleted: bool,
    pub(super) at: Instant,
}

/// Namespace (empty for cluster scope) and name.
type Key = (String, String);

#[derive(Debug)]
pub(super) struct Store {
    version: u64,
    forgotten: u64,
    objects: BTreeMap<String, BTreeMap<Key, Arc<Value>>>,
    log: VecDeque<Arc<Change>>,
}

impl Store {
    pub(super) fn new() -> Self {
        Self { version: 1, forgotten: 0, objects: BTreeMap::new(), log: VecDeque::new() }
    }

    /// The newest version.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<&Arc<Value>> {
        self.objects.get(resource)?.get(&(namespace.to_owned(), name.to_owned()))
    }

    /// The objects of a resource in order of namespace and name, in one namespace or all.
    pub(super) fn list<'a>(
        &'a self,
        resource: &str,
        namespace: Option<&'a str>,
    ) -> impl Iterator<Item = &'a Arc<Value>> + use<'a> {
        let start = (namespace.unwrap_or_default().to_owned(), String::new());
        self.objects
            .get(resource)
            .into_iter()
            .flat_map(move |objects| objects.range(start.clone()..))
            .take_while(move |((found, _), _)| namespace.is_none_or(|wanted| wanted == found))
            .map(|(_, object)| object)
    }

    /// All objects with their resources.
    pub(super) fn all(&self) -> impl Iterator<Item = (&str, &Arc<Value>)> {
        self.objects
            .iter()
            .flat_map(|(resource, objects)| objects.values().map(move |object| (resource.as_str(), object)))
    }

    /// Stores `object` under its own name, with the next version.
    pub(super) fn put(&mut self, resource: &str, mut object: Value) -> Arc<Value> {
        let key = (meta::namespace(&object).to_owned(), meta::name(&object).to_owned());
        self.stamp(&mut object);
        let object = Arc::new(object);
        let previous = self.objects.entry(resource.to_owned()).or_default().insert(key, object.clone());
        self.record(resource, object.clone(), previous, false);
        object
    }

    /// Removes an object and returns its last state with the deletion's version.
    pub(super) fn remove(&mut self, resource: &str, namespace: &str, name: &str) -> Option<Arc<Value>> {
        let key = (namespace.to_owned(), name.to_owned());
        let previous = self.objects.get_mut(resource)?.remove(&key)?;
        let mut last = (*previous).clone();
        self.stamp(&mut last);
        let last = Arc::new(last);
        self.record(resource, last.clone(), Some(previous), true);
        Some(last)
    }

    /// The first change of `resource` after version `after`, and the version up to which the log was read.
    /// 410 Gone when the log no longer reaches back to `after`.
    pub(super) fn next_change(
        &self,
        resource: &str,
        after: u64,
    ) -> Result<(Option<Arc<Change>>, u64), Status> {
        if !self.remembers(after) {
            return Err(Status::gone(after, self.forgotten));
        }
        let start = self.log.partition_point(|change| change.version <= after);
        match self.log.range(start..).find(|change| change.resource == resource) {
            Some(change) => Ok((Some(change.clone()), change.version)),
            None => Ok((None, self.version.max(after))),
        }
    }

    /// Whether the log still holds every change after `version`.
    pub(super) fn remembers(&self, version: u64) -> bool {
        version >= self.forgotten
    }

    /// Forgets all changes up to now.
    pub(super) fn compact(&mut self) {
        self.log.clear();
        // One more, so that even a watch from the newest version so far is too old.
        self.version += 1;
        self.forgotten = self.version;
    }

    fn stamp(&mut self, object: &mut Value) {
        self.version += 1;
        let metadata = meta::metadata(object);
        metadata.insert("resourceVersion".to_owned(), self.version.to_string().into());
    }

    fn record(&mut self, resource: &str, object: Arc<Value>, previous: Option<Arc<Value>>, deleted: bool) {
        if self.log.len() == HISTORY
            && let Some(dropped) = self.log.pop_front()
        {
            self.forgotten = dropped.version;
        }
        let (version, resource, at) = (self.version, resource.to_owned(), Instant::now());
        self.log.push_back(Arc::new(Change { version, resource, object, previous, deleted, at }));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Store;
    fn version(object: &serde_json::Value) -> u64 {
        object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
    }

    #[test]
    fn changes_are_read_in_order_and_per_resource() {
        let mut store = Store::new();
        let start = store.version();
        let first = version(&store.put("pods", json!({"metadata": {"name": "a", "namespace": "n"}})));
        store.put("nodes", json!({"metadata": {"name": "x"}}));
        let last = version(&store.remove("pods", "n", "a").unwrap());
        let (change, seen) = store.next_change("pods", start).unwrap();
        assert_eq!((seen, change.unwrap().deleted), (first, false));
        let (change, seen) = store.next_change("pods", first).unwrap();
        assert_eq!((seen, change.unwrap().deleted), (last, true));
        assert_eq!(store.next_change("pods", last).unwrap().1, last);
        assert!(store.list("pods", None).next().is_none());
    }

    #[test]
    fn a_compacted_log_answers_gone() {
        let mut store = Store::new();
        let version = version(&store.put("nodes", json!({"metadata": {"name": "x"}})));
        store.compact();
        assert_eq!(store.next_change("nodes", version).unwrap_err().code, 410);
        assert!(store.next_change("nodes", store.version()).unwrap().0.is_none());
    }

    #[test]
    fn a_namespace_lists_only_its_own() {
        let mut store = Store::new();
        for (namespace, name) in [("a", "1"), ("ab", "2"), ("a", "3"), ("b", "4")] {
            store.put("pods", json!({"metadata": {"name": name, "namespace": namespace}}));
        }
        let names = |namespace| {
            store.list("pods", namespace).map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned())
        };
        assert_eq!(names(Some("a")).collect::<Vec<_>>(), ["1", "3"]);
        assert_eq!(names(None).count(), 4);
    }
}
