//! An API server that answers from a script and writes down what it is asked, for tests of what is sent to it.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http::{Request, Response};
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::Value;

/// Each request as `METHOD path?query body`.
pub(crate) type Journal = Arc<Mutex<Vec<String>>>;

/// A client of an API server that answers each request, as the journal has it, with a status and an object.
pub(crate) fn client(
    answer: impl Fn(&str) -> (u16, Value) + Send + Sync + 'static,
) -> (kube::Client, Journal) {
    let (seen, answer) = (Journal::default(), Arc::new(answer));
    let log = Arc::clone(&seen);
    let service = tower::service_fn(move |request: Request<Body>| {
        let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let path = head.uri.path_and_query().map_or("", |path| path.as_str().trim_end_matches('?'));
            let request = format!("{} {path} {}", head.method, String::from_utf8_lossy(&body));
            let (status, object) = answer(&request);
            log.lock().unwrap().push(request);
            let body = Body::from(object.to_string().into_bytes());
            Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap())
        }
    });
    (kube::Client::new(service, "default"), seen)
}

/// The object that comes with a status that is no success.
pub(crate) fn failure(code: u16, reason: &str, message: &str) -> (u16, Value) {
    let status = serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message,
    });
    (code, status)
}
