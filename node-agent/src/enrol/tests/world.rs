//! A node for the task as a whole: real model, real pod protocol over a socket, and fakes around them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use mesh_core::pod_link::{Link, Listener};
use mesh_core::readiness::Readiness;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::fakes::*;
use crate::cluster::ClusterError;
use crate::cni::server::{AddRequest, Attachment};
use crate::enrol::cni::Desk;
use crate::enrol::kernel;
use crate::enrol::steps::{FindNetns, Hands};
use crate::enrol::*;
use crate::index::event::{Event, Kind, Object};
use crate::index::tests::config;
use crate::netns_of_pod::NotFound;
use crate::pods::Pods;
use crate::watch::Source;
use crate::{model, xds};

/// For everything that should happen.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

struct Script(mpsc::Receiver<Event>);

impl Source for Script {
    fn next(&mut self) -> impl Future<Output = Option<Event>> + Send {
        self.0.recv()
    }
}

pub(super) struct World {
    pub(super) directory: PathBuf,
    pub(super) journal: Journal,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) desk: Arc<Desk<FakeCluster>>,
    pub(super) hands: Hands<FakeCluster>,
    pub(super) faults: Faults,
    /// See [`FakeKernel::foreign`].
    pub(super) foreign: Arc<Mutex<BTreeMap<String, Vec<Foreign>>>>,
    /// See [`FakeKernel::flaws`].
    pub(super) flaws: Flaws,
    /// The pods that have processes.
    pub(super) running: Arc<Mutex<BTreeSet<String>>>,
    pub(super) shutdown: CancellationToken,
}

