//! Rotations step by step, with a clock of the test's: a lifetime is 100 s, clocks differ by 10 s.

use super::*;

const TIMES: Times = Times { lifetime: Duration::from_secs(100), skew: Duration::from_secs(10) };

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
}

/// A key whose only root is its own.
fn key(name: &str) -> Candidate {
    below(name, name, &[name])
}

/// A key below one of these roots.
fn below(name: &str, anchor: &str, roots: &[&str]) -> Candidate {
    let [ca_cert, ca_key] = ["cert", "key"].map(|what| format!("{what} of {name}"));
    let material = Material { ca_cert, ca_key, cert_chain: String::new(), root_cert: roots.concat() };
    let pem = |root: &str| format!("<{root}>");
    let roots = roots.iter().map(|root| pem(root)).collect();
    Candidate { material, roots, anchor: pem(anchor), from: UNIX_EPOCH, until: at(1_000_000) }
}

/// All replicas in one, with what they can read.
struct World {
    state: State,
    /// Whose key signs: looked up by the state's files.
    keys: Vec<Candidate>,
    published: String,
    restarts: bool,
}

impl World {
    fn new(first: Candidate) -> Self {
        let state = State::new(&first, TIMES);
        Self { published: state.trusted(), state, keys: vec![first], restarts: false }
    }

    fn signing(&self) -> Candidate {
        self.keys.iter().find(|key| key.material == self.state.signing).unwrap().clone()
    }

    /// A round at this second with this Secret: who signs, which roots are trusted, and the phase.
    fn round(&mut self, second: u64, wanted: Option<&Candidate>) -> (String, String, Phase) {
        self.step(second, wanted.map(|candidate| Wanted { candidate: candidate.clone(), at_once: false }))
    }

    fn step(&mut self, second: u64, wanted: Option<Wanted>) -> (String, String, Phase) {
        self.keys.extend(wanted.as_ref().map(|wanted| wanted.candidate.clone()));
        let signing = self.signing();
        let signing = (at(second) < signing.until).then_some(&signing);
        let next = self.state.next(signing, wanted.as_ref(), &self.published, at(second), TIMES);
        let again = next.next(
            signing.filter(|_| next.signing == self.state.signing),
            wanted.as_ref(),
            &next.trusted(),
            at(second),
            TIMES,
        );
        if next.signing == self.state.signing && self.published == next.trusted() {
            assert_eq!(next, again, "a round that repeats another changes nothing");
        }
        self.state = next;
        self.published = self.state.trusted();
        if self.restarts {
            let record = serde_json::to_string(&self.state.record).unwrap();
            self.state.record = serde_json::from_str(&record).unwrap();
        }
        let signs = self.state.signing.ca_key.replace("key of ", "");
        (signs, self.state.trusted(), self.state.phase().0)
    }
}

#[track_caller]
fn check(got: (String, String, Phase), signs: &str, trusted: &str, phase: Phase) {
    assert_eq!((got.0.as_str(), got.1.as_str(), got.2), (signs, trusted, phase));
}

use Phase::{Overlap, Retiring, Steady};

/// With all replicas restarted after each round, and without.
#[test]
fn another_key_signs_once_its_root_is_known_and_the_old_root_goes_after_what_it_vouches_for() {
    for restarts in [false, true] {
        let (a, b) = (key("a"), key("b"));
        let mut world = World { restarts, ..World::new(a.clone()) };
        check(world.round(0, Some(&a)), "a", "<a>", Steady);
        check(world.round(50, Some(&b)), "a", "<a><b>", Overlap);
        assert_eq!(world.state.phase().1, Some(at(160)));
        check(world.round(159, Some(&b)), "a", "<a><b>", Overlap);
        check(world.round(160, Some(&b)), "b", "<a><b>", Retiring);
        assert_eq!(world.state.phase().1, Some(at(270)));
        check(world.round(269, Some(&b)), "b", "<a><b>", Retiring);
        check(world.round(270, Some(&b)), "b", "<b>", Steady);
        assert_eq!(world.state.phase().1, None);
    }
}

#[test]
fn nobody_signs_with_a_root_that_is_not_published() {
    let (a, b) = (key("a"), key("b"));
    let mut world = World::new(a.clone());
    world.round(0, Some(&b));
    world.published = "<a>".into();
    check(world.round(500, Some(&b)), "a", "<a><b>", Overlap);
    check(world.round(501, Some(&b)), "b", "<a><b>", Retiring);
}

#[test]
fn a_second_change_begins_anew_and_what_never_signed_goes_at_once() {
    let (a, b, c) = (key("a"), key("b"), key("c"));
    let mut world = World::new(a.clone());
    world.round(0, Some(&b));
    check(world.round(100, Some(&c)), "a", "<a><c>", Overlap);
    check(world.round(209, Some(&c)), "a", "<a><c>", Overlap);
    check(world.round(210, Some(&c)), "c", "<a><c>", Retiring);
    // While the first one retires: its time goes on.
    check(world.round(220, Some(&b)), "c", "<a><c><b>", Overlap);
    check(world.round(320, Some(&b)), "c", "<c><b>", Overlap);
    check(world.round(330, Some(&b)), "b", "<c><b>", Retiring);
    check(world.round(440, Some(&b)), "b", "<b>", Steady);
}

