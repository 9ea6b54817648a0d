//! What a ztunnel is told next, step by step.

use super::*;
use crate::pods::greeting::Greeted;

fn greeted(version: u32, held: Vec<Served>, draining: bool) -> Greeted {
    Greeted { version, held, draining }
}

#[test]
fn a_refused_pod_is_offered_again_after_a_pause() {
    let mut state = State::new();
    let now = std::time::Instant::now();
    state.put(Arc::new(served("a")));
    assert_eq!(state.progress("a"), Progress::Pending { connected: false });
    let id = state.join(greeted(2, Vec::new(), false));
    assert_eq!(state.progress("a"), Progress::Pending { connected: true });
    let Next::Add(sequence, _) = state.next(id, now) else { panic!("no add") };
    assert!(matches!(state.next(id, now), Next::Wait(None)), "one message without an Ack");
    let refused = proto::Ack { sequence, error: "no".into() };
    assert_eq!(state.acked(id, refused, now), Ok(Some(("a".into(), "no".into()))));
    assert_eq!(state.progress("a"), Progress::Failed("no".into()));
    let Next::SnapshotEnd(sequence) = state.next(id, now) else { panic!("a bad pod holds up the rest") };
    state.acked(id, proto::Ack { sequence, error: String::new() }, now).unwrap();
    let Next::Wait(Some(retry)) = state.next(id, now) else { panic!("no retry") };
    assert_eq!(retry, now + state::RETRY);
    let Next::Add(sequence, _) = state.next(id, retry) else { panic!("no retry") };
    state.acked(id, proto::Ack { sequence, error: String::new() }, retry).unwrap();
    assert_eq!(state.progress("a"), Progress::Served);
    assert!(!state.is_gone("a"));
    state.part(id);
    assert!(state.is_gone("a"));
}

#[test]
fn a_ztunnel_that_comes_back_draining_keeps_what_it_holds() {
    let mut state = State::new();
    let now = std::time::Instant::now();
    let id = state.join(greeted(2, vec![served("a")], true));
    state.put(Arc::new(served("b")));
    let done = |state: &mut State, sequence| {
        state.acked(id, proto::Ack { sequence, error: String::new() }, now).unwrap();
    };
    let Next::Keep(sequence, _) = state.next(id, now) else { panic!("no keep") };
    done(&mut state, sequence);
    let Next::SnapshotEnd(sequence) = state.next(id, now) else { panic!("no end") };
    done(&mut state, sequence);
    assert!(matches!(state.next(id, now), Next::Wait(None)), "nothing for it to add");
    assert_eq!(state.progress("b"), Progress::Pending { connected: false });
    assert!(!state.is_connected() && !state.is_gone("a"));
    state.remove("a");
    assert!(matches!(state.next(id, now), Next::Remove(_, uid) if uid == "a"));
}

/// Its connections lose their routes when the pod is released: not before they are closed.
#[test]
fn a_pod_that_ztunnel_reported_is_not_gone_before_it_is_told() {
    for removed_first in [false, true] {
        let mut state = State::new();
        let now = std::time::Instant::now();
        let id = state.join(greeted(2, vec![served("a")], false));
        if removed_first {
            state.remove("a");
        }
        let mut told = Vec::new();
        let expect = if removed_first { &["end"][..] } else { &["keep", "end", "remove"] };
        while told != expect {
            assert!(!state.is_gone("a"), "{told:?}");
            let (what, sequence) = match state.next(id, now) {
                Next::Keep(sequence, _) => ("keep", sequence),
                Next::SnapshotEnd(sequence) => ("end", sequence),
                Next::Remove(sequence, _) => ("remove", sequence),
                other => panic!("{other:?}"),
            };
            told.push(what);
            // While ztunnel is being told of it.
            state.remove("a");
            state.acked(id, proto::Ack { sequence, error: String::new() }, now).unwrap();
        }
        assert!(state.is_gone("a"), "{told:?}");
    }
}

/// Until nothing more is to be said to a ztunnel: what was, in short.
fn told(state: &mut State, id: LinkId) -> Vec<String> {
    let now = std::time::Instant::now();
    let mut told = Vec::new();
    loop {
        let (sequence, text) = match state.next(id, now) {
            Next::Add(sequence, served) => (sequence, format!("add {}", served.pod().uid)),
            Next::Keep(sequence, served) => (sequence, format!("keep {}", served.pod().uid)),
            Next::Remove(sequence, uid) => (sequence, format!("remove {uid}")),
            Next::SnapshotEnd(sequence) => (sequence, "end".to_owned()),
            Next::Superseded(sequence) => (sequence, "superseded".to_owned()),
            Next::Wait(_) => return told,
        };
        told.push(text);
        state.acked(id, proto::Ack { sequence, error: String::new() }, now).unwrap();
    }
}

/// With version 3 it serves on, new pods too, until another has them all; then that one does, and it is told so once.
#[test]
fn a_ztunnel_that_ends_serves_until_it_has_a_successor() {
    let mut state = State::new();
    state.put(Arc::new(served("a")));
    let old = state.join(greeted(3, Vec::new(), false));
    assert_eq!(told(&mut state, old), ["add a", "end"]);
    state.drains(old);
    assert!(told(&mut state, old).is_empty(), "there is nobody else");
    state.put(Arc::new(served("b")));
    assert_eq!(told(&mut state, old), ["add b"]);
    assert_eq!(state.progress("b"), Progress::Served);

    let young = state.join(greeted(2, Vec::new(), false));
    assert!(told(&mut state, old).is_empty(), "the other has not got everything");
    assert_eq!(told(&mut state, young), ["add a", "add b", "end"]);
    assert_eq!(told(&mut state, old), ["superseded"]);
    state.put(Arc::new(served("c")));
    assert!(told(&mut state, old).is_empty());
    assert_eq!(told(&mut state, young), ["add c"]);
    state.part(young);
    assert!(!state.is_connected(), "it takes nothing any more");
    state.remove("a");
    assert_eq!(told(&mut state, old), ["remove a"]);
}

/// Nor does one that the other cannot serve hold it up.
#[test]
fn a_successor_has_tried_every_pod() {
    let mut state = State::new();
    let now = std::time::Instant::now();
    state.put(Arc::new(served("a")));
    let old = state.join(greeted(3, vec![served("a")], true));
    told(&mut state, old);
    let young = state.join(greeted(3, Vec::new(), false));
    let Next::Add(sequence, _) = state.next(young, now) else { panic!("no add") };
    assert!(told(&mut state, old).is_empty());
    state.acked(young, proto::Ack { sequence, error: "no".into() }, now).unwrap();
    assert_eq!(told(&mut state, young), ["end"]);
    assert_eq!(told(&mut state, old), ["superseded"]);
}

/// Version 2 has no word for it.
#[test]
fn an_older_ztunnel_that_ends_is_told_nothing_it_does_not_know() {
    let mut state = State::new();
    state.put(Arc::new(served("a")));
    let old = state.join(greeted(2, Vec::new(), false));
    assert_eq!(told(&mut state, old), ["add a", "end"]);
    state.drains(old);
    state.put(Arc::new(served("b")));
    assert!(told(&mut state, old).is_empty() && !state.is_connected());
    let young = state.join(greeted(3, Vec::new(), false));
    assert_eq!(told(&mut state, young), ["add a", "add b", "end"]);
    assert!(told(&mut state, old).is_empty());
}