impl World {
    pub(super) fn new(name: &str, survivors: &[&str]) -> Self {
        let directory = std::env::temp_dir().join(format!("ambit-enrol-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let journal = Journal::default();
        let faults = Faults::new(&journal);
        let captured = survivors.iter().map(|uid| ((*uid).to_owned(), Vec::new())).collect();
        let fake = FakeKernel { captured, ..FakeKernel::new(&faults) };
        let (foreign, flaws) = (Arc::clone(&fake.foreign), Arc::clone(&fake.flaws));
        let answer = Mutex::new(Ok(None));
        let cluster = Arc::new(FakeCluster {
            journal: Arc::clone(&journal),
            faults: faults.clone(),
            panics: AtomicBool::new(false),
            answer,
        });
        let running = Arc::new(Mutex::new(["uid-a".to_owned(), "uid-host".to_owned()].into()));
        let processes: Arc<Mutex<BTreeSet<String>>> = Arc::clone(&running);
        let find: FindNetns = Arc::new(move |uid, _| match processes.lock().unwrap().contains(uid) {
            true => Ok(descriptor()),
            false => Err(NotFound::NoProcess { uid: uid.to_owned() }),
        });
        let pods = Pods::new();
        let hands = Hands { cluster, pods: pods.clone(), kernel: kernel::spawn(fake).unwrap(), find };
        let (writer, reader) = model::model(config());
        let (enrolment, desk) = enrolment(hands.clone(), reader, Duration::from_millis(50));
        let (events, script) = mpsc::channel(64);
        let shutdown = CancellationToken::new();
        let (publisher, _) = xds::server::feed();
        let gate = Readiness::new().gate("watches");
        tokio::spawn(writer.run(Script(script), publisher, gate, shutdown.clone()));
        tokio::spawn(enrolment.run(shutdown.clone()));
        let listener = Listener::bind(&directory.join("pods.sock")).unwrap();
        tokio::spawn(pods.serve(listener, descriptor(), shutdown.clone()));
        let desk = Arc::new(desk);
        Self { directory, journal, events, desk, hands, faults, foreign, flaws, running, shutdown }
    }

    /// A ztunnel that takes everything, and writes it down.
    pub(super) async fn ztunnel(&self, held: &[&str]) -> tokio::task::JoinHandle<()> {
        let link = Link::connect(&self.directory.join("pods.sock")).await.unwrap();
        let (faults, held) = (self.faults.clone(), held.iter().map(|uid| (*uid).to_owned()).collect());
        tokio::spawn(async move { obey(link, faults, held).await })
    }

    pub(super) async fn sees(&self, kind: Kind, value: Value) {
        let object = match kind {
            Kind::Namespace => Object::Namespace(Box::new(serde_json::from_value(value).unwrap())),
            _ => Object::Pod(Box::new(serde_json::from_value(value).unwrap())),
        };
        self.events.send(Event::Applied(object)).await.unwrap();
    }

    pub(super) async fn is_synced(&self) {
        for kind in Kind::ALL {
            self.events.send(Event::Listed(kind)).await.unwrap();
        }
    }

    /// The API server has the namespace, of the mesh, with these pods, and all is listed.
    pub(super) async fn lists(&self, pods: impl IntoIterator<Item = Value>) {
        self.sees(Kind::Namespace, namespace("ambient")).await;
        for pod in pods {
            self.sees(Kind::Pod, pod).await;
        }
        self.is_synced().await;
    }

    pub(super) fn answers(&self, answer: Result<Option<(Pod, Namespace)>, ClusterError>) {
        *self.desk.cluster.answer.lock().unwrap() = answer;
    }

    /// Waits until the journal is exactly this, and begins a new one.
    pub(super) async fn journal<T: AsRef<str> + Debug>(&self, expect: &[T]) {
        let met =
            |entries: &Vec<String>| entries.iter().map(String::as_str).eq(expect.iter().map(AsRef::as_ref));
        self.until(met, &format!("{expect:#?}")).await;
        self.journal.send_replace(Vec::new());
    }

    pub(super) async fn until(&self, met: impl FnMut(&Vec<String>) -> bool, expect: &str) {
        let mut journal = self.journal.subscribe();
        let in_time = tokio::time::timeout(PATIENCE, journal.wait_for(met)).await.is_ok();
        assert!(in_time, "expected {expect}, found {:#?}", self.journal.borrow());
    }

    /// What happened to one pod.
    pub(super) fn story(&self, uid: &str) -> Vec<String> {
        story(&self.journal.borrow(), uid)
    }
}

pub(super) fn story(entries: &[String], uid: &str) -> Vec<String> {
    entries.iter().filter(|entry| entry.contains(uid)).cloned().collect()
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What happens to a pod that is enrolled at that address.
pub(super) fn enrolled(uid: &str, address: &str) -> Vec<String> {
    vec![
        format!("prepare {uid} [{address}] new listeners"),
        format!("ztunnel adds {uid}"),
        format!("capture {uid}"),
    ]
}

/// The same for a running one of this namespace, which then is said to be captured.
pub(super) fn joined(name: &str) -> Vec<String> {
    let uid = format!("uid-{name}");
    [enrolled(&uid, "10.0.0.9"), vec![format!("annotate shop/{name} {uid} true")]].concat()
}

pub(super) fn namespace(mode: &str) -> Value {
    json!({"metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": mode}}})
}

pub(super) fn pod(name: &str, annotated: bool) -> Value {
    let annotations = if annotated { json!({"ambient.istio.io/redirection": "enabled"}) } else { json!({}) };
    json!({
        "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}"), "annotations": annotations},
        "spec": {"nodeName": "node-1", "containers": [{"name": "app"}]},
        "status": {"phase": "Running", "podIP": "10.0.0.9"},
    })
}

pub(super) fn request(name: &str, uid: Option<&str>) -> AddRequest {
    AddRequest {
        namespace: "shop".into(),
        name: name.into(),
        uid: uid.map(str::to_owned),
        netns_path: "/proc/self/ns/net".into(),
        attachment: attachment("container-1"),
        addresses: vec!["10.0.0.7".parse().unwrap()],
    }
}

pub(super) fn attachment(container: &str) -> Attachment {
    Attachment { container_id: container.into(), ifname: "eth0".into() }
}

pub(super) fn at_the_server(name: &str, mode: &str) -> Result<Option<(Pod, Namespace)>, ClusterError> {
    let pod = serde_json::from_value(pod(name, false)).unwrap();
    Ok(Some((pod, serde_json::from_value(namespace(mode)).unwrap())))
}
