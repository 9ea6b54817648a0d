//! How pods' capture is proved, repaired and told of.

use super::plan::{SECOND, Story, annotated, asks_no_more, failed};
use super::world::*;
use super::*;
use crate::datapath::{Flaw, Part};
use crate::enrol::plan::Outcome;
use crate::index::pod::Reported;

fn flaw(part: Part, certain: bool) -> Flaw {
    Flaw { part, detail: format!("{} is gone", part.name()), certain }
}

fn shown(status: &str, reason: &str) -> Option<Reported> {
    let message = "what the pod opens and what comes to it meets ztunnel, and nothing leaves past it: proved from inside \
                   the pod";
    Some(Reported { status: status.to_owned(), reason: reason.to_owned(), message: message.to_owned() })
}

impl Story {
    /// With an enrolled pod.
    fn enrolled() -> Self {
        let mut story = Self::new();
        story.sees(&[annotated(member("a"))]);
        story.does("enrol uid-a");
        story
    }

    /// The pod is to be proved now, and this is found; whether that is news.
    #[track_caller]
    fn proves(&mut self, found: &[Flaw]) -> bool {
        assert_eq!(self.table.to_prove(self.now).0, ["uid-a".to_owned()].into());
        self.table.proved("uid-a", Some(found.to_vec()), self.now).is_some()
    }

    /// The API server shows what was last said of it.
    fn shows(&mut self, status: &str, reason: &str) {
        self.sees(&[LocalPod { proved: shown(status, reason), ..annotated(member("a")) }]);
    }
}

#[test]
fn a_pod_is_proved_once_enrolled_and_then_every_few_seconds() {
    let mut story = Story::enrolled();
    story.rests();
    assert!(!story.proves(&[]), "as it was to be");
    assert_eq!(story.table.captures().whole, 1);
    story.does("report a Proved");
    story.shows("True", "Proved");
    let (due, wake) = story.table.to_prove(story.now);
    assert_eq!((due.len(), wake), (0, Some(story.now + 5 * SECOND)));
    story.passes(5 * SECOND);
    assert!(!story.proves(&[]));
    story.rests();
}

#[test]
fn what_was_lost_is_put_back_then_told_then_proved_again() {
    let mut story = Story::enrolled();
    story.proves(&[]);
    story.does("report a Proved");
    story.shows("True", "Proved");
    story.passes(5 * SECOND);
    assert!(story.proves(&[flaw(Part::Rules, true), flaw(Part::Guard, true)]));
    let captures = story.table.captures();
    assert_eq!((captures.whole, captures.flawed), (0, [(Part::Rules, 1), (Part::Guard, 1)].into()));
    story.does("repair uid-a rules guard");
    story.does("report a RulesMissing");
    story.shows("False", "RulesMissing");
    story.rests();
    assert!(story.proves(&[]), "at once, and it is well again");
    assert_eq!(story.table.captures().repairs, [(Part::Rules, 1), (Part::Guard, 1)].into());
    story.does("report a Proved");
}

#[test]
fn a_repair_that_does_not_help_is_made_again_with_patience() {
    let mut story = Story::enrolled();
    for (repair, pause) in [1, 2, 4, 8, 16, 30, 30].into_iter().enumerate() {
        story.proves(&[flaw(Part::SkLookup, true)]);
        let outcome = if repair % 2 == 0 { failed("no room") } else { Outcome::Done };
        story.ends("repair uid-a sk_lookup", outcome);
        if repair == 0 {
            story.does("report a SkLookupMissing");
            story.shows("False", "SkLookupMissing");
        }
        story.proves(&[flaw(Part::SkLookup, true)]);
        story.passes(pause * SECOND - SECOND / 2);
        story.rests();
        story.passes(SECOND / 2);
        assert_eq!(story.due(), ["repair uid-a sk_lookup"]);
        story.passes(5 * SECOND);
    }
    assert!(story.table.captures().repairs.is_empty(), "none was of use");
}

#[test]
fn a_canary_that_does_not_come_back_is_believed_the_third_time() {
    let mut story = Story::enrolled();
    for _ in 0..2 {
        assert!(!story.proves(&[flaw(Part::Listeners, false)]));
        story.rests();
        assert_eq!(story.table.to_prove(story.now).1, Some(story.now + SECOND));
        story.passes(SECOND);
    }
    assert!(story.proves(&[flaw(Part::Listeners, false)]));
    story.does("repair uid-a listeners");
    assert!(story.proves(&[]));
    story.passes(5 * SECOND);
    assert!(!story.proves(&[flaw(Part::Listeners, false)]), "anew");
}

#[test]
fn what_the_agent_cannot_put_back_is_only_told() {
    for (part, reason) in [(Part::Addresses, "AddressMissing"), (Part::Proxy, "ProxySilent")] {
        let mut story = Story::enrolled();
        story.proves(&[flaw(part, true)]);
        story.does(&format!("report a {reason}"));
        story.shows("False", reason);
        story.rests();
    }
}

#[test]
fn what_was_found_during_a_step_is_not_believed() {
    let mut story = Story::enrolled();
    assert_eq!(story.table.to_prove(story.now).0.len(), 1);
    assert!(story.table.begin("uid-a"));
    assert_eq!(story.table.to_prove(story.now).0.len(), 0, "busy");
    assert!(story.table.proved("uid-a", Some(vec![flaw(Part::Rules, true)]), story.now).is_none());
    story.table.idle("uid-a");
    story.rests();
    story.proves(&[]);
}

#[test]
fn nothing_is_said_of_a_pod_that_has_left() {
    let mut story = Story::enrolled();
    story.proves(&[]);
    story.does("report a Proved");
    let leaving = LocalPod { proved: shown("True", "Proved"), ..asks_no_more(member("a")) };
    story.sees(&[LocalPod { annotated: true, ..leaving.clone() }]);
    story.does("annotate a false");
    story.sees(std::slice::from_ref(&leaving));
    story.passes(3 * SECOND);
    story.does("release uid-a");
    story.does("report a unproved");
    assert_eq!(story.table.to_prove(story.now), Default::default());
}

#[tokio::test]
async fn a_pod_that_lost_something_is_repaired_and_its_status_says_so() {
    let world = World::new("proof", &[]);
    world.ztunnel(&[]).await;
    world.flaws.lock().unwrap().insert("uid-a".to_owned(), vec![flaw(Part::Guard, true)]);
    world.lists([pod("a", true)]).await;
    let expect = [
        enrolled("uid-a", "10.0.0.9"),
        vec![
            "prepare uid-a [] kept listeners".to_owned(),
            "capture uid-a".to_owned(),
            "guard uid-a again".to_owned(),
            r#"report shop/a Some("GuardMissing")"#.to_owned(),
            r#"report shop/a Some("Proved")"#.to_owned(),
        ],
    ];
    world.journal(&expect.concat()).await;
}
