//! A watch over HTTP: one JSON event per line, as tables if asked for, with bookmarks, until the client's timeout,
//! an error event (410 Gone), or an outage.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::unfold;
use http::Response;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep, sleep_until};

use super::Availability;
use super::convert;
use super::form::{self, Form};
use super::http::Body;
use super::kinds::Kind;
use super::select::Selector;
use super::serve::Call;
use super::status::Status;
use super::watch::{Event, Scope, Watch};

/// How long a watch lasts when the client names no timeout, in seconds.
const LONGEST: u64 = 1800;
/// How long a watch is idle before it gets a bookmark.
const BOOKMARK_EVERY: Duration = Duration::from_secs(15);

struct Stream {
    watch: Watch,
    kind: Arc<Kind>,
    form: Form,
    bookmarks: bool,
    /// A bookmark that tells the end of the initial state is still owed.
    initial_end: bool,
    until: Instant,
    availability: Receiver<Availability>,
    closed: Receiver<u64>,
    ended: bool,
}

enum Step {
    Event(Event),
    Error(Status),
    Idle,
}

/// The response to a watch request.
pub(super) fn watch(
    call: &Call<'_>,
    namespace: Option<String>,
    selector: Selector,
) -> Result<Response<Body>, Status> {
    let shared = &call.server.shared;
    let query = &call.request.query;
    let (initial, bookmarks) = (query.flag("sendInitialEvents"), query.flag("allowWatchBookmarks"));
    let asked = query.number("resourceVersion")?.filter(|version| *version != 0);
    let newest = shared.cluster().store.version();
    // Without a version the present state comes first, unless the client says that it wants none of it.
    let from = match query.text("sendInitialEvents") {
        "" => asked,
        _ if initial => None,
        _ => asked.or(Some(newest)),
    };
    let scope = Scope { kind: call.kind.clone(), namespace, selector, user: Some(call.user.name.clone()) };
    let seconds = query.number("timeoutSeconds")?.filter(|seconds| *seconds > 0).unwrap_or(LONGEST);
    let mut stream = Stream {
        watch: Watch::new(shared.clone(), scope, from),
        kind: call.kind.clone(),
        form: call.form,
        bookmarks,
        initial_end: initial && bookmarks,
        until: Instant::now() + Duration::from_secs(seconds.min(LONGEST)),
        availability: shared.availability.subscribe(),
        closed: shared.closed_watches.subscribe(),
        ended: false,
    };
    stream.closed.borrow_and_update();
    // A version from the future is one of an earlier server; only a new list helps that client.
    let future = from.filter(|version| *version > newest).map(|version| Status::gone(version, newest));
    let lines = unfold((stream, future), |(mut stream, error)| async move {
        let line = match error {
            Some(status) => stream.error(&status),
            None => stream.next().await?,
        };
        Some((Ok::<_, Infallible>(Frame::data(line)), (stream, None)))
    });
    let mut response = Response::new(StreamBody::new(lines).boxed_unsync());
    let json = http::HeaderValue::from_static("application/json");
    response.headers_mut().insert(http::header::CONTENT_TYPE, json);
    Ok(response)
}

impl Stream {
    /// The next line, or none at the end of the watch.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        if self.initial_end && self.watch.initial_left() == 0 {
            self.initial_end = false;
            return Some(self.bookmark(true));
        }
        match self.step().await? {
            Step::Event(event) => {
                Some(self.line(event.kind.name(), convert::serve(&self.kind, &event.object)))
            }
            // Its definition is gone, so nothing more can come.
            Step::Error(status) if status.is_not_found() => None,
            Step::Error(status) => Some(self.error(&status)),
            Step::Idle => Some(self.bookmark(false)),
        }
    }

    /// Waits for what comes first; none ends the watch.
    async fn step(&mut self) -> Option<Step> {
        let bookmarks = self.bookmarks;
        let idle =
            async move { if bookmarks { sleep(BOOKMARK_EVERY).await } else { std::future::pending().await } };
        tokio::select! {
            biased;
            _ = self.availability.wait_for(|now| *now != Availability::Up) => None,
            _ = self.closed.changed() => None,
            () = sleep_until(self.until) => None,
            event = self.watch.next() => Some(event.map_or_else(Step::Error, Step::Event)),
            () = idle => Some(Step::Idle),
        }
    }

    fn error(&mut self, status: &Status) -> Bytes {
        self.ended = true;
        line(&json!({"type": "ERROR", "object": status.to_json()}))
    }

    fn bookmark(&self, initial_end: bool) -> Bytes {
        let mut metadata =
            json!({"resourceVersion": self.watch.version().to_string(), "creationTimestamp": null});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let mut object = json!({
            "kind": self.kind.kind, "apiVersion": self.kind.api_version(), "metadata": metadata,
        });
        if self.form == Form::Metadata {
            object = form::partial(&object);
        }
        line(&json!({"type": "BOOKMARK", "object": object}))
    }

    fn line(&self, kind: &str, object: Value) -> Bytes {
        line(&json!({"type": kind, "object": self.form.one(&self.kind, object)}))
    }
}

fn line(event: &Value) -> Bytes {
    format!("{event}\n").into()
}
