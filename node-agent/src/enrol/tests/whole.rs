//! The task as a whole: real model, real pod protocol over a socket, scripted kernel and API server.

mod stuck;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use mesh_core::pod_link::{Link, Listener};
use mesh_core::proto::pods::{from_agent, from_ztunnel};
use mesh_core::readiness::Readiness;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::cluster::ClusterError;
use crate::cni::server::{AddRequest, Attachment, DelRequest, Enroller};
use crate::datapath::{Listeners, PodError, PodSpec, Survivor};
use crate::enrol::cni::Desk;
use crate::enrol::kernel::{self, Drops, Kernel};
use crate::enrol::steps::{FindNetns, Hands};
use crate::enrol::*;
use crate::index::event::{Event, Kind, Object};
use crate::index::pod::Reported;
use crate::netns_of_pod::NotFound;
use crate::pods::Pods;
use crate::watch::Source;
use crate::{model, xds};

/// Everything that happened, in order.
type Journal = Arc<watch::Sender<Vec<String>>>;

fn note(journal: &Journal, what: impl Into<String>) {
    journal.send_modify(|entries| entries.push(what.into()));
}

struct FakeKernel {
    journal: Journal,
    captured: BTreeMap<String, Vec<IpAddr>>,
    refuses: Arc<Mutex<bool>>,
}

impl Kernel for FakeKernel {
    fn surviving(&self) -> Vec<Survivor> {
        let survivor = |(uid, addresses): (&String, &Vec<IpAddr>)| Survivor {
            uid: uid.clone(),
            addresses: addresses.clone(),
            slot: 0,
        };
        self.captured.iter().map(survivor).collect()
    }

    fn prepare(&mut self, pod: &PodSpec, kept: Option<Listeners>) -> Result<Listeners, PodError> {
        let how = if kept.is_some() { "kept" } else { "new" };
        note(&self.journal, format!("prepare {} {:?} {how} listeners", pod.uid, pod.addresses));
        if *self.refuses.lock().unwrap() {
            let source = std::io::Error::from_raw_os_error(17);
            return Err(PodError { uid: pod.uid.clone(), step: "add ip rule", source });
        }
        Ok(kept.unwrap_or_else(listeners))
    }

    fn capture(&mut self, uid: &str) -> Result<(), PodError> {
        note(&self.journal, format!("capture {uid}"));
        self.captured.insert(uid.to_owned(), Vec::new());
        Ok(())
    }

    fn leave(&mut self, uid: &str) -> Result<(), PodError> {
        note(&self.journal, format!("leave {uid}"));
        self.captured.remove(uid);
        Ok(())
    }

    fn drops(&mut self, _: usize) -> Drops {
        Drops::default()
    }
}

struct FakeCluster {
    journal: Journal,
    /// The next annotation is a panic.
    panics: AtomicBool,
    answer: Mutex<Result<Option<(Pod, Namespace)>, ClusterError>>,
}

impl Cluster for FakeCluster {
    async fn pod(&self, name: &ObjectName) -> Result<Option<(Pod, Namespace)>, ClusterError> {
        note(&self.journal, format!("get {name}"));
        self.answer.lock().unwrap().clone()
    }

    async fn namespace(&self, name: &str) -> Result<Option<Namespace>, ClusterError> {
        note(&self.journal, format!("get namespace {name}"));
        self.answer.lock().unwrap().clone().map(|answer| answer.map(|(_, namespace)| namespace))
    }

    async fn annotate(&self, name: &ObjectName, uid: &str, captured: bool) -> Result<(), ClusterError> {
        note(&self.journal, format!("annotate {name} {uid} {captured}"));
        assert!(!self.panics.swap(false, Ordering::Relaxed), "as the test wishes");
        Ok(())
    }

    async fn report(
        &self,
        name: &ObjectName,
        _: &str,
        condition: Option<&Reported>,
    ) -> Result<(), ClusterError> {
        note(&self.journal, format!("report {name} {:?}", condition.map(|condition| &condition.reason)));
        Ok(())
    }
}

struct Script(mpsc::Receiver<Event>);

impl Source for Script {
    fn next(&mut self) -> impl Future<Output = Option<Event>> + Send {
        self.0.recv()
    }
}

