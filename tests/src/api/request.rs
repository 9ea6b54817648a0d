//! What a request asks for: its path and query taken apart, by the conventions of the Kubernetes API. Pure.
//! Reference: `k8s.io/apiserver/pkg/endpoints/request/requestinfo.go`.

use std::collections::HashMap;

use http::Method;

use super::rbac::Attributes;
use super::status::Status;

/// A request line, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) attributes: Attributes,
    /// Version within the group; empty for paths that name no resource.
    pub(super) version: String,
    pub(super) query: Query,
}

/// Query parameters, the first of each name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Query(HashMap<String, String>);

impl Query {
    pub(super) fn parse(query: &str) -> Self {
        let mut parameters = HashMap::new();
        for (key, value) in query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, ""))) {
            parameters.entry(decode(key)).or_insert_with(|| decode(value));
        }
        Self(parameters)
    }

    /// The parameter, or "".
    pub(super) fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    pub(super) fn flag(&self, name: &str) -> bool {
        ["true", "1"].contains(&self.text(name))
    }

    /// A number; none when absent or empty.
    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, Status> {
        match self.text(name) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                Status::bad_request(format!("{name}: Invalid value: {text:?}: must be a number"))
            }),
        }
    }
}

impl Request {
    pub(super) fn parse(method: &Method, path: &str, query: &str) -> Self {
        let query = Query::parse(query);
        let segments: Vec<String> =
            path.split('/').filter(|segment| !segment.is_empty()).map(decode).collect();
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let (group, version, rest) = match segments[..] {
            ["api", version, ref rest @ ..] if !rest.is_empty() => ("", version, rest),
            ["apis", group, version, ref rest @ ..] if !rest.is_empty() => (group, version, rest),
            _ => {
                let verb = method.as_str().to_lowercase();
                let attributes = Attributes { verb, path: Some(path.to_owned()), ..Attributes::default() };
                return Self { attributes, version: String::new(), query };
            }
        };
        // `namespaces/x/status` is about the namespace itself, `namespaces/x/pods` about what is in it.
        let (namespace, rest) = match *rest {
            ["namespaces", _, "status" | "finalize"] => ("", rest),
            ["namespaces", namespace, ref inner @ ..] if !inner.is_empty() => (namespace, inner),
            _ => ("", rest),
        };
        let name = rest.get(1).copied().unwrap_or_default();
        let watch = query.flag("watch");
        let verb = match (method.as_str(), name) {
            ("GET" | "HEAD", "") if watch => "watch",
            ("GET" | "HEAD", "") => "list",
            ("GET" | "HEAD", _) => "get",
            ("POST", _) => "create",
            ("PUT", _) => "update",
            ("PATCH", _) => "patch",
            ("DELETE", "") => "deletecollection",
            ("DELETE", _) => "delete",
            _ => "",
        };
        // Who may see one object only may list and watch it by its name.
        let selected = match verb {
            "list" | "watch" => named(query.text("fieldSelector")),
            _ => None,
        };
        let attributes = Attributes {
            verb: verb.to_owned(),
            group: group.to_owned(),
            resource: rest[0].to_owned(),
            subresource: rest.get(2..).map(|parts| parts.join("/")).unwrap_or_default(),
            // A namespace is authorized within itself.
            namespace: if rest[0] == "namespaces" { name } else { namespace }.to_owned(),
            name: selected.unwrap_or(name).to_owned(),
            path: None,
        };
        Self { attributes, version: version.to_owned(), query }
    }
}

/// The one name that a field selector asks for.
fn named(selector: &str) -> Option<&str> {
    let name = selector.split(',').find_map(|part| part.trim().strip_prefix("metadata.name="))?;
    Some(name.strip_prefix('=').unwrap_or(name)).filter(|name| !name.is_empty())
}

