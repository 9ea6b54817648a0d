//! kube-rs against the server: typed access, watchers through delays, outages and 410 Gone, token review.

use std::pin::{Pin, pin};
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec, TokenReview, TokenReviewSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::runtime::watcher::{self, Event};
use mesh_tests::api::{Availability, Credential, PatchKind, Selector};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use crate::cluster::Cluster;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

fn config_map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"v": value}})
}

type Events = Pin<Box<dyn Stream<Item = Result<Event<ConfigMap>, watcher::Error>>>>;

async fn watch(cluster: &Cluster, config: watcher::Config) -> Events {
    let client = cluster.client(&Credential::Admin).await;
    watcher::watcher(Api::<ConfigMap>::namespaced(client, "default"), config.labels("!skip")).boxed_local()
}

async fn next(events: &mut Events) -> Result<Event<ConfigMap>, watcher::Error> {
    timeout(PATIENCE, events.next()).await.expect("an event in time").expect("a watcher never ends")
}

/// Reads on until `wanted` has this value.
async fn until(events: &mut Events, wanted: &str, value: &str) {
    loop {
        // A watcher recovers from errors by itself.
        let Ok(Event::Apply(map) | Event::InitApply(map)) = next(events).await else { continue };
        let data = map.data.unwrap_or_default();
        if map.metadata.name.as_deref() == Some(wanted) && data.get("v").map(String::as_str) == Some(value) {
            return;
        }
    }
}

#[tokio::test]
async fn lists_and_streams_see_the_same_events() {
    for config in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
        let cluster = Cluster::start();
        let client = cluster.server.client();
        client.create(config_map("a", "1")).unwrap();
        let mut events = watch(&cluster, config).await;
        assert!(matches!(next(&mut events).await.unwrap(), Event::Init));
        until(&mut events, "a", "1").await;
        while !matches!(next(&mut events).await.unwrap(), Event::InitDone) {}
        client.update(config_map("a", "2")).unwrap();
        until(&mut events, "a", "2").await;
        let hide = json!({"metadata": {"labels": {"skip": ""}}});
        client.patch("configmaps", "default", "a", PatchKind::Merge, hide).unwrap();
        assert!(matches!(next(&mut events).await.unwrap(), Event::Delete(_)));
    }
}

#[tokio::test]
async fn a_delay_holds_back_only_the_user_it_names() {
    let cluster = Cluster::start();
    let client = cluster.server.client();
    let mut events = watch(&cluster, watcher::Config::default()).await;
    while !matches!(next(&mut events).await.unwrap(), Event::InitDone) {}
    let delay = Duration::from_millis(700);
    cluster.server.set_watch_delay(Some("configmaps"), Some("kubernetes-admin"), delay);
    let start = Instant::now();
    client.create(config_map("a", "1")).unwrap();
    until(&mut events, "a", "1").await;
    assert!(start.elapsed() >= delay, "{:?}", start.elapsed());
    cluster.server.set_watch_delay(Some("configmaps"), Some("kubernetes-admin"), PATIENCE * 10);
    client.create(config_map("b", "1")).unwrap();
    assert!(timeout(delay, events.next()).await.is_err(), "an event came through a long delay");
    cluster.server.set_watch_delay(Some("configmaps"), Some("kubernetes-admin"), Duration::ZERO);
    until(&mut events, "b", "1").await;
    cluster.server.set_watch_delay(None, Some("someone-else"), PATIENCE * 10);
    client.create(config_map("c", "1")).unwrap();
    until(&mut events, "c", "1").await;
}

#[tokio::test]
async fn a_watcher_recovers_from_gone() {
    let cluster = Cluster::start();
    let client = cluster.server.client();
    let mut events = watch(&cluster, watcher::Config::default()).await;
    while !matches!(next(&mut events).await.unwrap(), Event::InitDone) {}
    // While the watcher cannot resume, its version is forgotten.
    cluster.server.set_available(false);
    client.create(config_map("a", "1")).unwrap();
    cluster.server.compact();
    cluster.server.set_available(true);
    loop {
        match next(&mut events).await {
            Ok(Event::Init) => break,
            Ok(Event::Apply(map)) => panic!("an event that history forgot: {map:?}"),
            Ok(_) | Err(_) => {}
        }
    }
    until(&mut events, "a", "1").await;
}

#[tokio::test]
async fn watches_from_a_forgotten_version_get_410() {
    let cluster = Cluster::start();
    let start = cluster.server.client().version();
    cluster.server.compact();
    let client = cluster.client(&Credential::Admin).await;
    let maps = Api::<ConfigMap>::namespaced(client, "default");
    let mut events = pin!(maps.watch(&WatchParams::default(), &start.to_string()).await.unwrap());
    let event = timeout(PATIENCE, events.try_next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(event, WatchEvent::Error(status) if status.code == 410));
}