struct World {
    directory: PathBuf,
    journal: Journal,
    events: mpsc::Sender<Event>,
    desk: Arc<Desk<FakeCluster>>,
    hands: Hands<FakeCluster>,
    refuses: Arc<Mutex<bool>>,
    /// The pods that have processes.
    running: Arc<Mutex<BTreeSet<String>>>,
    shutdown: CancellationToken,
}

impl World {
    fn new(name: &str, survivors: &[&str]) -> Self {
        let directory = std::env::temp_dir().join(format!("ambit-enrol-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (journal, refuses) = (Journal::default(), Arc::new(Mutex::new(false)));
        let captured = survivors.iter().map(|uid| ((*uid).to_owned(), Vec::new())).collect();
        let fake = FakeKernel { journal: Arc::clone(&journal), captured, refuses: Arc::clone(&refuses) };
        let answer = Mutex::new(Ok(None));
        let cluster =
            Arc::new(FakeCluster { journal: Arc::clone(&journal), panics: AtomicBool::new(false), answer });
        let running = Arc::new(Mutex::new(["uid-a".to_owned(), "uid-host".to_owned()].into()));
        let processes: Arc<Mutex<BTreeSet<String>>> = Arc::clone(&running);
        let find: FindNetns = Arc::new(move |uid| match processes.lock().unwrap().contains(uid) {
            true => Ok(descriptor()),
            false => Err(NotFound::NoProcess { uid: uid.to_owned() }),
        });
        let pods = Pods::new();
        let hands = Hands { cluster, pods: pods.clone(), kernel: kernel::spawn(fake).unwrap(), find };
        let (writer, reader) = model::model(config());
        let (enrolment, desk) = enrolment(hands.clone(), reader, config(), Duration::from_millis(50));
        let (events, script) = mpsc::channel(64);
        let shutdown = CancellationToken::new();
        let (publisher, _) = xds::server::feed();
        let gate = Readiness::new().gate("watches");
        tokio::spawn(writer.run(Script(script), publisher, gate, shutdown.clone()));
        tokio::spawn(enrolment.run(shutdown.clone()));
        let listener = Listener::bind(&directory.join("pods.sock")).unwrap();
        tokio::spawn(pods.serve(listener, descriptor(), shutdown.clone()));
        Self { directory, journal, events, desk: Arc::new(desk), hands, refuses, running, shutdown }
    }

    /// A ztunnel that takes everything, and writes it down.
    async fn ztunnel(&self, held: &[&str]) -> tokio::task::JoinHandle<()> {
        let link = Link::connect(&self.directory.join("pods.sock")).await.unwrap();
        let (journal, held) = (Arc::clone(&self.journal), held.iter().map(|uid| (*uid).to_owned()).collect());
        tokio::spawn(async move { obey(link, journal, held).await })
    }

    async fn sees(&self, kind: Kind, value: Value) {
        let object = match kind {
            Kind::Namespace => Object::Namespace(Box::new(serde_json::from_value(value).unwrap())),
            _ => Object::Pod(Box::new(serde_json::from_value(value).unwrap())),
        };
        self.events.send(Event::Applied(object)).await.unwrap();
    }

    async fn is_synced(&self) {
        for kind in Kind::ALL {
            self.events.send(Event::Listed(kind)).await.unwrap();
        }
    }

    fn answers(&self, answer: Result<Option<(Pod, Namespace)>, ClusterError>) {
        *self.desk.cluster.answer.lock().unwrap() = answer;
    }

    /// Waits until the journal is exactly this, and begins a new one.
    async fn journal(&self, expect: &[&str]) {
        self.until(|entries| entries == expect, &format!("{expect:#?}")).await;
        self.journal.send_replace(Vec::new());
    }

    async fn until(&self, met: impl FnMut(&Vec<String>) -> bool, expect: &str) {
        let mut journal = self.journal.subscribe();
        let in_time = tokio::time::timeout(Duration::from_secs(10), journal.wait_for(met)).await.is_ok();
        assert!(in_time, "expected {expect}, found {:#?}", self.journal.borrow());
    }

    /// What happened to one pod.
    fn story(&self, uid: &str) -> Vec<String> {
        story(&self.journal.borrow(), uid)
    }
}

fn story(entries: &[String], uid: &str) -> Vec<String> {
    entries.iter().filter(|entry| entry.contains(uid)).cloned().collect()
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

async fn obey(link: Link, journal: Journal, held: Vec<String>) {
    let send = async |message: from_ztunnel::Message, fds: &[std::os::fd::BorrowedFd<'_>]| {
        link.send(&proto::FromZtunnel { message: Some(message) }, fds).await
    };
    let hello = proto::Hello { min_version: 1, max_version: 1, software: "script".into() };
    send(from_ztunnel::Message::Hello(hello), &[]).await.unwrap();
    for uid in held {
        let names = [proto::Fd::Netns, proto::Fd::OutboundV4, proto::Fd::InboundV4, proto::Fd::HboneV4];
        let descriptors = names.map(|_| descriptor());
        let held = proto::Held {
            pod: Some(proto::Pod { uid, ..Default::default() }),
            fds: names.map(i32::from).to_vec(),
        };
        let descriptors: Vec<_> = descriptors.iter().map(std::os::fd::AsFd::as_fd).collect();
        send(from_ztunnel::Message::Held(held), &descriptors).await.unwrap();
    }
    send(from_ztunnel::Message::HeldEnd(proto::HeldEnd {}), &[]).await.unwrap();
    while let Ok((message, _)) = link.receive::<proto::FromAgent>().await {
        let sequence = match message.message.unwrap() {
            from_agent::Message::Add(add) => {
                note(&journal, format!("ztunnel adds {}", add.pod.unwrap().uid));
                add.sequence
            }
            from_agent::Message::Remove(remove) => {
                note(&journal, format!("ztunnel removes {}", remove.uid));
                remove.sequence
            }
            from_agent::Message::Keep(keep) => {
                note(&journal, format!("ztunnel keeps {}", keep.pod.unwrap().uid));
                keep.sequence
            }
            from_agent::Message::SnapshotEnd(end) => end.sequence,
            _ => continue,
        };
        let ack = proto::Ack { sequence, error: String::new() };
        if send(from_ztunnel::Message::Ack(ack), &[]).await.is_err() {
            return;
        }
    }
}

fn descriptor() -> OwnedFd {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().into()
}

fn listeners() -> Listeners {
    Listeners {
        outbound_v4: descriptor(),
        inbound_v4: descriptor(),
        hbone_v4: descriptor(),
        outbound_v6: None,
        inbound_v6: None,
        hbone_v6: None,
    }
}

fn config() -> index::Config {
    index::Config {
        cluster_id: "Kubernetes".into(),
        trust_domain: "cluster.local".into(),
        cluster_domain: "cluster.local".into(),
        node_name: "node-1".into(),
        system_namespace: "ambit-system".into(),
        excluded_namespaces: ["kube-system".to_owned()].into(),
    }
}

fn namespace(mode: &str) -> Value {
    json!({"metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": mode}}})
}

fn pod(name: &str, annotated: bool) -> Value {
    let annotations = if annotated { json!({"ambient.istio.io/redirection": "enabled"}) } else { json!({}) };
    json!({
        "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}"), "annotations": annotations},
        "spec": {"nodeName": "node-1", "containers": [{"name": "app"}]},
        "status": {"phase": "Running", "podIP": "10.0.0.9"},
    })
}