/// Decodes `%xx` and `+`; what is malformed stays as it is.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while let Some(byte) = bytes.get(index) {
        let hex = bytes.get(index + 1..index + 3).and_then(|pair| std::str::from_utf8(pair).ok());
        match (byte, hex.and_then(|pair| u8::from_str_radix(pair, 16).ok())) {
            (b'%', Some(value)) => {
                decoded.push(value);
                index += 2;
            }
            (b'+', _) => decoded.push(b' '),
            (byte, _) => decoded.push(*byte),
        }
        index += 1;
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::{Query, Request};

    /// verb, group, version, resource, subresource, namespace, name.
    fn check(method: Method, path: &str, query: &str, expect: [&str; 7]) {
        let request = Request::parse(&method, path, query);
        let is = &request.attributes;
        let got =
            [&is.verb, &is.group, &request.version, &is.resource, &is.subresource, &is.namespace, &is.name];
        assert_eq!(got.map(String::as_str), expect, "{method} {path}?{query}");
    }

    #[test]
    fn resource_paths() {
        let apps = "/apis/apps/v1";
        check(Method::GET, "/api/v1/pods", "", ["list", "", "v1", "pods", "", "", ""]);
        check(Method::GET, "/api/v1/pods", "watch=true", ["watch", "", "v1", "pods", "", "", ""]);
        check(Method::GET, "/api/v1/namespaces/n/pods/a", "", ["get", "", "v1", "pods", "", "n", "a"]);
        for (selector, name) in [
            ("metadata.name%3Da", "a"),
            ("spec.nodeName%3Dn,metadata.name%3D%3Da", "a"),
            ("metadata.name!%3Da", ""),
            ("metadata.namespace%3Da", ""),
        ] {
            let query = format!("watch=1&fieldSelector={selector}");
            check(
                Method::GET,
                "/api/v1/namespaces/n/pods",
                &query,
                ["watch", "", "v1", "pods", "", "n", name],
            );
            let query = format!("fieldSelector={selector}");
            check(Method::DELETE, "/api/v1/pods", &query, ["deletecollection", "", "v1", "pods", "", "", ""]);
        }
        check(
            Method::PATCH,
            "/api/v1/namespaces/n/pods/a/status",
            "",
            ["patch", "", "v1", "pods", "status", "n", "a"],
        );
        check(Method::POST, "/api/v1/namespaces", "", ["create", "", "v1", "namespaces", "", "", ""]);
        check(Method::DELETE, "/api/v1/namespaces/n", "", ["delete", "", "v1", "namespaces", "", "n", "n"]);
        check(
            Method::PUT,
            "/api/v1/namespaces/n/status",
            "",
            ["update", "", "v1", "namespaces", "status", "n", "n"],
        );
        check(
            Method::DELETE,
            "/api/v1/namespaces/n/pods",
            "",
            ["deletecollection", "", "v1", "pods", "", "n", ""],
        );
        check(
            Method::GET,
            &format!("{apps}/namespaces/n/deployments/d/scale"),
            "",
            ["get", "apps", "v1", "deployments", "scale", "n", "d"],
        );
        check(Method::GET, "/api/v1/nodes/a%2Eb", "", ["get", "", "v1", "nodes", "", "", "a.b"]);
    }

    #[test]
    fn other_paths() {
        for path in
            ["/version", "/api", "/api/v1", "/apis/apps", "/apis/apps/v1", "/", "/openapi/v3/apis/apps/v1"]
        {
            let attributes = Request::parse(&Method::GET, path, "").attributes;
            assert_eq!((attributes.verb.as_str(), attributes.path.as_deref()), ("get", Some(path)));
        }
    }

    #[test]
    fn queries() {
        let query = Query::parse("labelSelector=app%3Da%2Cb+in+%28x%29&limit=5&watch=1&bad=%zz");
        assert_eq!(query.text("labelSelector"), "app=a,b in (x)");
        assert_eq!(query.number("limit").unwrap(), Some(5));
        assert_eq!(query.number("continue").unwrap(), None);
        assert!(query.flag("watch") && query.number("bad").is_err());
        assert_eq!(query.text("bad"), "%zz");
    }
}
