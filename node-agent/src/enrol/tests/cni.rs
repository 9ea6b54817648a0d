//! What the CNI plugin is answered, and what is done before it is.

use serde_json::json;

use super::fakes::*;
use super::world::*;
use crate::cluster::ClusterError;
use crate::cni::server::{AddError, DelRequest, Enroller};
use crate::index::event::Kind;

#[tokio::test]
async fn cni_add_does_not_need_the_watch() {
    let world = World::new("cni", &[]);
    world.ztunnel(&[]).await;
    // The watch is behind: it has neither the pod nor its namespace, nor is it synced.
    world.answers(at_the_server("a", "ambient"));
    assert_eq!(world.desk.add(request("a", Some("uid-a"))).await, Ok(()));
    world.journal(&[vec!["get shop/a".to_owned()], enrolled("uid-a", "10.0.0.7")].concat()).await;
    assert_eq!(world.desk.check(request("a", Some("uid-a"))).await, Ok(()));
    world.journal(&["get shop/a"]).await;
    world.is_synced().await;
    world.journal(&["annotate shop/a uid-a true"]).await;

    let del = |container: &str| DelRequest {
        namespace: "shop".into(),
        name: "a".into(),
        uid: Some("uid-a".into()),
        attachment: attachment(container),
    };
    world.desk.del(del("an-earlier-container")).await;
    world.desk.del(del("container-1")).await;
    world.journal(&["ztunnel removes uid-a", "leave uid-a"]).await;
    world.desk.del(del("container-1")).await;
}

#[tokio::test]
async fn cni_add_does_not_trust_a_namespace_that_may_be_stale() {
    let world = World::new("namespace", &[]);
    world.ztunnel(&[]).await;
    // The watch of namespaces alone is behind: it has yet to see the label.
    world.sees(Kind::Namespace, json!({"metadata": {"name": "shop"}})).await;
    world.sees(Kind::Pod, pod("a", false)).await;
    let mut opted_out = pod("b", false);
    opted_out["metadata"]["labels"] = json!({"istio.io/dataplane-mode": "none"});
    world.sees(Kind::Pod, opted_out).await;
    world.is_synced().await;
    let mut model = world.desk.model.clone();
    while !model.is_synced() {
        model.changed().await.unwrap();
    }
    world.answers(at_the_server("a", "ambient"));
    assert_eq!(world.desk.add(request("b", Some("uid-b"))).await, Ok(()));
    world.journal::<&str>(&[]).await;
    assert_eq!(world.desk.add(request("a", Some("uid-a"))).await, Ok(()));
    world.journal(&[vec!["get namespace shop".to_owned()], enrolled("uid-a", "10.0.0.7")].concat()).await;
    world.sees(Kind::Namespace, namespace("ambient")).await;
    world.journal(&["annotate shop/a uid-a true"]).await;
}

#[tokio::test]
async fn cni_add_answers_what_it_cannot_do() {
    let world = World::new("refusals", &[]);
    let unreachable = ClusterError::Unreachable { act: "get the pod", reason: "connection refused".into() };
    for (answer, uid, expect) in [
        (Err(unreachable), "uid-a", "connection refused"),
        (Ok(None), "uid-a", "does not have pod shop/a"),
        (at_the_server("a", "ambient"), "uid-of-another", "UID uid-of-another"),
    ] {
        world.answers(answer);
        let error = world.desk.add(request("a", Some(uid))).await.unwrap_err();
        assert!(matches!(&error, AddError::Unavailable(text) if text.contains(expect)), "{error:?}");
    }
    // Nobody asked for the mesh: neither ztunnel nor kernel are needed.
    world.answers(at_the_server("a", "none"));
    assert_eq!(world.desk.add(request("a", Some("uid-a"))).await, Ok(()));
    world.journal.send_replace(Vec::new());

    world.ztunnel(&[]).await;
    world.answers(at_the_server("a", "ambient"));
    world.faults.set("prepare", Fault::Error);
    let error = world.desk.add(request("a", Some("uid-a"))).await.unwrap_err();
    assert!(matches!(&error, AddError::Unavailable(text) if text.contains(WISH)), "{error:?}");
}

#[tokio::test]
async fn del_of_an_old_sandbox_after_a_restart_leaves_the_pod_captured() {
    let world = World::new("old-sandbox", &["uid-a"]);
    world.ztunnel(&["uid-a"]).await;
    world.lists([pod("a", true)]).await;
    world.until(|entries| entries.iter().any(|entry| entry == "capture uid-a"), "the pod taken over").await;
    let del = || DelRequest {
        namespace: "shop".into(),
        name: "a".into(),
        uid: Some("uid-a".into()),
        attachment: attachment("unknown"),
    };
    world.desk.del(del()).await;
    let left = || world.story("uid-a").iter().any(|entry| entry == "leave uid-a");
    assert!(!left(), "the pod runs on, in another sandbox");
    world.running.lock().unwrap().remove("uid-a");
    world.desk.del(del()).await;
    assert!(left());
}