fn request(name: &str, uid: Option<&str>) -> AddRequest {
    AddRequest {
        namespace: "shop".into(),
        name: name.into(),
        uid: uid.map(str::to_owned),
        netns_path: "/proc/self/ns/net".into(),
        attachment: attachment("container-1"),
        addresses: vec!["10.0.0.7".parse().unwrap()],
    }
}

fn attachment(container: &str) -> Attachment {
    Attachment { container_id: container.into(), ifname: "eth0".into() }
}

fn at_the_server(name: &str, mode: &str) -> Result<Option<(Pod, Namespace)>, ClusterError> {
    let pod = serde_json::from_value(pod(name, false)).unwrap();
    Ok(Some((pod, serde_json::from_value(namespace(mode)).unwrap())))
}

#[tokio::test]
async fn a_running_pod_joins_and_leaves_in_order() {
    let world = World::new("running", &[]);
    world.ztunnel(&[]).await;
    world.sees(Kind::Namespace, namespace("ambient")).await;
    world.sees(Kind::Pod, pod("a", false)).await;
    world.is_synced().await;
    world
        .journal(&[
            "prepare uid-a [10.0.0.9] new listeners",
            "ztunnel adds uid-a",
            "capture uid-a",
            "annotate shop/a uid-a true",
        ])
        .await;
    world.sees(Kind::Pod, pod("a", true)).await;
    world.sees(Kind::Namespace, namespace("none")).await;
    world.journal(&["annotate shop/a uid-a false"]).await;
    world.sees(Kind::Pod, pod("a", false)).await;
    world.journal(&["ztunnel removes uid-a", "leave uid-a"]).await;
}

