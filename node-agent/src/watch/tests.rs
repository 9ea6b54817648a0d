//! The kube client's watcher against a scripted API server: bad objects, and lists after a disconnect.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use http::{Request, Response};
use http_body_util::Full;
use serde_json::{Value, json};

use super::*;

/// Answers each list of pods, and each watch of them, with the next of its script; everything else is empty.
#[derive(Clone)]
struct Script {
    lists: Arc<Mutex<VecDeque<Value>>>,
    watches: Arc<Mutex<VecDeque<Vec<Value>>>>,
}

impl Script {
    fn client(lists: &[Value], watches: &[Vec<Value>]) -> Client {
        let script = Self {
            lists: Arc::new(Mutex::new(lists.iter().cloned().collect())),
            watches: Arc::new(Mutex::new(watches.iter().cloned().collect())),
        };
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let answer = script.answer(request.uri().path(), request.uri().query().unwrap_or_default());
            async move {
                match answer {
                    Some(text) => {
                        Ok::<_, std::convert::Infallible>(Response::new(Full::new(text.into_bytes().into())))
                    }
                    None => std::future::pending().await,
                }
            }
        });
        Client::new(service, "default")
    }

    fn answer(&self, path: &str, query: &str) -> Option<String> {
        if path.starts_with("/apis/security.istio.io") || path.starts_with("/apis/networking.istio.io") {
            return Some(json!({"groupVersion": "security.istio.io/v1", "resources": []}).to_string());
        }
        if path == "/apis" {
            let apps = json!({"name": "apps", "versions": [{"groupVersion": "apps/v1", "version": "v1"}]});
            return Some(json!({"groups": [apps]}).to_string());
        }
        let pods = path.ends_with("/pods");
        if query.contains("watch=true") {
            let events = self.watches.lock().unwrap().pop_front().filter(|_| pods)?;
            return Some(events.iter().map(|event| format!("{event}\n")).collect());
        }
        let items = match pods {
            true => self.lists.lock().unwrap().pop_front()?,
            false => json!([]),
        };
        Some(json!({"metadata": {"resourceVersion": "1"}, "items": items}).to_string())
    }
}

fn pod(name: &str) -> Value {
    json!({"metadata": {"namespace": "shop", "name": name, "resourceVersion": "2"}})
}

fn unreadable(name: &str) -> Value {
    json!({"metadata": {"namespace": "shop", "name": name, "resourceVersion": "3", "labels": 5}, "spec": "none"})
}

fn short(event: Event) -> String {
    match event {
        Event::Restarted(kind) => format!("restarted {kind:?}"),
        Event::Listed(kind) => format!("listed {kind:?}"),
        Event::Applied(object) => format!("applied {}", object.name()),
        Event::Deleted(_, name) => format!("deleted {name}"),
        Event::Unreadable { name, reason, .. } => {
            assert!(!reason.is_empty());
            format!("unreadable {name}")
        }
        Event::ApiGroups(groups) => format!("groups {groups:?}"),
    }
}

/// The first events of pods.
async fn events(client: &Client, count: usize) -> Vec<String> {
    let stream = watch::<Pod>(client, Kind::Pod, |object| Object::Pod(Box::new(object)));
    tokio::time::timeout(Duration::from_secs(10), stream.take(count).map(short).collect()).await.unwrap()
}

#[tokio::test]
async fn a_bad_object_never_ends_a_stream() {
    let list = json!([pod("a"), unreadable("bad"), pod("b")]);
    let watch = vec![
        json!({"type": "MODIFIED", "object": unreadable("a")}),
        json!({"type": "ADDED", "object": pod("c")}),
        json!({"type": "DELETED", "object": unreadable("b")}),
    ];
    let client = Script::client(&[list], &[watch]);
    let expect = [
        "restarted Pod",
        "applied shop/a",
        "unreadable shop/bad",
        "applied shop/b",
        "listed Pod",
        "unreadable shop/a",
        "applied shop/c",
        "deleted shop/b",
    ];
    assert_eq!(events(&client, expect.len()).await, expect);
}

#[tokio::test]
async fn an_expired_watch_is_a_new_list() {
    let gone = json!({"type": "ERROR", "object": {"kind": "Status", "status": "Failure", "code": 410,
        "reason": "Expired", "message": "too old resource version"}});
    let client = Script::client(&[json!([pod("a"), pod("b")]), json!([pod("b")])], &[vec![gone]]);
    let expect = [
        "restarted Pod",
        "applied shop/a",
        "applied shop/b",
        "listed Pod",
        "restarted Pod",
        "applied shop/b",
        "listed Pod",
    ];
    assert_eq!(events(&client, expect.len()).await, expect);
}

#[tokio::test]
async fn all_kinds_are_watched() {
    let client = Script::client(&[json!([pod("a")])], &[]);
    let mut source = ApiServer::new(&client);
    let mut missing: Vec<Kind> = Kind::ALL.into_iter().chain([Kind::NetworkPolicy]).collect();
    let mut groups = None;
    let all = async {
        while !missing.is_empty() || groups.is_none() {
            match source.next().await {
                Some(Event::Listed(kind)) => missing.retain(|other| *other != kind),
                Some(Event::ApiGroups(served)) => groups = Some(served),
                Some(_) => {}
                None => return,
            }
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(10), all).await.is_ok();
    assert!(in_time, "not listed: {missing:?}, groups: {groups:?}");
    assert_eq!(groups.unwrap(), ["apps"]);
}