#[test]
fn back_to_the_old_key_waits_for_nobody() {
    let (a, b) = (key("a"), key("b"));
    let mut world = World::new(a.clone());
    world.round(0, Some(&b));
    check(world.round(50, Some(&a)), "a", "<a>", Steady);
    world.round(60, Some(&b));
    check(world.round(170, Some(&b)), "b", "<a><b>", Retiring);
    check(world.round(200, Some(&a)), "a", "<a><b>", Retiring);
    check(world.round(309, Some(&a)), "a", "<a><b>", Retiring);
    check(world.round(310, Some(&a)), "a", "<a>", Steady);
}

#[test]
fn a_secret_that_is_no_use_changes_nothing_and_stops_nothing_that_was_begun() {
    let (a, b) = (key("a"), key("b"));
    let mut world = World::new(a);
    check(world.round(0, None), "a", "<a>", Steady);
    world.round(0, Some(&b));
    check(world.round(500, None), "a", "<a><b>", Overlap);
    check(world.round(500, Some(&b)), "b", "<a><b>", Retiring);
    check(world.round(609, None), "b", "<a><b>", Retiring);
    check(world.round(610, None), "b", "<b>", Steady);
}

#[test]
fn at_once_means_at_once() {
    let (a, b) = (key("a"), key("b"));
    let at_once = |candidate: &Candidate| Some(Wanted { candidate: candidate.clone(), at_once: true });
    let mut world = World::new(a.clone());
    check(world.step(0, at_once(&b)), "b", "<b>", Steady);
    check(world.round(1, Some(&b)), "b", "<b>", Steady);
    // Also in the midst of a rotation, either half of it.
    for second in [50, 120] {
        let mut world = World::new(a.clone());
        world.round(0, Some(&b));
        world.round(second, Some(&b));
        check(world.step(second, at_once(&b)), "b", "<b>", Steady);
    }
}

#[test]
fn under_a_root_that_all_know_another_key_signs_at_once() {
    let (first, second) = (below("first", "a", &["a"]), below("second", "a", &["a"]));
    let mut world = World::new(first);
    check(world.round(0, Some(&second)), "second", "<a>", Steady);
    // The same key with more roots, and fewer: that is the user's to decide.
    let more = below("second", "a", &["a", "x"]);
    check(world.round(1, Some(&more)), "second", "<a><x>", Steady);
    check(world.round(2, Some(&second)), "second", "<a>", Steady);
    // By hand: both roots under the old key, and the new key a day later.
    let (both, x) = (below("second", "a", &["a", "x"]), below("x", "x", &["x", "a"]));
    world.round(10, Some(&both));
    check(world.round(120, Some(&x)), "x", "<a><x>", Steady);
}

#[test]
fn a_key_that_ends_is_not_waited_for() {
    let (a, b) = (Candidate { until: at(60), ..key("a") }, key("b"));
    let mut world = World::new(a.clone());
    check(world.round(0, Some(&b)), "a", "<a><b>", Overlap);
    assert_eq!(world.state.phase().1, Some(at(50)), "what clocks may differ by before its end");
    check(world.round(50, Some(&b)), "b", "<a><b>", Retiring);
    // One that has ended vouches for nothing, and nothing has to be published first.
    let mut world = World::new(a);
    world.published.clear();
    check(world.round(60, Some(&b)), "b", "<b>", Steady);
}

#[test]
fn a_certificate_that_is_not_valid_yet_is_waited_for() {
    let (a, b) = (key("a"), Candidate { from: at(500), ..key("b") });
    let mut world = World::new(a);
    world.round(0, Some(&b));
    check(world.round(499, Some(&b)), "a", "<a><b>", Overlap);
    check(world.round(500, Some(&b)), "b", "<a><b>", Retiring);
}

/// What was signed for a longer life before still lives.
#[test]
fn a_shorter_lifetime_does_not_shorten_a_rotation() {
    let (a, b) = (key("a"), key("b"));
    let short = Times { lifetime: Duration::from_secs(1), ..TIMES };
    let wanted = |candidate: &Candidate| Wanted { candidate: candidate.clone(), at_once: false };
    let state = State::new(&a, TIMES).next(Some(&a), Some(&wanted(&b)), "<a>", at(0), short);
    let before = state.next(Some(&a), Some(&wanted(&b)), "<a><b>", at(109), short);
    assert_eq!(before.phase().0, Overlap);
    let after = before.next(Some(&a), Some(&wanted(&b)), "<a><b>", at(110), short);
    assert_eq!(after.phase(), (Retiring, Some(at(220))));
    // And from the other end: one that grows is heeded at once.
    let state = State::new(&a, short).next(Some(&a), Some(&wanted(&b)), "<a>", at(0), TIMES);
    assert_eq!(state.phase(), (Overlap, Some(at(110))));
}

#[test]
fn the_key_is_not_in_the_record_and_not_in_logs() {
    let state = State::new(&key("a"), TIMES);
    let said = format!("{state:?} {}", serde_json::to_string(&state.record).unwrap());
    assert!(!said.contains("key of a"), "{said}");
}
