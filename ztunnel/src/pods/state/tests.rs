//! Orders of messages, and what each leads to.

use std::fs::File;

use super::*;

fn fd() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn pod(uid: &str) -> wire::Pod {
    wire::Pod {
        uid: uid.into(),
        namespace: "shop".into(),
        name: "web".into(),
        addresses: vec![vec![10, 0, 0, 1]],
        workload_uid: "c//Pod/shop/web".into(),
        trust_domain: "cluster.local".into(),
        ..Default::default()
    }
}

fn message(message: Message) -> wire::FromAgent {
    wire::FromAgent { message: Some(message) }
}

fn welcome(version: u32) -> wire::FromAgent {
    message(Message::Welcome(wire::Welcome { version, ..Default::default() }))
}

fn add(uid: &str) -> (wire::FromAgent, Vec<OwnedFd>) {
    let fds = REQUIRED.iter().map(|fd| *fd as i32).collect();
    (
        message(Message::Add(wire::AddPod { sequence: 1, pod: Some(pod(uid)), fds })),
        REQUIRED.map(|_| fd()).into(),
    )
}

fn keep(uid: &str) -> wire::FromAgent {
    message(Message::Keep(wire::KeepPod { sequence: 2, pod: Some(pod(uid)) }))
}

fn end() -> wire::FromAgent {
    message(Message::SnapshotEnd(wire::SnapshotEnd { sequence: 3 }))
}

fn greeted() -> Conversation {
    let mut conversation = Conversation::new(Network::default(), pod_protocol::VERSIONS);
    let action = conversation.receive(welcome(2), vec![]).unwrap();
    assert!(matches!(action, Action::Greeted { flag_map: None, .. }));
    conversation
}

