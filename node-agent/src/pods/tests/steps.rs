//! What a ztunnel is told next, step by step.

use super::*;

#[test]
fn a_refused_pod_is_offered_again_after_a_pause() {
    let mut state = State::new();
    let now = std::time::Instant::now();
    state.put(Arc::new(served("a")));
    assert_eq!(state.progress("a"), Progress::Pending { connected: false });
    let id = state.join(Vec::new(), false);
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
    let id = state.join(vec![served("a")], true);
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
        let id = state.join(vec![served("a")], false);
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
