//! One request, start to end: understand, authorize, read the body, act, answer in the form asked for.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, USER_AGENT};
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::cluster::{Deletion, Part, Write, success};
use super::http::{Body, Server, json as respond_json, respond};
use super::kinds::Kind;
use super::meta;
use super::patch::{Patch, PatchKind};
use super::request::Request;
use super::select::Selector;
use super::status::Status;
use super::table::{self, Include};
use super::token::User;
use super::{convert, discovery, protobuf, review, stream, subresource};

/// Largest body read, in bytes, as the real server's.
const LARGEST_BODY: usize = 3 << 20;
const JSON: &str = "application/json";

/// A request for a known resource.
pub(super) struct Call<'a> {
    pub(super) server: &'a Server,
    pub(super) user: &'a User,
    pub(super) request: Request,
    pub(super) kind: Arc<Kind>,
    pub(super) accept: String,
    pub(super) content_type: String,
    /// `User-Agent`.
    pub(super) agent: String,
    pub(super) body: Bytes,
}

/// Answers a request of `user`.
pub(super) async fn request(
    server: &Server,
    user: &User,
    incoming: http::Request<Incoming>,
) -> Result<Response<Body>, Status> {
    let uri = incoming.uri();
    let request = Request::parse(incoming.method(), uri.path(), uri.query().unwrap_or_default());
    let header = |name| {
        let value = incoming.headers().get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let (accept, content_type, agent) = (header(ACCEPT), header(CONTENT_TYPE), header(USER_AGENT));
    {
        let granted = server.shared.cluster().allows(user, &request.attributes);
        server.shared.note(&user.name, request.attributes.asked(granted));
        if !granted {
            return Err(request.attributes.refusal(user));
        }
    }
    if let Some(path) = &request.attributes.path {
        return outside_resources(server, &request, path, &accept);
    }
    let attributes = &request.attributes;
    let kind = server.shared.cluster().kinds.find(&attributes.group, &request.version, &attributes.resource);
    let kind = kind.ok_or_else(Status::unknown_path)?;
    if !attributes.namespace.is_empty() && !kind.namespaced && kind.kind != "Namespace" {
        return Err(Status::unknown_path());
    }
    let body = read(incoming.into_body()).await?;
    Call { server, user, request, kind, accept, content_type, agent, body }.answer()
}

async fn read(body: Incoming) -> Result<Bytes, Status> {
    match Limited::new(body, LARGEST_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(Status::too_large(LARGEST_BODY)),
        Err(error) => Err(Status::bad_request(format!("the request body could not be read: {error}"))),
    }
}

fn outside_resources(
    server: &Server,
    request: &Request,
    path: &str,
    accept: &str,
) -> Result<Response<Body>, Status> {
    if !["get", "head"].contains(&request.attributes.verb.as_str()) {
        return Err(Status::method_not_allowed());
    }
    match path {
        "/healthz" | "/readyz" | "/livez" => Ok(respond(200, "text/plain", "ok".into())),
        "/" => Ok(respond_json(
            200,
            JSON,
            &json!({"paths": ["/api", "/apis", "/healthz", "/openapi/v3", "/version"]}),
        )),
        _ => {
            let document = discovery::document(&server.shared.cluster().kinds, path, accept);
            let document = document.ok_or_else(Status::unknown_path)?;
            Ok(respond_json(200, document.content_type, &document.body))
        }
    }
}

impl Call<'_> {
    /// The namespace objects are stored under.
    pub(super) fn namespace(&self) -> &str {
        if self.kind.namespaced { &self.request.attributes.namespace } else { "" }
    }

    pub(super) fn name(&self) -> &str {
        &self.request.attributes.name
    }

    fn answer(self) -> Result<Response<Body>, Status> {
        let attributes = &self.request.attributes;
        let verb = attributes.verb.as_str();
        if self.kind.review {
            if verb != "create" {
                return Err(Status::method_not_allowed());
            }
            let cluster = self.server.shared.cluster();
            let answer =
                review::review(&cluster, &self.server.tokens, self.user, &self.kind, self.object()?)?;
            return Ok(respond_json(201, JSON, &answer));
        }
        match (attributes.subresource.as_str(), verb) {
            ("", "get") => self.one(200, &*self.stored()?),
            ("", "list") => self.list(),
            ("", "watch") => self.watch(),
            ("", "create") if attributes.name.is_empty() => self.create(),
            ("", "update") => self.update(Part::Whole),
            ("", "patch") => self.patch(Part::Whole),
            ("", "delete") => self.delete(),
            ("", "deletecollection") => self.delete_collection(),
            ("", _) => Err(Status::method_not_allowed()),
            ("status", "get") if self.kind.status => self.one(200, &*self.stored()?),
            ("status", "update") if self.kind.status => self.update(Part::Status),
            ("status", "patch") if self.kind.status => self.patch(Part::Status),
            _ => subresource::answer(&self),
        }
    }

    /// The object the path names.
    pub(super) fn stored(&self) -> Result<Arc<Value>, Status> {
        self.server.shared.cluster().get(&self.kind, self.namespace(), self.name())
    }

    /// The body as JSON.
    pub(super) fn object(&self) -> Result<Value, Status> {
        let content_type = self.content_type.split(';').next().unwrap_or_default().trim();
        let readable = ["", JSON, "*/*", "application/x-www-form-urlencoded"].contains(&content_type)
            || content_type.ends_with("+json")
            || content_type == "application/apply-patch+yaml";
        if content_type == protobuf::MEDIA_TYPE {
            return protobuf::decode(&self.body).map_err(|why| Status::protobuf(&why.to_string()));
        }
        if !readable {
            return Err(Status::unsupported_media(content_type, JSON));
        }
        serde_json::from_slice(&self.body).map_err(|error| {
            Status::bad_request(format!(
                "the object provided is unrecognized (must be of type {}): {error}",
                self.kind.kind
            ))
        })
    }

    pub(super) fn write(&self) -> Write {
        let query = &self.request.query;
        Write {
            dry_run: !query.text("dryRun").is_empty(),
            strict: query.text("fieldValidation") == "Strict",
            manager: self.manager(),
            force: query.flag("force"),
            applied: false,
        }
    }

    /// Who the client says it is: by the parameter, else as in `User-Agent: kubectl/v1.33.0`.
    fn manager(&self) -> String {
        let apply = self.content_type.starts_with("application/apply-patch+yaml");
        match self.request.query.text("fieldManager") {
            "" if apply => String::new(),
            "" => self.agent.split('/').next().unwrap_or_default().chars().take(128).collect(),
            named => named.to_owned(),
        }
    }

    fn selector(&self) -> Result<Selector, Status> {
        Selector::parse(self.request.query.text("labelSelector"), self.request.query.text("fieldSelector"))
    }

    fn scope(&self) -> Option<&str> {
        let namespace = self.namespace();
        (!namespace.is_empty()).then_some(namespace)
    }

    /// One object in the form asked for.
    pub(super) fn one(&self, code: u16, object: &Value) -> Result<Response<Body>, Status> {
        let object = convert::serve(&self.kind, object);
        if table::is_wanted(&self.accept) {
            let metadata = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
            let table = table::table(&self.kind, [&object].into_iter(), metadata, self.include());
            return Ok(respond_json(code, JSON, &table));
        }
        Ok(respond_json(code, JSON, &object))
    }

    fn include(&self) -> Include {
        Include::parse(self.request.query.text("includeObject"))
    }

    fn list(&self) -> Result<Response<Body>, Status> {
        let selector = self.selector()?;
        let limit = self.request.query.number("limit")?.unwrap_or(0);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let start = self.request.query.text("continue");
        let start = if start.is_empty() { None } else { Some(Page::parse(start)?) };
        let cluster = self.server.shared.cluster();
        let mut version = cluster.store.version();
        let mut selected: Vec<Arc<Value>> = cluster
            .store
            .list(&self.kind.resource(), self.scope())
            .filter(|object| start.as_ref().is_none_or(|page| page.is_before(object)))
            .filter(|object| selector.matches(object))
            .cloned()
            .collect();
        drop(cluster);
        if let Some(page) = start {
            version = page.version;
        }
        let mut metadata = json!({"resourceVersion": version.to_string()});
        if limit > 0 && selected.len() > limit {
            metadata["remainingItemCount"] = (selected.len() - limit).into();
            selected.truncate(limit);
            if let Some(last) = selected.last() {
                metadata["continue"] = Page::after(last, version).into();
            }
        }
        let objects = selected.iter().map(|object| convert::serve(&self.kind, object));
        if table::is_wanted(&self.accept) {
            let objects: Vec<Value> = objects.collect();
            let table = table::table(&self.kind, objects.iter(), metadata, self.include());
            return Ok(respond_json(200, JSON, &table));
        }
        let kind = format!("{}List", self.kind.kind);
        let items: Vec<Value> = objects.collect();
        let list = json!({"kind": kind, "apiVersion": self.kind.api_version(), "metadata": metadata, "items": items});
        Ok(respond_json(200, JSON, &list))
    }

    fn watch(self) -> Result<Response<Body>, Status> {
        let selector = self.selector()?;
        let namespace = self.scope().map(str::to_owned);
        stream::watch(&self, namespace, selector, self.include())
    }

    fn create(&self) -> Result<Response<Body>, Status> {
        let (object, write) = (self.object()?, self.write());
        let made = self
            .server
            .shared
            .change(|cluster| cluster.create(&self.kind, self.namespace(), object, write))?;
        self.one(201, &made)
    }

    fn update(&self, part: Part) -> Result<Response<Body>, Status> {
        let (object, write) = (self.object()?, self.write());
        let place = (self.namespace(), self.name());
        let new =
            self.server.shared.change(|cluster| cluster.replace(&self.kind, place, part, object, write))?;
        self.one(200, &new)
    }

    fn patch(&self, part: Part) -> Result<Response<Body>, Status> {
        let patch = self.patch_body()?;
        let (place, write) = ((self.namespace(), self.name()), self.write());
        let new =
            self.server.shared.change(|cluster| cluster.patch(&self.kind, place, part, &patch, write))?;
        self.one(200, &new)
    }

    /// The body as a patch of the kind its content type tells.
    pub(super) fn patch_body(&self) -> Result<Patch, Status> {
        let supported = "application/json-patch+json, application/merge-patch+json, \
                         application/strategic-merge-patch+json, application/apply-patch+yaml";
        let kind = match self.content_type.split(';').next().unwrap_or_default().trim() {
            "application/merge-patch+json" => PatchKind::Merge,
            "application/strategic-merge-patch+json" => PatchKind::Strategic,
            "application/json-patch+json" => PatchKind::Json,
            "application/apply-patch+yaml" => PatchKind::Apply,
            other => return Err(Status::unsupported_media(other, supported)),
        };
        Ok(Patch { kind, body: self.object()? })
    }

    fn deletion(&self) -> Result<Deletion, Status> {
        let options = if self.body.is_empty() { Value::Null } else { self.object()? };
        let query = &self.request.query;
        let word = |name: &str, from_body: &str| {
            let asked = query.text(name);
            if asked.is_empty() { from_body.to_owned() } else { asked.to_owned() }
        };
        let precondition = |name: &str| options["preconditions"][name].as_str().map(str::to_owned);
        let policy = word("propagationPolicy", meta::text(&options, "/propagationPolicy"));
        Ok(Deletion {
            grace: query.number("gracePeriodSeconds")?.or(options["gracePeriodSeconds"].as_u64()),
            uid: precondition("uid"),
            version: precondition("resourceVersion"),
            orphan: policy == "Orphan" || options["orphanDependents"] == true,
            dry_run: self.write().dry_run || meta::items(&options, "/dryRun").next().is_some(),
        })
    }

    fn delete(&self) -> Result<Response<Body>, Status> {
        let deletion = self.deletion()?;
        let (namespace, name) = (self.namespace(), self.name());
        let (last, there) = self.server.shared.change(|cluster| {
            let last = cluster.delete(&self.kind, namespace, name, &deletion)?;
            Ok((last, cluster.get(&self.kind, namespace, name).is_ok()))
        })?;
        if there {
            return self.one(StatusCode::OK.as_u16(), &last);
        }
        Ok(respond_json(200, JSON, &success(&self.kind, &last)))
    }

    fn delete_collection(&self) -> Result<Response<Body>, Status> {
        let (selector, deletion) = (self.selector()?, self.deletion()?);
        self.server.shared.change(|cluster| {
            let objects = cluster.store.list(&self.kind.resource(), self.scope());
            let doomed: Vec<Arc<Value>> =
                objects.filter(|object| selector.matches(object)).cloned().collect();
            for object in doomed {
                match cluster.delete(&self.kind, meta::namespace(&object), meta::name(&object), &deletion) {
                    // One before it may have taken it along.
                    Err(status) if !status.is_not_found() => return Err(status),
                    _ => {}
                }
            }
            Ok(())
        })?;
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"});
        Ok(respond_json(200, JSON, &status))
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
