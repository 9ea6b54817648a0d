//! Subresources other than `status`: scale, token, eviction, binding, log. What needs a stream into a container
//! (exec, attach, port-forward) is refused with a clear error.

use http::Response;
use serde_json::{Value, json};

use super::cluster::Part;
use super::http::{Body, json as respond_json, respond};
use super::kinds::Scale;
use super::meta;
use super::patch::{Patch, PatchKind};
use super::select::Selector;
use super::serve::Call;
use super::status::Status;
use super::{convert, review};

const JSON: &str = "application/json";

pub(super) fn answer(call: &Call<'_>) -> Result<Response<Body>, Status> {
    let attributes = &call.request.attributes;
    let wanted = (call.kind.resource(), attributes.subresource.as_str(), attributes.verb.as_str());
    match (wanted.0.as_str(), wanted.1, wanted.2) {
        (_, "scale", verb @ ("get" | "update" | "patch")) => {
            scale(call, verb, call.kind.scale.as_ref().ok_or_else(Status::unknown_path)?)
        }
        ("serviceaccounts", "token", "create") => token(call),
        ("pods", "eviction", "create") => evict(call),
        ("pods", "binding", "create") => bind(call),
        ("pods", "log", "get") => log(call),
        ("pods", "exec" | "attach" | "portforward" | "proxy", _) => {
            let what = format!("pods/{}", attributes.subresource);
            Err(Status::not_supported(&what))
        }
        ("namespaces", "finalize", _) => Err(Status::not_supported("namespaces/finalize")),
        _ => Err(Status::unknown_path()),
    }
}

fn scale_of(paths: &Scale, object: &Value) -> Value {
    let selector = match &paths.selector {
        Some(path) => meta::text(object, path).to_owned(),
        None => Selector::of_label_selector(&object["spec"]["selector"]).to_string(),
    };
    let own = &object["metadata"];
    let number = |path: &str| object.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": own["name"], "namespace": own["namespace"], "uid": own["uid"],
            "resourceVersion": own["resourceVersion"], "creationTimestamp": own["creationTimestamp"],
        },
        "spec": {"replicas": number(&paths.wanted)},
        "status": {"replicas": number(&paths.running), "selector": selector},
    })
}

fn scale(call: &Call<'_>, verb: &str, paths: &Scale) -> Result<Response<Body>, Status> {
    let old = scale_of(paths, &convert::serve(&call.kind, &*call.stored()?));
    let new = match verb {
        "get" => return Ok(respond_json(200, JSON, &old)),
        "patch" => call.patch_body()?.apply(&old, false)?,
        _ => call.object()?,
    };
    // Clients in Go leave out what is zero.
    let replicas = match new.pointer("/spec/replicas").unwrap_or(&Value::Null) {
        Value::Null => 0,
        given => {
            given.as_u64().ok_or_else(|| Status::bad_request("a Scale has a number as spec.replicas"))?
        }
    };
    let mut body =
        paths.wanted.rsplit('/').filter(|name| !name.is_empty()).fold(json!(replicas), |value, name| {
            let name = name.replace("~1", "/").replace("~0", "~");
            json!({name: value})
        });
    let version = meta::text(&new, "/metadata/resourceVersion");
    if !version.is_empty() {
        body["metadata"] = json!({"resourceVersion": version});
    }
    let patch = Patch { kind: PatchKind::Merge, body };
    let write = call.write()?;
    let scaled = call.server.shared.change(|cluster| {
        cluster.patch(&call.kind, (call.namespace(), call.name()), Part::Scale, &patch, write)
    })?;
    Ok(respond_json(200, JSON, &scale_of(paths, &convert::serve(&call.kind, &scaled))))
}

fn token(call: &Call<'_>) -> Result<Response<Body>, Status> {
    let cluster = call.server.shared.cluster();
    let answer =
        review::token_request(&cluster, &call.server.tokens, call.namespace(), call.name(), call.object()?)?;
    Ok(respond_json(201, JSON, &answer))
}

fn evict(call: &Call<'_>) -> Result<Response<Body>, Status> {
    let deletion = call.deletion(&call.object()?["deleteOptions"])?;
    call.server
        .shared
        .change(|cluster| cluster.delete(&call.kind, call.namespace(), call.name(), &deletion))?;
    Ok(respond_json(201, JSON, &done()))
}

fn bind(call: &Call<'_>) -> Result<Response<Body>, Status> {
    let node = meta::text(&call.object()?, "/target/name").to_owned();
    if node.is_empty() {
        return Err(Status::bad_request("a Binding names a node as target"));
    }
    let patch = Patch { kind: PatchKind::Merge, body: json!({"spec": {"nodeName": node}}) };
    let write = call.write()?;
    call.server.shared.change(|cluster| {
        cluster.patch(&call.kind, (call.namespace(), call.name()), Part::Whole, &patch, write)
    })?;
    Ok(respond_json(201, JSON, &done()))
}

fn done() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})
}

/// What the container wrote so far. There is no following: the log ends where it is now.
fn log(call: &Call<'_>) -> Result<Response<Body>, Status> {
    call.stored()?;
    let source = call.server.shared.logs();
    let source = source.ok_or_else(|| Status::not_supported("pods/log"))?;
    let container = Some(call.request.query.text("container")).filter(|name| !name.is_empty());
    let text = source(call.namespace(), call.name(), container).ok_or_else(|| {
        Status::bad_request(format!("container of pod {:?} has no log yet: is it running?", call.name()))
    })?;
    let tail = call.request.query.number("tailLines")?;
    Ok(respond(200, "text/plain", last_lines(&text, tail).to_vec().into()))
}

fn last_lines(text: &[u8], lines: Option<u64>) -> &[u8] {
    let Some(lines) = lines.and_then(|lines| usize::try_from(lines).ok()) else { return text };
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    match body.iter().rposition_nth(lines) {
        Some(end) => &text[end + 1..],
        None => text,
    }
}

trait NthNewline {
    fn rposition_nth(self, count: usize) -> Option<usize>;
}

impl<'a, I: DoubleEndedIterator<Item = &'a u8> + ExactSizeIterator> NthNewline for I {
    /// Position of the `count`-th newline from the end, counted from one.
    fn rposition_nth(self, count: usize) -> Option<usize> {
        self.enumerate()
            .rev()
            .filter(|(_, byte)| **byte == b'\n')
            .nth(count.checked_sub(1)?)
            .map(|(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    use super::last_lines;

    #[test]
    fn tails() {
        for (lines, expect) in
            [(None, "a\nb\nc\n"), (Some(1), "c\n"), (Some(2), "b\nc\n"), (Some(9), "a\nb\nc\n")]
        {
            assert_eq!(last_lines(b"a\nb\nc\n", lines), expect.as_bytes());
        }
    }
}
