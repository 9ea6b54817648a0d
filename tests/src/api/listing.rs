//! Lists: the objects that are selected, in pages, in the form asked for.

use std::sync::Arc;

use http::Response;
use serde_json::{Value, json};

use super::http::{Body, json as respond_json};
use super::select::Selector;
use super::serve::{Call, JSON};
use super::status::Status;
use super::{convert, meta};

impl Call<'_> {
    pub(super) fn list(&self) -> Result<Response<Body>, Status> {
        let selector = self.selector()?;
        let limit = self.request.query.number("limit")?.unwrap_or(0);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let page = match self.request.query.text("continue") {
            "" => None,
            token => Some(Page::parse(token)?),
        };
        let cluster = self.server.shared.cluster();
        if page.as_ref().is_some_and(|page| !cluster.store.remembers(page.version)) {
            return Err(Status::page_expired());
        }
        let version = page.as_ref().map_or(cluster.store.version(), |page| page.version);
        let mut selected: Vec<Arc<Value>> = cluster
            .store
            .list(&self.kind.resource(), self.scope())
            .filter(|object| page.as_ref().is_none_or(|page| page.is_before(object)))
            .filter(|object| selector.matches(object))
            .cloned()
            .collect();
        drop(cluster);
        let mut metadata = json!({"resourceVersion": version.to_string()});
        if limit > 0 && selected.len() > limit {
            // The real server does not look at what it has not selected yet.
            if selector == Selector::everything() {
                metadata["remainingItemCount"] = (selected.len() - limit).into();
            }
            selected.truncate(limit);
            if let Some(last) = selected.last() {
                metadata["continue"] = Page::after(last, version).into();
            }
        }
        let objects = selected.iter().map(|object| convert::serve(&self.kind, object)).collect();
        Ok(respond_json(200, JSON, &self.form.list(&self.kind, objects, &metadata)))
    }
}

/// Where a list goes on: behind an object, at the version of its first page.
struct Page {
    version: u64,
    namespace: String,
    name: String,
}

impl Page {
    fn after(object: &Value, version: u64) -> String {
        let page = json!([version, meta::namespace(object), meta::name(object)]);
        meta::base64(page.to_string().as_bytes())
    }

    fn parse(token: &str) -> Result<Self, Status> {
        let decoded = meta::from_base64(token).and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let (version, namespace, name) =
            decoded.ok_or_else(|| Status::bad_request("continue key is not valid"))?;
        Ok(Self { version, namespace, name })
    }

    fn is_before(&self, object: &Value) -> bool {
        (self.namespace.as_str(), self.name.as_str()) < (meta::namespace(object), meta::name(object))
    }
}
