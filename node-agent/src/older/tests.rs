//! When older connections are looked at, and what is then said of them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;

use mesh_core::readiness::Readiness;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::*;
use crate::datapath::{Denies, Foreign, Listeners, PodError, PodSpec, Proof, Survivor};
use crate::enrol::kernel::{self, Drops, Kernel};
use crate::index::event::{Event, Kind, Object, ObjectName};
use crate::watch::Source;
use crate::{model, xds};

/// Refuses the first request. Tells what it was asked, for connections to two ports, and how often that was.
struct FakeKernel(mpsc::UnboundedSender<String>, usize);

impl Kernel for FakeKernel {
    fn surviving(&self) -> Vec<Survivor> {
        Vec::new()
    }

    fn unfinished(&self) -> Vec<String> {
        Vec::new()
    }

    fn clear(&mut self, uid: &str, _: Option<OwnedFd>) -> Result<(), PodError> {
        Err(failed(uid))
    }

    fn keep_pins(&mut self) -> io::Result<usize> {
        Ok(0)
    }

    fn prepare(&mut self, pod: &PodSpec, _: Option<Listeners>) -> Result<Listeners, PodError> {
        Err(failed(&pod.uid))
    }

    fn capture(&mut self, uid: &str) -> Result<(), PodError> {
        Err(failed(uid))
    }

    fn survey(&mut self, _: &BTreeSet<String>) -> BTreeMap<String, Proof> {
        BTreeMap::new()
    }

    fn spec(&self, _: &str) -> io::Result<PodSpec> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn guard_again(&mut self, uid: &str) -> Result<(), PodError> {
        Err(failed(uid))
    }

    fn leave(&mut self, uid: &str) -> Result<(), PodError> {
        Err(failed(uid))
    }

    fn upkeep(&mut self) -> Duration {
        Duration::from_secs(1)
    }

    fn reset_older(&mut self, uid: &str, denies: &Denies<'_>) -> Result<Reset, PodError> {
        let denied = [80, 81].map(|port| denies(([10, 0, 0, 9], port).into(), ([10, 0, 0, 8], 999).into()));
        self.0.send(format!("{uid} {denied:?}")).unwrap();
        self.1 += 1;
        let count = denied.into_iter().filter(|denied| *denied).count();
        // The second time a handshake is under way.
        if self.1 == 1 { Err(failed(uid)) } else { Ok(Reset { count, more: self.1 == 2 }) }
    }

    fn drops(&mut self, _: usize) -> Drops {
        Drops::default()
    }

    fn follow_kubelet(&mut self) {}

    fn foreign(&mut self) -> io::Result<BTreeMap<String, Vec<Foreign>>> {
        Ok(BTreeMap::new())
    }
}

fn failed(uid: &str) -> PodError {
    PodError { uid: uid.to_owned(), step: "obey", source: io::ErrorKind::Unsupported.into() }
}

struct Script(mpsc::Receiver<Event>);

impl Source for Script {
    async fn next(&mut self) -> Option<Event> {
        self.0.recv().await
    }
}

fn pod(captured: bool, ready: &str) -> Event {
    named("web", "uid", captured, ready)
}

fn named(name: &str, uid: &str, captured: bool, ready: &str) -> Event {
    let annotations = if captured { json!({"ambient.istio.io/redirection": "enabled"}) } else { json!({}) };
    let pod = json!({
        "metadata": {"namespace": "shop", "name": name, "uid": uid, "labels": {"app": "web"},
                     "annotations": annotations},
        "spec": {"nodeName": "node-1", "containers": []},
        "status": {"podIP": "10.0.0.9", "conditions": [{"type": "Ready", "status": ready}]},
    });
    Event::Applied(Object::Pod(Box::new(serde_json::from_value(pod).unwrap())))
}

fn policy(spec: Value) -> Event {
    let policy = json!({"metadata": {"namespace": "shop", "name": "p"}, "spec": spec});
    Event::Applied(Object::PeerAuthentication(Box::new(serde_json::from_value(policy).unwrap())))
}

#[tokio::test]
async fn older_connections_are_asked_about_when_their_pods_policies_change() {
    let (journal, mut asked) = mpsc::unbounded_channel();
    let kernel = kernel::spawn(FakeKernel(journal, 0)).unwrap();
    let (writer, reader) = model::model(crate::index::tests::config());
    let (events, script) = mpsc::channel(8);
    let shutdown = CancellationToken::new();
    let (publisher, _) = xds::server::feed();
    tokio::spawn(writer.run(Script(script), publisher, Readiness::new().gate("watches"), shutdown.clone()));
    let resets = Resets::default();
    let looks = tokio::spawn(run(reader, kernel, resets.clone(), shutdown.clone()));
    let mut next = async || {
        tokio::time::timeout(PATIENCE, asked.recv()).await.expect("nothing happens").expect("it has ended")
    };
    let strict = json!({"mtls": {"mode": "STRICT"}});
    // The other one is never captured: its older connections are not known.
    let other = named("other", "uid-2", false, "True");
    for event in [other, pod(true, "False"), policy(strict.clone()), pod(false, "False")] {
        events.send(event).await.unwrap();
    }
    // What is said before everything is listed is not the last word.
    for event in Kind::ALL.map(Event::Listed).into_iter().chain([pod(true, "False")]) {
        events.send(event).await.unwrap();
    }
    assert_eq!(next().await, "uid [true, true]", "only once it is captured");
    events.send(pod(true, "True")).await.unwrap();
    assert_eq!(next().await, "uid [true, true]", "what failed is tried again");
    assert_eq!(next().await, "uid [true, true]", "what was about to be opened is looked at by itself");
    let mut ports = json!({"selector": {"matchLabels": {"app": "web"}}, "mtls": {"mode": "STRICT"}});
    ports["portLevelMtls"] = json!({"81": {"mode": "PERMISSIVE"}});
    // The same again, then no policy, changes nothing.
    for event in [
        policy(strict),
        Event::Deleted(Kind::PeerAuthentication, ObjectName::new("shop", "p")),
        policy(ports),
    ] {
        events.send(event).await.unwrap();
    }
    assert_eq!(next().await, "uid [true, false]", "a policy may be about a port");
    shutdown.cancel();
    looks.await.unwrap();
    assert_eq!(resets.read(), 5);
}

const PATIENCE: Duration = Duration::from_secs(10);
