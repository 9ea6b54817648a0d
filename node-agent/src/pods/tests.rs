//! The agent against a scripted ztunnel, over a real socket with real descriptors.

mod steps;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::sys::stat::fstat;
use tokio::task::JoinHandle;

use super::*;
use crate::datapath::Listeners;

struct World {
    directory: PathBuf,
    pods: Pods,
    shutdown: CancellationToken,
}

impl World {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("ambit-pods-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut world = Self { directory, pods: Pods::new(), shutdown: CancellationToken::new() };
        world.restart();
        world
    }

    /// A new agent in place of the old one, of which nothing is left.
    fn restart(&mut self) {
        self.restart_with(Pods::new());
    }

    fn restart_with(&mut self, pods: Pods) {
        self.shutdown.cancel();
        self.shutdown = CancellationToken::new();
        self.pods = pods;
        let listener = Listener::bind(&self.path()).unwrap();
        tokio::spawn(self.pods.clone().serve(listener, descriptor(), self.shutdown.clone()));
    }

    fn path(&self) -> PathBuf {
        self.directory.join("pods.sock")
    }

    async fn connect(&self) -> Ztunnel {
        Ztunnel { link: Link::connect(&self.path()).await.unwrap() }
    }

    /// A ztunnel that is connected and was told everything.
    async fn ready(&self, held: &[&Served]) -> Ztunnel {
        let ztunnel = self.connect().await;
        ztunnel.hello(2, 2).await;
        assert!(matches!(ztunnel.receive().await.0, from_agent::Message::Welcome(_)));
        for pod in held {
            ztunnel.held(pod).await;
        }
        ztunnel.send(from_ztunnel::Message::HeldEnd(proto::HeldEnd {}), &[]).await;
        ztunnel
    }

