//! Pods that come and go, agents that restart, and the end of ztunnel itself.

use std::time::Duration;

use mesh_core::proto::pods::from_agent::Message;
use mesh_core::proto::pods::{self as wire, Fd, Goodbye, Welcome};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::agent::Talk;
use crate::world::{CLIENT, SERVER, World, eventually, line};

async fn echoes(stream: &mut TcpStream) -> bool {
    let mut echo = [0; 1];
    stream.write_all(b"x").await.is_ok() && stream.read_exact(&mut echo).await.is_ok()
}

#[tokio::test]
async fn a_removed_pod_is_cut_and_its_sockets_are_closed() {
    let mut world = World::new().await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    let mut talk = world.talk.take().unwrap();
    assert_eq!(talk.remove(&SERVER.uid()).await, "");
    assert!(!echoes(&mut stream).await, "the connection is cut");
    // Our copies were the last.
    world.kept.retain(|(uid, _)| *uid != SERVER.uid());
    let refused = world.dial(CLIENT, world.tunnel_address(SERVER)).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "a listener is still open");
    assert_eq!(talk.remove("uid-unknown").await, "", "removing what is not there is done");
    assert_eq!(world.metric("workload_manager_active_proxy_count", &[]).await, 1);
    assert_eq!(world.dump().await["pods"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn nothing_is_accepted_before_the_mesh_is_known() {
    let mut world = World::without_mesh().await;
    let _application = world.application(SERVER).await;
    let (mut talk, _) = Talk::accept(&world.agent).await;
    talk.welcome().await;
    for pod in [CLIENT, SERVER] {
        let fds = world.listeners(pod).await;
        assert_eq!(talk.add(world.describe(pod), fds).await, "", "pods are taken over all the same");
    }
    talk.snapshot_end().await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(300), stream.read_u8()).await;
    assert!(early.is_err(), "it waits in the accept queue, neither refused nor served");
    assert_eq!(world.metric("istio_tcp_connections_opened_total", &[]).await, 0, "nothing left in the clear");
    assert_eq!(world.metric("istio_tcp_connections_failed_total", &[]).await, 0);
    world.serve_mesh();
    assert_eq!(line(&mut stream).await, world.pod_ip(CLIENT).to_string());
    assert!(echoes(&mut stream).await);
    let encrypted = ["reporter=\"source\"", "connection_security_policy=\"mutual_tls\""];
    assert_eq!(world.metric("istio_tcp_connections_opened_total", &encrypted).await, 1);
}

#[tokio::test]
async fn a_restarted_agent_gets_the_sockets_back() {
    let mut world = World::new().await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    drop(world.talk.take());
    world.kept.clear();
    let (mut talk, _) = Talk::accept(&world.agent).await;
    let held = talk.welcome().await;
    assert_eq!(held.len(), 2);
    let kinds = [Fd::Netns, Fd::OutboundV4, Fd::InboundV4, Fd::HboneV4];
    assert!(held.values().all(|fds| kinds.iter().all(|kind| fds.contains_key(kind))));
    for pod in [CLIENT, SERVER] {
        assert_eq!(talk.keep(world.describe(pod)).await, "");
    }
    talk.snapshot_end().await;
    assert!(echoes(&mut stream).await, "an old connection lives on");
    let mut new = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut new).await;
    assert!(echoes(&mut new).await, "a new one works");
}

#[tokio::test]
async fn a_snapshot_without_a_pod_removes_it() {
    let mut world = World::new().await;
    drop(world.talk.take());
    world.kept.clear();
    let (mut talk, _) = Talk::accept(&world.agent).await;
    drop(talk.welcome().await);
    assert_eq!(talk.keep(world.describe(CLIENT)).await, "");
    talk.snapshot_end().await;
    world.dial(CLIENT, world.tunnel_address(SERVER)).await.unwrap_err();
    world.dial(CLIENT, world.tunnel_address(CLIENT)).await.unwrap();
}

#[tokio::test]
async fn the_same_sockets_again_disturb_nothing() {
    let mut world = World::new().await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    drop(world.talk.take());
    let (mut talk, _) = Talk::accept(&world.agent).await;
    drop(talk.welcome().await);
    for pod in [CLIENT, SERVER] {
        let (_, fds) = world.kept.iter().find(|(uid, _)| *uid == pod.uid()).unwrap();
        let fds = fds.iter().map(|(kind, fd)| (*kind, fd.try_clone().unwrap())).collect();
        assert_eq!(talk.add(world.describe(pod), fds).await, "");
    }
    talk.snapshot_end().await;
    assert!(echoes(&mut stream).await);
}

