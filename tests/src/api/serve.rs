//! One request, start to end: understand, authorize, read the body, act, answer in the form asked for.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, USER_AGENT};
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::cluster::{Part, success};
use super::form::Form;
use super::http::{Body, Server, json as respond_json, respond};
use super::kinds::Kind;
use super::meta;
use super::patch::{Patch, PatchKind};
use super::request::Request;
use super::select::Selector;
use super::status::Status;
use super::token::User;
use super::{convert, discovery, protobuf, review, stream, subresource};

/// Largest body read, in bytes, as the real server's.
const LARGEST_BODY: usize = 3 << 20;
pub(super) const JSON: &str = "application/json";

/// A request for a known resource.
pub(super) struct Call<'a> {
    pub(super) server: &'a Server,
    pub(super) user: &'a User,
    pub(super) request: Request,
    pub(super) kind: Arc<Kind>,
    pub(super) form: Form,
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
    let form = Form::parse(&accept, request.query.text("includeObject"));
    Call { server, user, request, kind, form, content_type, agent, body }.answer()
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

    /// What the parameters select; 400 for fields that objects of the kind cannot be selected by.
    pub(super) fn selector(&self) -> Result<Selector, Status> {
        let query = &self.request.query;
        Selector::parse(query.text("labelSelector"), query.text("fieldSelector"))?.of_kind(&self.kind)
    }

    pub(super) fn scope(&self) -> Option<&str> {
        let namespace = self.namespace();
        (!namespace.is_empty()).then_some(namespace)
    }

    /// One object in the form asked for.
    pub(super) fn one(&self, code: u16, object: &Value) -> Result<Response<Body>, Status> {
        let object = self.form.one(&self.kind, convert::serve(&self.kind, object));
        Ok(respond_json(code, JSON, &object))
    }

    fn watch(self) -> Result<Response<Body>, Status> {
        let selector = self.selector()?;
        let namespace = self.scope().map(str::to_owned);
        stream::watch(&self, namespace, selector)
    }

    fn create(&self) -> Result<Response<Body>, Status> {
        let (object, write) = (self.object()?, self.write()?);
        let made = self
            .server
            .shared
            .change(|cluster| cluster.create(&self.kind, self.namespace(), object, write))?;
        self.one(201, &made)
    }

    fn update(&self, part: Part) -> Result<Response<Body>, Status> {
        let (object, write) = (self.object()?, self.write()?);
        let place = (self.namespace(), self.name());
        let new =
            self.server.shared.change(|cluster| cluster.replace(&self.kind, place, part, object, write))?;
        self.one(200, &new)
    }

    fn patch(&self, part: Part) -> Result<Response<Body>, Status> {
        let patch = self.patch_body()?;
        let (place, write) = ((self.namespace(), self.name()), self.write()?);
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

    fn delete_options(&self) -> Result<Value, Status> {
        if self.body.is_empty() { Ok(Value::Null) } else { self.object() }
    }

    fn delete(&self) -> Result<Response<Body>, Status> {
        let deletion = self.deletion(&self.delete_options()?)?;
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
        let (selector, deletion) = (self.selector()?, self.deletion(&self.delete_options()?)?);
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