#[tokio::test]
async fn a_watch_tells_of_what_it_saw_last() {
    let cluster = Cluster::start();
    let client = cluster.server.client();
    let maps = Api::<ConfigMap>::namespaced(cluster.client(&Credential::Admin).await, "default");
    let mut map = config_map("a", "1");
    map["metadata"]["labels"] = json!({"step": "1"});
    let version = client.create(map).unwrap()["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let selected = WatchParams::default().labels("step=1");
    let mut events = pin!(maps.watch(&selected, &version).await.unwrap());
    let change = json!({"metadata": {"labels": {"step": "2"}}, "data": {"v": "2"}});
    let changed = client.patch("configmaps", "default", "a", PatchKind::Merge, change).unwrap();
    let event = timeout(PATIENCE, events.try_next()).await.unwrap().unwrap().unwrap();
    let WatchEvent::Deleted(last) = event else { panic!("{event:?}") };
    assert_eq!(
        (&last.data.unwrap()["v"], &last.metadata.labels.unwrap()["step"]),
        (&"1".into(), &"1".into())
    );
    assert_eq!(json!(last.metadata.resource_version), changed["metadata"]["resourceVersion"]);
}

#[tokio::test]
async fn a_list_does_not_go_on_after_its_history_is_forgotten() {
    let cluster = Cluster::start();
    let client = cluster.server.client();
    for name in ["a", "b"] {
        client.create(config_map(name, "1")).unwrap();
    }
    let maps = Api::<ConfigMap>::namespaced(cluster.client(&Credential::Admin).await, "default");
    let page = maps.list(&ListParams::default().limit(1)).await.unwrap();
    assert_eq!(page.metadata.remaining_item_count, Some(2));
    let of_selected = maps.list(&ListParams::default().labels("!x").limit(1)).await.unwrap();
    assert_eq!(of_selected.metadata.remaining_item_count, None);
    cluster.server.compact();
    let rest = ListParams::default().limit(1).continue_token(&page.metadata.continue_.unwrap());
    let refused = maps.list(&rest).await.unwrap_err();
    assert!(matches!(refused, kube::Error::Api(status) if status.code == 410 && status.reason == "Expired"));
}

/// The events that a watch tells of in its first second.
fn told(cluster: &Cluster, parameters: &str) -> Vec<String> {
    let path = "/api/v1/namespaces/default/configmaps?watch=1&timeoutSeconds=1";
    let lines = cluster.kubectl(&format!("get --raw {path}&{parameters}"));
    lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["type"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn the_present_state_comes_to_who_wants_it() {
    let cluster = Cluster::start();
    let stream = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
    assert_eq!(told(&cluster, "allowWatchBookmarks=true"), ["ADDED"]);
    assert_eq!(told(&cluster, &format!("{stream}&allowWatchBookmarks=true")), ["ADDED", "BOOKMARK"]);
    assert_eq!(told(&cluster, stream), ["ADDED"]);
    assert_eq!(told(&cluster, "sendInitialEvents=false&resourceVersionMatch=NotOlderThan"), [""; 0]);
}

#[tokio::test]
async fn metadata_alone_is_less() {
    let cluster = Cluster::start();
    cluster.server.client().create(config_map("a", "1")).unwrap();
    let client = cluster.client(&Credential::Admin).await;
    let request = |path: &str, form: &str| {
        let accept = format!("application/json;as={form};g=meta.k8s.io;v=v1");
        http::Request::get(path).header("accept", accept).body(Vec::new()).unwrap()
    };
    let path = "/api/v1/namespaces/default/configmaps";
    let list: Value = client.request(request(path, "PartialObjectMetadataList")).await.unwrap();
    assert_eq!(list["kind"], "PartialObjectMetadataList");
    let one: Value = client.request(request(&format!("{path}/a"), "PartialObjectMetadata")).await.unwrap();
    assert_eq!((&one["kind"], one.get("data")), (&json!("PartialObjectMetadata"), None));
    assert_eq!(one["metadata"]["name"], "a");
    assert!(list["items"].as_array().unwrap().contains(&one));
}

#[tokio::test]
async fn parameters_that_make_no_sense_are_refused() {
    let cluster = Cluster::start();
    let client = cluster.client(&Credential::Admin).await;
    let path = "/api/v1/namespaces/default/configmaps";
    for (query, field) in [
        ("dryRun=true", "dryRun: Unsupported value: \"true\": supported values: \"All\""),
        ("fieldValidation=strict", "fieldValidation: Unsupported value"),
    ] {
        let body = config_map("a", "1").to_string().into_bytes();
        let request =
            http::Request::post(format!("{path}?{query}")).header("content-type", "application/json");
        let refused = client.request::<Value>(request.body(body).unwrap()).await.unwrap_err();
        let kube::Error::Api(status) = refused else { panic!("{refused}") };
        assert!(status.code == 422 && status.message.contains(field), "{query}: {}", status.message);
    }
    let merge = http::Request::patch(format!("{path}/kube-root-ca.crt?force=true"))
        .header("content-type", "application/merge-patch+json");
    let refused = client.request::<Value>(merge.body(b"{}".to_vec()).unwrap()).await.unwrap_err();
    assert!(refused.to_string().contains("may not be specified for non-apply patch"), "{refused}");
}

#[tokio::test]
async fn outages() {
    let cluster = Cluster::start();
    let client = cluster.client(&Credential::Admin).await;
    let maps = Api::<ConfigMap>::namespaced(client, "default");
    // Not 503: that kube-rs tries again for minutes before it tells.
    cluster.server.set_availability(Availability::Fail(500));
    let refused = maps.list(&ListParams::default()).await.unwrap_err();
    assert!(matches!(refused, kube::Error::Api(status) if status.code == 500));
    cluster.server.set_available(false);
    assert!(!matches!(maps.list(&ListParams::default()).await.unwrap_err(), kube::Error::Api(_)));
    cluster.server.set_available(true);
    assert!(maps.list(&ListParams::default()).await.is_ok());
}

#[tokio::test]
async fn writes_on_an_old_version_conflict() {
    let cluster = Cluster::start();
    let maps = Api::<ConfigMap>::namespaced(cluster.client(&Credential::Admin).await, "default");
    let first = serde_json::from_value(config_map("a", "1")).unwrap();
    let old = maps.create(&PostParams::default(), &first).await.unwrap();
    let apply = Patch::Apply(config_map("a", "2"));
    maps.patch("a", &PatchParams::apply("test").force(), &apply).await.unwrap();
    let refused = maps.replace("a", &PostParams::default(), &old).await.unwrap_err();
    assert!(matches!(refused, kube::Error::Api(status) if status.code == 409 && status.reason == "Conflict"));
    let made =
        maps.patch("b", &PatchParams::apply("test"), &Patch::Apply(config_map("b", "1"))).await.unwrap();
    assert_eq!(made.data.unwrap()["v"], "1");
    let page = maps.list(&ListParams::default().limit(1)).await.unwrap();
    let rest = ListParams::default().continue_token(&page.metadata.continue_.unwrap());
    let rest = maps.list(&rest).await.unwrap();
    assert_eq!((page.items.len(), rest.items.len()), (1, 2));
}

#[tokio::test]
async fn a_pods_token_tells_its_pod() {
    let cluster = Cluster::start();
    let spec = json!({"nodeName": "node1", "containers": [{"name": "c", "image": "i"}]});
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec});
    let pod = cluster.server.client().create(pod).unwrap();
    let client = cluster.client(&Credential::Node("node1".into())).await;
    let accounts = Api::<k8s_openapi::api::core::v1::ServiceAccount>::namespaced(client.clone(), "default");
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let bound = json!({"apiVersion": "v1", "kind": "Pod", "name": "a", "uid": uid});
    let spec = TokenRequestSpec {
        audiences: vec!["istio-ca".into()],
        bound_object_ref: Some(serde_json::from_value(bound).unwrap()),
        expiration_seconds: Some(3600),
    };
    let request = TokenRequest { spec, ..TokenRequest::default() };
    let answer = accounts.create_token_request("default", &PostParams::default(), &request).await.unwrap();
    let token = answer.status.unwrap().token;

    let reviews = Api::<TokenReview>::all(client);
    let review = async |audience: &str| {
        let spec = TokenReviewSpec { audiences: Some(vec![audience.into()]), token: Some(token.clone()) };
        let review = TokenReview { spec, ..TokenReview::default() };
        reviews.create(&PostParams::default(), &review).await.unwrap().status.unwrap()
    };
    let good = review("istio-ca").await;
    let user = good.user.unwrap();
    assert_eq!(
        (good.authenticated, user.username.as_deref()),
        (Some(true), Some("system:serviceaccount:default:default"))
    );
    assert_eq!(user.extra.unwrap()["authentication.kubernetes.io/pod-uid"], [uid]);
    assert_eq!(good.audiences.unwrap(), ["istio-ca"]);
    let wrong = review("vault").await;
    assert_eq!(wrong.authenticated, Some(false));
    assert!(wrong.error.unwrap().contains("audience"));
}

#[tokio::test]
async fn in_process_watches_see_what_is_selected() {
    let cluster = Cluster::start();
    let client = cluster.server.client();
    let list = client.list("pods", None, &Selector::everything()).unwrap();
    let on_node = Selector::fields("spec.nodeName=node1").unwrap();
    let mut watch = client.watch("pods", None, on_node, Some(list.version)).unwrap();
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "a", "namespace": "default"}, "spec": {"containers": [{"name": "c", "image": "i"}]},
    }))
    .unwrap();
    client.create(serde_json::to_value(&pod).unwrap()).unwrap();
    client.patch("pods", "default", "a", PatchKind::Merge, json!({"spec": {"nodeName": "node1"}})).unwrap();
    let event = timeout(PATIENCE, watch.next()).await.unwrap().unwrap();
    assert_eq!((event.kind.name(), &event.object["metadata"]["name"]), ("ADDED", &json!("a")));
    client.delete("pods", "default", "a", None).unwrap();
    assert_eq!(timeout(PATIENCE, watch.next()).await.unwrap().unwrap().kind.name(), "MODIFIED");
    client.delete("pods", "default", "a", Some(Duration::ZERO)).unwrap();
    assert_eq!(timeout(PATIENCE, watch.next()).await.unwrap().unwrap().kind.name(), "DELETED");
}