#[test]
fn a_whole_conversation() {
    let mut conversation = greeted();
    let (added, fds) = add("a");
    let Action::Add(1, info, fds) = conversation.receive(added, fds).unwrap() else { panic!() };
    assert_eq!(info.workload.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/default");
    assert_eq!((fds.len(), info.workload.addresses.len()), (4, 1));
    assert!(matches!(conversation.receive(keep("b"), vec![]).unwrap(), Action::Keep(2, _)));
    assert!(!conversation.is_complete());
    let Action::Snapshot(3, named) = conversation.receive(end(), vec![]).unwrap() else { panic!() };
    assert_eq!(named, HashSet::from(["a".to_owned(), "b".to_owned()]));
    assert!(conversation.is_complete());
    let (added, fds) = add("c");
    assert!(matches!(conversation.receive(added, fds).unwrap(), Action::Add(..)));
    let remove = message(Message::Remove(wire::RemovePod { sequence: 9, uid: "a".into() }));
    assert!(matches!(conversation.receive(remove, vec![]).unwrap(), Action::Remove(9, uid) if uid == "a"));
}

#[test]
fn the_flag_map_comes_with_the_welcome() {
    let mut conversation = Conversation::new(Network::default(), pod_protocol::VERSIONS);
    let fds = vec![Fd::SocketFlagMap as i32];
    let welcome = message(Message::Welcome(wire::Welcome { version: 2, fds, software: "agent 1".into() }));
    let action = conversation.receive(welcome, vec![fd()]).unwrap();
    assert!(matches!(action, Action::Greeted { flag_map: Some(_), software } if software == "agent 1"));
}

#[test]
fn a_removed_pod_is_not_in_the_snapshot() {
    let mut conversation = greeted();
    conversation.receive(keep("a"), vec![]).unwrap();
    let remove = message(Message::Remove(wire::RemovePod { sequence: 9, uid: "a".into() }));
    conversation.receive(remove, vec![]).unwrap();
    let Action::Snapshot(_, named) = conversation.receive(end(), vec![]).unwrap() else { panic!() };
    assert!(named.is_empty());
}

#[test]
fn what_ends_a_conversation() {
    let goodbye = || message(Message::Goodbye(wire::Goodbye { reason: "versions 2 to 3 only".into() }));
    let fresh = || Conversation::new(Network::default(), pod_protocol::VERSIONS);
    let served = || {
        let mut conversation = greeted();
        conversation.receive(end(), vec![]).unwrap();
        conversation
    };
    let cases: Vec<(Conversation, wire::FromAgent, usize, &str)> = vec![
        (fresh(), goodbye(), 0, "the node agent refuses: versions 2 to 3 only"),
        (fresh(), welcome(4), 0, "chose version 4 of the pod protocol, this ztunnel speaks 2 to 3"),
        (fresh(), keep("a"), 0, "sent KeepPod before Welcome"),
        (fresh(), wire::FromAgent::default(), 0, "does not know"),
        (fresh(), welcome(2), 1, "Welcome lists 0 descriptors and carries 1"),
        (greeted(), welcome(2), 0, "sent Welcome a second time"),
        (greeted(), add("a").0, 3, "AddPod lists 4 descriptors and carries 3"),
        (greeted(), keep("a"), 1, "KeepPod lists 0 descriptors and carries 1"),
        (served(), keep("a"), 0, "sent KeepPod after the snapshot"),
        (served(), end(), 0, "sent SnapshotEnd after the snapshot"),
    ];
    for (mut conversation, message, fds, expect) in cases {
        let error = conversation.receive(message, (0..fds).map(|_| fd()).collect()).unwrap_err().to_string();
        assert!(error.contains(expect), "{expect}: {error}");
    }
}

#[test]
fn a_bad_pod_fails_alone() {
    type Break = fn(&mut wire::AddPod);
    let cases: [(Break, &str); 6] = [
        (|add| add.pod = None, "describes no pod"),
        (|add| add.pod.as_mut().unwrap().uid.clear(), "no uid"),
        (|add| add.pod.as_mut().unwrap().addresses.clear(), "pod shop/web: it has no address"),
        (|add| add.pod.as_mut().unwrap().addresses.push(vec![1]), "an address of 1 bytes"),
        (|add| add.pod.as_mut().unwrap().trust_domain = "a/b".into(), "trust domain \"a/b\""),
        (|add| add.fds[0] = Fd::OutboundV6 as i32, "FD_NETNS is missing"),
    ];
    for (damage, expect) in cases {
        let mut conversation = greeted();
        let (mut wire_message, fds) = add("a");
        if let Some(Message::Add(add)) = &mut wire_message.message {
            damage(add);
        }
        let action = conversation.receive(wire_message, fds).unwrap();
        assert!(
            matches!(&action, Action::Refuse(1, reason) if reason.contains(expect)),
            "{expect}: {action:?}"
        );
        assert!(matches!(conversation.receive(keep("b"), vec![]).unwrap(), Action::Keep(..)));
    }
}

#[test]
fn a_successor_is_told_where_the_version_has_a_word_for_it() {
    let superseded = || message(Message::Superseded(wire::Superseded { sequence: 4 }));
    for (version, known) in [(2, false), (3, true)] {
        let mut conversation = Conversation::new(Network::default(), 2..=3);
        assert!(!conversation.knows_no_successors(), "it may be told yet");
        conversation.receive(welcome(version), vec![]).unwrap();
        assert_eq!(conversation.knows_no_successors(), !known);
        let expiring = wire::from_ztunnel::Message::Expiring(wire::Expiring::default());
        assert_eq!(conversation.has_word_for(&expiring), known);
        assert!(conversation.has_word_for(&wire::from_ztunnel::Message::Denied(wire::Denied::default())));
        conversation.receive(end(), vec![]).unwrap();
        match conversation.receive(superseded(), vec![]) {
            Ok(Action::Superseded(4)) => assert!(known),
            Err(ProtocolError::OutOfOrder { message: "Superseded", .. }) => assert!(!known),
            other => panic!("version {version}: {other:?}"),
        }
    }
    let mut early = greeted();
    assert!(early.receive(superseded(), vec![]).is_err());
}

#[test]
fn a_version_that_it_is_not_to_speak_is_not_spoken() {
    let mut limited = Conversation::new(Network::default(), 2..=2);
    let Some(wire::from_ztunnel::Message::Hello(hello)) = limited.hello(true).message else { panic!() };
    assert_eq!((hello.min_version, hello.max_version, hello.draining), (2, 2, true));
    assert!(matches!(limited.receive(welcome(3), vec![]), Err(ProtocolError::Version(3, _))));
}