#[tokio::test]
async fn new_listeners_in_the_same_namespace_cut_nothing() {
    let mut world = World::new().await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    drop(world.talk.take());
    let (mut talk, _) = Talk::accept(&world.agent).await;
    drop(talk.welcome().await);
    for pod in [CLIENT, SERVER] {
        let new = TcpListener::bind((world.pod_ip(pod), 8998)).await.unwrap();
        let (_, kept) = world.kept.iter_mut().find(|(uid, _)| *uid == pod.uid()).unwrap();
        let mut fds = std::mem::take(kept);
        fds.retain(|(kind, _)| *kind != Fd::InboundV4);
        fds.push((Fd::InboundV4, new.into_std().unwrap().into()));
        assert_eq!(talk.add(world.describe(pod), fds).await, "");
    }
    talk.snapshot_end().await;
    assert!(echoes(&mut stream).await, "an old connection lives on");
    let mut new = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut new).await;
    assert!(echoes(&mut new).await, "the listeners that stayed the same are served");
    eventually("the old listener is closed", async || {
        let old = world.dial(CLIENT, (world.pod_ip(SERVER), 8999).into()).await;
        old.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    })
    .await;
    assert_eq!(talk.remove(&SERVER.uid()).await, "");
    assert!(!echoes(&mut stream).await && !echoes(&mut new).await, "a removed pod's connections are all cut");
}

#[tokio::test]
async fn an_agent_of_another_version() {
    let mut world = World::new().await;
    let _application = world.application(SERVER).await;
    drop(world.talk.take());
    let (talk, _) = Talk::accept(&world.agent).await;
    talk.send(Message::Goodbye(Goodbye { reason: "this agent speaks 2 to 3".into() }), &[]).await;
    // It comes back, and is told the other way.
    let (talk, _) = Talk::accept(&world.agent).await;
    talk.send(Message::Welcome(Welcome { version: 7, ..Default::default() }), &[]).await;
    let (mut talk, _) = Talk::accept(&world.agent).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    assert!(echoes(&mut stream).await, "pods are served meanwhile");
    assert_eq!(talk.welcome().await.len(), 2, "and held for an agent that speaks its version");
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_is_told_in_its_ack() {
    let mut world = World::without_pods().await;
    let (mut talk, _) = Talk::accept(&world.agent).await;
    talk.welcome().await;
    let fds = world.listeners(SERVER).await;
    let mut nameless = world.describe(SERVER);
    nameless.addresses.clear();
    let error = talk.add(nameless, fds).await;
    assert!(error.contains("pod shop/server: it has no address"), "{error}");
    assert!(talk.keep(world.describe(SERVER)).await.contains("not served here"));
    talk.snapshot_end().await;
    world.ready().await;
}

#[tokio::test]
async fn shutdown_lets_connections_end() {
    let mut world = World::new().await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    world.shutdown.take().unwrap().send("SIGTERM").unwrap();
    // They wait in the listener's queue for the next ztunnel: the agent has a copy of it.
    let unserved = async || {
        let mut new = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        tokio::time::timeout(Duration::from_millis(200), line(&mut new)).await.is_err()
    };
    eventually("new connections are not served", unserved).await;
    assert!(echoes(&mut stream).await, "an open connection goes on");
    drop(stream);
    let ended = tokio::time::timeout(Duration::from_secs(4), &mut world.ztunnel).await;
    ended.expect("waits although nothing is open").unwrap().unwrap();
}

#[tokio::test]
async fn a_pod_that_is_removed_while_ztunnel_drains_is_cut() {
    let mut world = World::new().await;
    let (_server, _client) = (world.application(SERVER).await, world.application(CLIENT).await);
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    let mut other = world.dial(CLIENT, world.vip(CLIENT)).await.unwrap();
    line(&mut stream).await;
    line(&mut other).await;
    let mut talk = world.talk.take().unwrap();
    world.shutdown.take().unwrap().send("SIGTERM").unwrap();
    talk.draining().await;
    assert!(echoes(&mut stream).await, "an open connection goes on");
    assert_eq!(talk.remove(&SERVER.uid()).await, "");
    assert!(!echoes(&mut stream).await, "it is cut with its pod");
    assert!(echoes(&mut other).await, "the other pod's goes on");
    drop(other);
    let ended = tokio::time::timeout(Duration::from_secs(10), &mut world.ztunnel).await;
    ended.expect("waits although nothing is open").unwrap().unwrap();
}

#[tokio::test]
async fn a_draining_ztunnel_finds_an_agent_that_comes_back() {
    let mut world = World::new().await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    let mut talk = world.talk.take().unwrap();
    world.shutdown.take().unwrap().send("SIGTERM").unwrap();
    talk.draining().await;
    drop(talk);
    let (mut talk, hello) = Talk::accept(&world.agent).await;
    assert!(hello.draining);
    assert_eq!(talk.welcome().await.len(), 2, "what it holds is there to be taken over");
    for pod in [CLIENT, SERVER] {
        assert_eq!(talk.keep(world.describe(pod)).await, "");
    }
    talk.snapshot_end().await;
    assert!(echoes(&mut stream).await);
    let (_, fds) = world.kept.iter().find(|(uid, _)| *uid == CLIENT.uid()).unwrap();
    let fds = fds.iter().map(|(kind, fd)| (*kind, fd.try_clone().unwrap())).collect();
    let new = wire::Pod { uid: "uid-new".into(), ..world.describe(CLIENT) };
    let refused = talk.add(new, fds).await;
    assert!(refused.contains("drains"), "{refused}");
    assert_eq!(talk.remove(&SERVER.uid()).await, "");
    assert!(!echoes(&mut stream).await);
}

/// Nobody has to wait for a successor that does not come.
#[tokio::test]
async fn a_ztunnel_that_is_to_end_serves_until_it_has_a_successor() {
    let mut world = World::new().await;
    let _application = world.application(SERVER).await;
    drop(world.talk.take());
    let (mut talk, hello) = Talk::accept(&world.agent).await;
    assert_eq!((hello.min_version, hello.max_version), (2, 3));
    talk.version = 3;
    talk.welcome().await;
    for pod in [CLIENT, SERVER] {
        assert_eq!(talk.keep(world.describe(pod)).await, "");
    }
    talk.snapshot_end().await;
    assert_ne!(talk.superseded().await, "", "it is not to end");
    let mut before = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut before).await;

    world.shutdown.take().unwrap().send("SIGTERM").unwrap();
    talk.draining().await;
    assert_eq!(world.dump().await["process"]["state"], "draining");
    let mut after = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut after).await;
    assert!(echoes(&mut before).await && echoes(&mut after).await);

    assert_eq!(talk.superseded().await, "");
    let mut late = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    let served = tokio::time::timeout(Duration::from_millis(300), late.read_u8()).await;
    assert!(served.is_err(), "it waits for the successor");
    assert!(echoes(&mut before).await && echoes(&mut after).await);
    drop((before, after));
    let ended = tokio::time::timeout(Duration::from_secs(4), &mut world.ztunnel).await;
    ended.expect("waits although nothing is open").unwrap().unwrap();
}