#[tokio::test]
async fn a_pod_deleted_by_force_is_released_with_its_last_process() {
    let world = World::new("force", &[]);
    world.ztunnel(&[]).await;
    world.sees(Kind::Namespace, namespace("ambient")).await;
    world.sees(Kind::Pod, pod("a", true)).await;
    world.is_synced().await;
    let enrolled = ["prepare uid-a [10.0.0.9] new listeners", "ztunnel adds uid-a", "capture uid-a"];
    world.journal(&enrolled).await;
    let name = ObjectName::new("shop", "a");
    world.events.send(Event::Deleted(Kind::Pod, name)).await.unwrap();
    // A pod that comes later is enrolled later: by then the other would have been released.
    world.running.lock().unwrap().insert("uid-b".to_owned());
    world.sees(Kind::Pod, pod("b", true)).await;
    world
        .journal(
            &enrolled.map(|entry| entry.replace("uid-a", "uid-b")).each_ref().map(|entry| entry.as_str()),
        )
        .await;
    world.running.lock().unwrap().remove("uid-a");
    world.journal(&["ztunnel removes uid-a", "leave uid-a"]).await;
}

#[tokio::test]
async fn cni_add_does_not_need_the_watch() {
    let world = World::new("cni", &[]);
    world.ztunnel(&[]).await;
    // The watch is behind: it has neither the pod nor its namespace, nor is it synced.
    world.answers(at_the_server("a", "ambient"));
    assert_eq!(world.desk.add(request("a", Some("uid-a"))).await, Ok(()));
    let enrolled =
        ["get shop/a", "prepare uid-a [10.0.0.7] new listeners", "ztunnel adds uid-a", "capture uid-a"];
    world.journal(&enrolled).await;
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
    while !world.desk.model.is_synced() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    world.answers(at_the_server("a", "ambient"));
    assert_eq!(world.desk.add(request("b", Some("uid-b"))).await, Ok(()));
    world.journal(&[]).await;
    assert_eq!(world.desk.add(request("a", Some("uid-a"))).await, Ok(()));
    let enrolled = ["prepare uid-a [10.0.0.7] new listeners", "ztunnel adds uid-a", "capture uid-a"];
    world.journal(&[&["get namespace shop"][..], &enrolled[..]].concat()).await;
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
    *world.refuses.lock().unwrap() = true;
    let error = world.desk.add(request("a", Some("uid-a"))).await.unwrap_err();
    assert!(
        matches!(&error, AddError::Unavailable(text) if text.contains("add ip rule: File exists")),
        "{error:?}"
    );
    world.journal(&["get shop/a", "prepare uid-a [10.0.0.7] new listeners", "leave uid-a"]).await;
}

#[tokio::test]
async fn a_restarted_agent_takes_over_and_sweeps() {
    let world = World::new("restart", &["uid-a", "uid-dead"]);
    world.sees(Kind::Namespace, namespace("ambient")).await;
    world.sees(Kind::Pod, pod("a", true)).await;
    world.is_synced().await;
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
async fn del_of_an_old_sandbox_after_a_restart_leaves_the_pod_captured() {
    let world = World::new("old-sandbox", &["uid-a"]);
    world.ztunnel(&["uid-a"]).await;
    world.sees(Kind::Namespace, namespace("ambient")).await;
    world.sees(Kind::Pod, pod("a", true)).await;
    world.is_synced().await;
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

#[tokio::test]
async fn one_pod_that_cannot_be_enrolled_does_not_stop_others() {
    let world = World::new("others", &[]);
    world.ztunnel(&[]).await;
    world.sees(Kind::Namespace, namespace("ambient")).await;
    let mut host = pod("host", false);
    host["spec"]["hostNetwork"] = json!(true);
    world.sees(Kind::Pod, host).await;
    world.sees(Kind::Pod, pod("late", false)).await;
    world.is_synced().await;
    world.journal(&[r#"report shop/host Some("HostNetwork")"#]).await;
    world.sees(Kind::Pod, pod("a", false)).await;
    let expect = [
        "prepare uid-a [10.0.0.9] new listeners",
        "ztunnel adds uid-a",
        "capture uid-a",
        "annotate shop/a uid-a true",
    ];
    world.journal(&expect).await;
}
