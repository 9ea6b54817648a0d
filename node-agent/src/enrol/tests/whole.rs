//! The task as a whole: running pods that join, leave, end, and outlive an agent.

use serde_json::json;

use super::world::*;
use crate::datapath::Foreign;
use crate::index::event::{Event, Kind, ObjectName};

#[tokio::test]
async fn a_running_pod_joins_and_leaves_in_order() {
    let world = World::new("running", &[]);
    world.ztunnel(&[]).await;
    world.lists([pod("a", false)]).await;
    world.journal(&joined("a")).await;
    world.sees(Kind::Pod, pod("a", true)).await;
    world.sees(Kind::Namespace, namespace("none")).await;
    world.journal(&["annotate shop/a uid-a false"]).await;
    world.sees(Kind::Pod, pod("a", false)).await;
    world.journal(&["ztunnel removes uid-a", "leave uid-a"]).await;
}

#[tokio::test]
async fn programs_of_others_are_looked_for_once_a_pod_is_enrolled() {
    let world = World::new("foreign", &[]);
    world.ztunnel(&[]).await;
    let foreign = Foreign { hook: "connect4", id: 7, name: "lb".to_owned(), harmless: false };
    world.foreign.lock().unwrap().insert("uid-a".to_owned(), vec![foreign]);
    world.lists([pod("a", true), pod("b", true)]).await;
    let reported = r#"report shop/a Some("ForeignPrograms")"#;
    world.until(|entries| entries.iter().any(|entry| entry == reported), reported).await;
    assert!(world.story("shop/b").is_empty());
}

#[tokio::test]
async fn a_pod_deleted_by_force_is_released_with_its_last_process() {
    let world = World::new("force", &[]);
    world.ztunnel(&[]).await;
    world.lists([pod("a", true)]).await;
    world.journal(&enrolled("uid-a", "10.0.0.9")).await;
    let name = ObjectName::new("shop", "a");
    world.events.send(Event::Deleted(Kind::Pod, name)).await.unwrap();
    // A pod that comes later is enrolled later: by then the other would have been released.
    world.running.lock().unwrap().insert("uid-b".to_owned());
    world.sees(Kind::Pod, pod("b", true)).await;
    world.journal(&enrolled("uid-b", "10.0.0.9")).await;
    world.running.lock().unwrap().remove("uid-a");
    world.journal(&["ztunnel removes uid-a", "leave uid-a"]).await;
}

#[tokio::test]
async fn a_restarted_agent_takes_over_and_sweeps() {
    let world = World::new("restart", &["uid-a", "uid-dead"]);
    world.lists([pod("a", true)]).await;
    world.ztunnel(&["uid-a", "uid-dead"]).await;
    let expect = ["ztunnel keeps uid-a", "prepare uid-a [10.0.0.9] kept listeners", "capture uid-a"];
    let done = |entries: &Vec<String>| {
        story(entries, "uid-a").len() >= expect.len() && entries.iter().any(|entry| entry == "leave uid-dead")
    };
    world.until(done, "both pods brought in order").await;
    let mut found = world.story("uid-a");
    found.sort_by_key(|entry| !entry.starts_with("ztunnel"));
    assert_eq!(found, expect);
    // ztunnel may have been told of it meanwhile, or not.
    let dead = world.story("uid-dead").join(", ");
    let both = ["leave uid-dead", "ztunnel keeps uid-dead, ztunnel removes uid-dead, leave uid-dead"];
    assert!(both.contains(&dead.as_str()), "{dead}");
}

#[tokio::test]
async fn one_pod_that_cannot_be_enrolled_does_not_stop_others() {
    let world = World::new("others", &[]);
    world.ztunnel(&[]).await;
    let mut host = pod("host", false);
    host["spec"]["hostNetwork"] = json!(true);
    world.lists([host, pod("late", false)]).await;
    world.journal(&[r#"report shop/host Some("HostNetwork")"#]).await;
    world.sees(Kind::Pod, pod("a", false)).await;
    world.journal(&joined("a")).await;
}