/// Then whoever manages it can start one.
#[tokio::test]
async fn a_ztunnel_without_a_successor_ends_when_nothing_is_open() {
    let mut world = World::new().await;
    let _application = world.application(SERVER).await;
    drop(world.talk.take());
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    world.shutdown.take().unwrap().send("SIGTERM").unwrap();
    let (mut talk, hello) = Talk::accept(&world.agent).await;
    talk.version = 3;
    talk.welcome().await;
    for pod in [CLIENT, SERVER] {
        assert_eq!(talk.keep(world.describe(pod)).await, "");
    }
    talk.snapshot_end().await;
    if !hello.draining {
        talk.draining().await;
    }
    let early = tokio::time::timeout(Duration::from_millis(500), &mut world.ztunnel).await;
    assert!(early.is_err() && echoes(&mut stream).await, "a connection is open");
    drop(stream);
    let ended = tokio::time::timeout(Duration::from_secs(4), &mut world.ztunnel).await;
    ended.expect("waits although nothing is open").unwrap().unwrap();
}

#[tokio::test]
async fn what_has_not_ended_by_the_deadline_is_cut() {
    let mut world = World::with(&["--drain-deadline=1"]).await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut stream).await;
    let mut talk = world.talk.take().unwrap();
    let told = std::time::Instant::now();
    world.shutdown.take().unwrap().send("SIGTERM").unwrap();
    talk.draining().await;
    assert!(echoes(&mut stream).await, "it has its time");
    let closed = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut [0; 1])).await;
    assert_eq!(closed.expect("still open").unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert!(told.elapsed() >= Duration::from_secs(1), "{:?}", told.elapsed());
    let ended = tokio::time::timeout(Duration::from_secs(10), &mut world.ztunnel).await;
    ended.expect("waits although all is cut").unwrap().unwrap();
    world.logged(&["direction=\"outbound\"", "CUT"]).await;
    world.logged(&["direction=\"inbound\"", "connection failed"]).await;
}
