//! An object of the API server that is not decoded yet: only what a watch itself needs is read.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{Deserialize, DeserializeOwned, Deserializer};
use serde_json::Value;

use crate::index::event::ObjectName;

/// JSON of an object that is said to be a `K`.
pub(super) struct Raw<K> {
    meta: ObjectMeta,
    json: Value,
    kind: PhantomData<fn() -> K>,
}

impl<K> Raw<K> {
    pub(super) fn name(&self) -> ObjectName {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        ObjectName::new(&text(&self.meta.namespace), &text(&self.meta.name))
    }
}

impl<K> Raw<K> {
    pub(super) fn decode<T: DeserializeOwned>(self) -> Result<T, serde_json::Error> {
        serde_json::from_value(self.json)
    }
}

impl<'de, K> Deserialize<'de> for Raw<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Value::deserialize(deserializer)?;
        let text = |field: &str| json["metadata"][field].as_str().map(str::to_owned);
        let meta = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        Ok(Self { meta, json, kind: PhantomData })
    }
}

impl<K> Clone for Raw<K> {
    fn clone(&self) -> Self {
        Self { meta: self.meta.clone(), json: self.json.clone(), kind: PhantomData }
    }
}

impl<K> fmt::Debug for Raw<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Raw").field(&self.meta.namespace).field(&self.meta.name).finish()
    }
}

/// Everything but the contents is `K`'s.
impl<K: Resource> Resource for Raw<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dt: &K::DynamicType) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &K::DynamicType) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &K::DynamicType) -> Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &K::DynamicType) -> Cow<'_, str> {
        K::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}