    fn add(&self, served: Served) -> JoinHandle<Result<(), ServeError>> {
        let pods = self.pods.clone();
        tokio::spawn(async move { pods.add(served).await })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

struct Ztunnel {
    link: Link,
}

impl Ztunnel {
    async fn send(&self, message: from_ztunnel::Message, descriptors: &[BorrowedFd<'_>]) {
        self.link.send(&proto::FromZtunnel { message: Some(message) }, descriptors).await.unwrap();
    }

    async fn receive(&self) -> (from_agent::Message, Vec<OwnedFd>) {
        let (message, descriptors) = self.link.receive::<proto::FromAgent>().await.unwrap();
        (message.message.unwrap(), descriptors)
    }

    async fn hello(&self, min: u32, max: u32) {
        let hello = proto::Hello { min_version: min, max_version: max, ..Default::default() };
        self.send(from_ztunnel::Message::Hello(hello), &[]).await;
    }

    async fn held(&self, pod: &Served) {
        let (fds, descriptors): (Vec<i32>, Vec<_>) =
            pod.descriptors().into_iter().map(|(name, fd)| (i32::from(name), fd)).unzip();
        let held = proto::Held { pod: Some(pod.pod().clone()), fds };
        self.send(from_ztunnel::Message::Held(held), &descriptors).await;
    }

    async fn ack(&self, sequence: u64, error: &str) {
        let ack = proto::Ack { sequence, error: error.to_owned() };
        self.send(from_ztunnel::Message::Ack(ack), &[]).await;
    }

    /// Waits for the next message, acks it, and says in short what it was.
    async fn step(&self) -> String {
        let (message, descriptors) = self.receive().await;
        let (sequence, text) = match message {
            from_agent::Message::Add(add) => {
                assert_eq!(add.fds.len(), descriptors.len());
                (add.sequence, format!("add {} with {} descriptors", add.pod.unwrap().uid, descriptors.len()))
            }
            from_agent::Message::Keep(keep) => (keep.sequence, format!("keep {}", keep.pod.unwrap().uid)),
            from_agent::Message::Remove(remove) => (remove.sequence, format!("remove {}", remove.uid)),
            from_agent::Message::SnapshotEnd(end) => (end.sequence, "end".to_owned()),
            other => panic!("{other:?}"),
        };
        self.ack(sequence, "").await;
        text
    }
}

/// Any open file: only its identity matters.
fn descriptor() -> OwnedFd {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().into()
}

fn served(uid: &str) -> Served {
    let listeners = Listeners {
        outbound_v4: descriptor(),
        inbound_v4: descriptor(),
        hbone_v4: descriptor(),
        outbound_v6: None,
        inbound_v6: None,
        hbone_v6: Some(descriptor()),
        dns_v4: Some(descriptor()),
        dns_v6: None,
    };
    with_listeners(uid, listeners)
}

fn with_listeners(uid: &str, listeners: Listeners) -> Served {
    let pod = proto::Pod { uid: uid.to_owned(), name: format!("pod-{uid}"), ..Default::default() };
    Served::new(pod, descriptor(), listeners).unwrap()
}

fn inode(fd: &impl AsFd) -> u64 {
    fstat(fd.as_fd()).unwrap().st_ino
}

#[tokio::test]
async fn versions_are_negotiated() {
    let world = World::new("version");
    let ztunnel = world.connect().await;
    ztunnel.hello(1, 9).await;
    match ztunnel.receive().await {
        (from_agent::Message::Welcome(welcome), descriptors) => {
            assert_eq!((welcome.version, welcome.fds), (3, vec![i32::from(proto::Fd::SocketFlagMap)]));
            assert_eq!(descriptors.len(), 1);
        }
        other => panic!("{other:?}"),
    }
    let ztunnel = world.connect().await;
    ztunnel.hello(4, 9).await;
    match ztunnel.receive().await.0 {
        from_agent::Message::Goodbye(goodbye) => {
            assert!(goodbye.reason.contains("2 to 3") && goodbye.reason.contains("4 to 9"), "{goodbye:?}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(ztunnel.link.receive::<proto::FromAgent>().await, Err(LinkError::Closed)));
}

#[tokio::test]
async fn a_pod_is_added_with_its_sockets_and_removed() {
    let world = World::new("add");
    let ztunnel = world.ready(&[]).await;
    assert_eq!(ztunnel.step().await, "end");
    let pod = served("a");
    let expect: Vec<_> = pod.descriptors().iter().map(|(name, fd)| (i32::from(*name), inode(fd))).collect();
    let add = world.add(pod);
    match ztunnel.receive().await {
        (from_agent::Message::Add(add), descriptors) => {
            let found: Vec<_> = add.fds.iter().copied().zip(descriptors.iter().map(inode)).collect();
            assert_eq!(found, expect);
            ztunnel.ack(add.sequence, "").await;
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(add.await.unwrap(), Ok(()));
    let pods = world.pods.clone();
    let remove = tokio::spawn(async move { pods.remove("a").await });
    assert_eq!(ztunnel.step().await, "remove a");
    remove.await.unwrap();
}

/// Of a pod that is not known nobody is told.
#[tokio::test]
async fn what_policy_denied_a_pod_is_told() {
    let (sender, mut notices) = crate::notices::queue();
    let mut world = World::new("denied");
    world.restart_with(Pods::telling(sender, &pod_protocol::Config::default()));
    let ztunnel = world.ready(&[]).await;
    assert_eq!(ztunnel.step().await, "end");
    let adding = world.add(served("uid-a"));
    assert!(ztunnel.step().await.starts_with("add uid-a"));
    adding.await.unwrap().unwrap();
    for uid in ["uid-x", "uid-a"] {
        let denied = proto::Denied {
            uid: uid.into(),
            client: "spiffe://td/ns/shop/sa/web".into(),
            port: 80,
            policy: "shop/p".into(),
            reason: "because".into(),
        };
        ztunnel.send(from_ztunnel::Message::Denied(denied), &[]).await;
    }
    let notice = notices.recv().await.unwrap();
    assert_eq!((notice.uid.as_str(), &*notice.pod.name), ("uid-a", "pod-uid-a"));
    assert_eq!(notice.key, ["spiffe://td/ns/shop/sa/web", "shop/p"]);
    assert_eq!(notice.message, "refused spiffe://td/ns/shop/sa/web at port 80: because");
    // Of a certificate each pod of its identity is told, and no other.
    for account in ["other", ""] {
        let expiring = proto::Expiring {
            identity: format!("spiffe:///ns//sa/{account}"),
            percent: 25,
            not_after: 1,
            reason: "the CA is away".into(),
        };
        ztunnel.send(from_ztunnel::Message::Expiring(expiring), &[]).await;
    }
    let notice = notices.recv().await.unwrap();
    assert_eq!(
        (notice.uid.as_str(), notice.reason, notice.is_warning),
        ("uid-a", "CertificateExpiring", true)
    );
    assert!(notices.try_recv().is_err());
    let removing = tokio::spawn({
        let pods = world.pods.clone();
        async move { pods.remove("uid-a").await }
    });
    assert_eq!(ztunnel.step().await, "remove uid-a", "the talk goes on");
    removing.await.unwrap();
}

#[tokio::test]
async fn a_refusal_is_the_answer_and_is_tried_again_later() {
    let world = World::new("refuse");
    let ztunnel = world.ready(&[]).await;
    assert_eq!(ztunnel.step().await, "end");
    let add = world.add(served("a"));
    let (from_agent::Message::Add(message), _) = ztunnel.receive().await else { panic!("no add") };
    ztunnel.ack(message.sequence, "setns: no").await;
    assert_eq!(add.await.unwrap(), Err(ServeError::Refused("setns: no".into())));
}

/// No message of the protocol may be as long as its description is; for others the talk goes on.
#[tokio::test]
async fn a_pod_that_cannot_be_told_of_is_not_served_and_others_are() {
    let world = World::new("oversize");
    let pod = proto::Pod {
        uid: "a".into(),
        authorization_policies: vec!["shop/p".to_owned(); 4096],
        ..Default::default()
    };
    let same = served("a");
    let oversize = || Served::new(pod.clone(), descriptor(), same.listeners().try_clone().unwrap()).unwrap();
    let ztunnel = world.ready(&[]).await;
    assert_eq!(ztunnel.step().await, "end");
    let refused = world.pods.add(oversize()).await.unwrap_err();
    assert!(matches!(&refused, ServeError::Refused(why) if why.contains("cannot be sent")), "{refused}");
    let add = world.add(served("b"));
    assert_eq!(ztunnel.step().await, "add b with 6 descriptors");
    add.await.unwrap().unwrap();
    // As one that ztunnel holds, too.
    let other = world.ready(&[&same]).await;
    assert_eq!(other.step().await, "add b with 6 descriptors");
    assert_eq!(other.step().await, "end");
}

#[tokio::test]
async fn a_new_ztunnel_is_told_everything() {
    let world = World::new("replay");
    let pods = ["a", "b"].map(|uid| world.add(served(uid)));
    let first = world.ready(&[]).await;
    let mut told = [first.step().await, first.step().await, first.step().await];
    told[..2].sort();
    assert_eq!(told, ["add a with 6 descriptors", "add b with 6 descriptors", "end"]);
    for pod in pods {
        assert_eq!(pod.await.unwrap(), Ok(()));
    }
    drop(first);
    let second = world.ready(&[]).await;
    for expect in ["add a with 6 descriptors", "add b with 6 descriptors", "end"] {
        assert_eq!(second.step().await, expect);
    }
}

#[tokio::test]
async fn new_pods_go_to_the_newest_ztunnel_and_removals_to_all() {
    let world = World::new("two");
    let old = world.ready(&[]).await;
    assert_eq!(old.step().await, "end");
    let add = world.add(served("a"));
    assert_eq!(old.step().await, "add a with 6 descriptors");
    add.await.unwrap().unwrap();

    let new = world.ready(&[]).await;
    assert_eq!(new.step().await, "add a with 6 descriptors");
    assert_eq!(new.step().await, "end");
    let add = world.add(served("b"));
    assert_eq!(new.step().await, "add b with 6 descriptors");
    add.await.unwrap().unwrap();

    let pods = world.pods.clone();
    let remove = tokio::spawn(async move { pods.remove("a").await });
    assert_eq!(old.step().await, "remove a");
    assert_eq!(new.step().await, "remove a");
    remove.await.unwrap();

    drop(new);
    assert_eq!(old.step().await, "add b with 6 descriptors", "the only one left takes over");
}

#[tokio::test]
async fn a_ztunnel_that_drains_hears_of_removals_only() {
    let world = World::new("drain");
    let old = world.ready(&[]).await;
    assert_eq!(old.step().await, "end");
    let add = world.add(served("a"));
    assert_eq!(old.step().await, "add a with 6 descriptors");
    add.await.unwrap().unwrap();
    old.send(from_ztunnel::Message::Draining(proto::Draining {}), &[]).await;
    while world.pods.is_connected() {
        tokio::task::yield_now().await;
    }
    let add = world.add(served("b"));
    let pods = world.pods.clone();
    let remove = tokio::spawn(async move { pods.remove("a").await });
    assert_eq!(old.step().await, "remove a", "and not to add b");
    remove.await.unwrap();
    let new = world.ready(&[]).await;
    assert_eq!(new.step().await, "add b with 6 descriptors");
    add.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_restarted_agent_takes_the_sockets_back() {
    let mut world = World::new("restart");
    let (wanted, unwanted) = (served("wanted"), served("unwanted"));
    world.restart();
    let ztunnel = world.ready(&[&wanted, &unwanted]).await;
    world.pods.connected().await;
    assert_eq!(ztunnel.step().await, "keep unwanted");
    assert_eq!(ztunnel.step().await, "keep wanted");
    assert_eq!(ztunnel.step().await, "end");
    let back = world.pods.listeners("wanted").unwrap().unwrap();
    assert_eq!(inode(&back.outbound_v4), inode(&wanted.listeners().outbound_v4));
    assert_eq!(back.hbone_v6.as_ref().map(inode), wanted.listeners().hbone_v6.as_ref().map(inode));
    assert_eq!(back.dns_v4.as_ref().map(inode), wanted.listeners().dns_v4.as_ref().map(inode));
    assert!(back.dns_v6.is_none());

    // The same sockets: ztunnel serves it already, nothing is sent.
    assert_eq!(world.pods.add(with_listeners("wanted", back)).await, Ok(()));
    world.pods.settle();
    assert_eq!(ztunnel.step().await, "remove unwanted");
}

#[tokio::test]
async fn what_ztunnel_holds_is_matched_with_what_is_wanted() {
    let world = World::new("match");
    world.pods.settle();
    let (same, stale) = (served("same"), served("moved"));
    let again = with_listeners("same", same.listeners().try_clone().unwrap());
    let adds = [world.add(again), world.add(served("moved"))];
    let gone = served("gone");
    let ztunnel = world.ready(&[&same, &stale, &gone]).await;
    assert_eq!(ztunnel.step().await, "keep same");
    assert_eq!(ztunnel.step().await, "add moved with 6 descriptors", "other sockets than it holds");
    assert_eq!(ztunnel.step().await, "end");
    for add in adds {
        assert_eq!(add.await.unwrap(), Ok(()));
    }
    assert!(
        world.pods.listeners("gone").unwrap().is_none(),
        "nobody wants it: not named, so ztunnel drops it"
    );
}

#[tokio::test]
async fn confused_peers_are_disconnected_and_others_served() {
    let world = World::new("confused");
    let good = world.ready(&[]).await;
    assert_eq!(good.step().await, "end");

    let speaks_first = world.connect().await;
    speaks_first.ack(1, "").await;
    assert!(matches!(speaks_first.link.receive::<proto::FromAgent>().await, Err(LinkError::Closed)));

    let wrong_ack = world.ready(&[]).await;
    let (message, _) = wrong_ack.receive().await;
    assert!(matches!(message, from_agent::Message::SnapshotEnd(_)));
    wrong_ack.ack(99, "").await;
    assert!(matches!(wrong_ack.link.receive::<proto::FromAgent>().await, Err(LinkError::Closed)));

    let smuggles = world.connect().await;
    let (hello, fd) = (proto::Hello { min_version: 2, max_version: 2, ..Default::default() }, descriptor());
    smuggles.send(from_ztunnel::Message::Hello(hello), &[fd.as_fd()]).await;
    assert!(matches!(smuggles.link.receive::<proto::FromAgent>().await, Err(LinkError::Closed)));

    let incomplete = world.ready(&[]).await;
    assert_eq!(incomplete.step().await, "end");
    let hello = proto::Hello { min_version: 2, max_version: 2, ..Default::default() };
    incomplete.send(from_ztunnel::Message::Hello(hello), &[]).await;
    assert!(matches!(incomplete.link.receive::<proto::FromAgent>().await, Err(LinkError::Closed)));

    let add = world.add(served("a"));
    assert_eq!(good.step().await, "add a with 6 descriptors");
    add.await.unwrap().unwrap();
}

#[test]
fn a_held_pod_needs_its_sockets() {
    let pod = Some(proto::Pod { uid: "a".into(), ..Default::default() });
    let fd = |fd: proto::Fd| i32::from(fd);
    let held = |fds: Vec<i32>| proto::Held { pod: pod.clone(), fds };
    let all = vec![
        fd(proto::Fd::Netns),
        fd(proto::Fd::OutboundV4),
        fd(proto::Fd::InboundV4),
        fd(proto::Fd::HboneV4),
    ];
    let descriptors = |count: usize| (0..count).map(|_| descriptor()).collect::<Vec<_>>();
    assert!(Served::held(held(all.clone()), descriptors(4)).is_ok());
    let count = Served::held(held(all.clone()), descriptors(3));
    assert!(matches!(count, Err(InvalidDescriptors::Count { named: 4, came: 3 })), "{count:?}");
    let missing = Served::held(held(all[..3].to_vec()), descriptors(3));
    assert!(matches!(missing, Err(InvalidDescriptors::Missing(proto::Fd::HboneV4))), "{missing:?}");
    let nobody = Served::held(proto::Held { pod: None, fds: Vec::new() }, Vec::new());
    assert!(matches!(nobody, Err(InvalidDescriptors::NoPod)), "{nobody:?}");
}
