//! What is due when.

use std::time::{Duration, Instant};

use super::*;
use crate::enrol::plan::{Outcome, Step, Table};
use crate::index::membership::Refusal;
use crate::index::pod::{Condition, Reported};

pub(super) const SECOND: Duration = Duration::from_secs(1);
const GRACE: Duration = Duration::from_secs(3);

/// A table and its clock.
pub(super) struct Story {
    pub(super) table: Table,
    pub(super) now: Instant,
}

impl Story {
    pub(super) fn new() -> Self {
        Self { table: Table::new(GRACE), now: Instant::now() }
    }

    pub(super) fn sees(&mut self, pods: &[LocalPod]) {
        self.table.observe(pods.to_vec(), true, self.now);
    }

    pub(super) fn passes(&mut self, time: Duration) {
        self.now += time;
    }

    /// The steps that are due, in short.
    pub(super) fn due(&self) -> Vec<String> {
        self.table.plan(self.now).steps.iter().map(|(uid, step)| short(uid, step)).collect()
    }

    /// Expects exactly this step to be due, and carries it out.
    #[track_caller]
    pub(super) fn does(&mut self, expect: &str) {
        self.ends(expect, Outcome::Done);
    }

    #[track_caller]
    pub(super) fn ends(&mut self, expect: &str, outcome: Outcome) {
        let plan = self.table.plan(self.now);
        let [(uid, step)] = plan.steps.as_slice() else { panic!("expected {expect}, due: {:?}", self.due()) };
        assert_eq!(short(uid, step), expect);
        assert!(self.table.begin(uid));
        assert!(self.due().is_empty(), "one step at a time");
        self.table.finish(uid, step, outcome, self.now);
    }

    #[track_caller]
    pub(super) fn rests(&self) {
        assert_eq!(self.due(), Vec::<String>::new());
    }
}

fn short(uid: &str, step: &Step) -> String {
    match step {
        Step::Enrol(_) => format!("enrol {uid}"),
        Step::Annotate(name, captured) => format!("annotate {} {captured}", name.name),
        Step::Release => format!("release {uid}"),
        Step::Sweep => format!("sweep {uid}"),
        Step::Repair(parts) => {
            format!("repair {uid} {}", parts.iter().map(|part| part.name()).collect::<Vec<_>>().join(" "))
        }
        Step::Report(name, _, Some(reported)) => format!("report {} {}", name.name, reported.reason),
        Step::Report(name, Condition::Enrolled, None) => format!("report {} nothing", name.name),
        Step::Report(name, Condition::Captured, None) => format!("report {} unproved", name.name),
    }
}

pub(super) fn annotated(pod: LocalPod) -> LocalPod {
    LocalPod { annotated: true, ..pod }
}

pub(super) fn asks_no_more(pod: LocalPod) -> LocalPod {
    LocalPod { membership: Membership::NotAsked, ..pod }
}

pub(super) fn failed(error: &str) -> Outcome {
    Outcome::Failed { error: error.to_owned(), early: false }
}

#[test]
fn programs_of_others_are_reported_while_they_are_there() {
    let mut story = Story::new();
    let meets = |story: &mut Story, programs: &[&str]| {
        let found = programs.iter().map(|text| ("uid-a".to_owned(), (*text).to_owned())).collect();
        story.table.meet(found).into_iter().map(|(uid, news)| format!("{uid}: {news}")).collect::<Vec<_>>()
    };
    story.sees(&[annotated(member("a")), annotated(member("b"))]);
    for uid in ["uid-a", "uid-b"] {
        story.table.enrolled(uid, None, None, story.now);
    }
    story.rests();
    assert_eq!(meets(&mut story, &["lb"]), ["uid-a: lb"]);
    assert!(meets(&mut story, &["lb"]).is_empty(), "no news");
    assert_eq!(story.table.counts(), (2, 0, 1));
    story.does("report a ForeignPrograms");
    story.rests();
    let shows = |message: &str| {
        let message = format!("the pod is in the mesh, and meets eBPF programs of others: {message}");
        let reported = Reported { status: "True".into(), reason: "ForeignPrograms".into(), message };
        [LocalPod { reported: Some(reported), ..annotated(member("a")) }, annotated(member("b"))]
    };
    story.sees(&shows("lb"));
    story.rests();
    assert_eq!(meets(&mut story, &["lb, another"]), ["uid-a: lb, another"]);
    story.does("report a ForeignPrograms");
    story.sees(&shows("lb, another"));
    story.rests();
    assert_eq!(meets(&mut story, &[]), ["uid-a: "]);
    story.does("report a nothing");
    assert_eq!(story.table.counts(), (2, 0, 0));
}

#[test]
fn a_running_pod_joins_and_leaves() {
    let mut story = Story::new();
    story.sees(&[member("a")]);
    story.does("enrol uid-a");
    story.does("annotate a true");
    story.rests();
    story.sees(&[annotated(member("a"))]);
    story.rests();

    story.sees(&[asks_no_more(annotated(member("a")))]);
    story.does("annotate a false");
    story.rests();
    story.passes(5 * SECOND);
    story.rests();
    story.sees(&[asks_no_more(member("a"))]);
    story.rests();
    story.passes(GRACE / 2);
    story.rests();
    assert!(story.table.is_enrolled("uid-a"), "captured until others know");
    story.passes(GRACE / 2);
    story.does("release uid-a");
    story.rests();
    assert!(!story.table.is_enrolled("uid-a"));
}

#[test]
fn nothing_is_due_for() {
    let terminating = LocalPod { terminating: true, ..member("a") };
    let finished = LocalPod { finished: true, ..member("a") };
    let pending = LocalPod { addresses: Vec::new(), ..member("a") };
    for pod in [asks_no_more(member("a")), terminating, finished, pending] {
        let mut story = Story::new();
        story.sees(&[pod]);
        story.rests();
    }
    let mut story = Story::new();
    story.table.observe(vec![member("a")], false, story.now);
    story.rests();
}

#[test]
fn a_pod_that_ends_or_is_gone_is_swept() {
    let mut story = Story::new();
    story.sees(&[annotated(member("a")), annotated(member("b"))]);
    for uid in ["uid-a", "uid-b"] {
        story.table.enrolled(uid, None, None, story.now);
    }
    story.sees(&[LocalPod { finished: true, ..annotated(member("a")) }]);
    assert_eq!(story.due(), ["sweep uid-a", "sweep uid-b"]);
}

#[test]
fn a_pod_that_changes_its_mind_stays_captured() {
    let mut story = Story::new();
    story.sees(&[annotated(member("a"))]);
    story.does("enrol uid-a");
    story.sees(&[asks_no_more(annotated(member("a")))]);
    story.does("annotate a false");
    story.sees(&[asks_no_more(member("a"))]);
    story.sees(&[member("a")]);
    story.passes(SECOND);
    story.does("annotate a true");
    story.rests();
}

#[test]
fn survivors_are_taken_over_or_swept() {
    let mut story = Story::new();
    story.table.survived(["uid-stays", "uid-leaves", "uid-dead"].map(str::to_owned), story.now);
    story.rests();
    assert!(!story.table.is_settled());
    story.sees(&[annotated(member("stays")), asks_no_more(annotated(member("leaves")))]);
    assert_eq!(story.due(), ["sweep uid-dead", "enrol uid-leaves", "enrol uid-stays"]);
    let plan = story.table.plan(story.now);
    for (uid, step) in plan.steps {
        story.table.begin(&uid);
        story.table.finish(&uid, &step, Outcome::Done, story.now);
    }
    assert!(story.table.is_settled());
    story.does("annotate leaves false");
    story.rests();
}

#[test]
fn a_survivor_that_cannot_be_taken_over_stays_captured() {
    let mut story = Story::new();
    story.table.survived(["uid-a".to_owned()], story.now);
    story.sees(&[annotated(member("a"))]);
    story.ends("enrol uid-a", failed("no ztunnel"));
    assert!(story.table.is_enrolled("uid-a") && !story.table.is_settled());
    story.passes(SECOND);
    story.does("enrol uid-a");
    assert!(story.table.is_settled());
}

#[test]
fn failures_back_off_and_are_told_in_the_status() {
    let mut story = Story::new();
    story.sees(&[member("a")]);
    for pause in [1, 2] {
        story.ends("enrol uid-a", failed("no route"));
        story.rests();
        assert_eq!(story.table.plan(story.now).wake, Some(story.now + pause * SECOND));
        story.passes(pause * SECOND);
    }
    story.does("report a EnrolmentFailed");
    story.ends("enrol uid-a", failed("no route"));
    let told = Reported { status: "False".into(), reason: "EnrolmentFailed".into(), message: String::new() };
    story.sees(&[LocalPod { reported: Some(told.clone()), ..member("a") }]);
    story.passes(30 * SECOND);
    story.does("enrol uid-a");
    story.does("annotate a true");
    story.sees(&[LocalPod { reported: Some(told), ..annotated(member("a")) }]);
    story.does("report a nothing");
    story.rests();
}

#[test]
fn a_pod_that_is_not_there_yet_is_no_failure() {
    let mut story = Story::new();
    story.sees(&[member("a")]);
    for _ in 0..20 {
        story.ends("enrol uid-a", Outcome::Failed { error: "no process".into(), early: true });
        story.passes(SECOND);
    }
    assert_eq!(story.due(), ["enrol uid-a"]);
    assert_eq!(story.table.counts(), (0, 0, 0));
}

#[test]
fn a_pod_whose_processes_never_show_is_a_failure() {
    let mut story = Story::new();
    let early = || Outcome::Failed { error: "no process".into(), early: true };
    story.sees(&[member("a")]);
    for _ in 0..30 {
        story.ends("enrol uid-a", early());
        story.passes(SECOND);
    }
    assert_eq!(story.table.counts(), (0, 0, 0));
    for pause in [1, 2] {
        story.ends("enrol uid-a", early());
        assert_eq!(story.table.plan(story.now).wake, Some(story.now + pause * SECOND), "backs off");
        assert_eq!(story.table.counts(), (0, 1, 0));
        story.passes(pause * SECOND);
    }
    story.does("report a EnrolmentFailed");
    story.does("enrol uid-a");
    assert_eq!(story.table.counts(), (1, 0, 0));
}

#[test]
fn a_refusal_is_told_once_and_taken_back() {
    let mut story = Story::new();
    let refused = LocalPod { membership: Membership::Refused(Refusal::HostNetwork), ..member("a") };
    story.sees(std::slice::from_ref(&refused));
    story.does("report a HostNetwork");
    story.rests();
    let condition = Reported { status: "False".into(), reason: "HostNetwork".into(), message: "m".into() };
    let shown = LocalPod { reported: Some(condition.clone()), ..refused };
    story.sees(&[shown]);
    story.passes(600 * SECOND);
    story.rests();
    story.sees(&[LocalPod { reported: Some(condition), ..asks_no_more(member("a")) }]);
    story.does("report a nothing");
    story.rests();
}

#[test]
fn a_lost_patch_is_made_again() {
    let mut story = Story::new();
    story.sees(&[member("a")]);
    story.does("enrol uid-a");
    story.does("annotate a true");
    story.passes(59 * SECOND);
    story.rests();
    story.passes(SECOND);
    story.does("annotate a true");
    story.ends_nothing_until_shown();
}

impl Story {
    fn ends_nothing_until_shown(&mut self) {
        self.rests();
        self.sees(&[annotated(member("a"))]);
        self.passes(600 * SECOND);
        self.rests();
    }
}

#[test]
fn an_annotation_of_a_pod_that_is_not_captured_is_withdrawn() {
    let mut story = Story::new();
    story.sees(&[asks_no_more(annotated(member("a")))]);
    story.does("annotate a false");
    story.rests();
}

#[test]
fn a_pod_enrolled_by_cni_waits_for_the_watch() {
    let mut story = Story::new();
    story.sees(&[]);
    let name = ObjectName::new("shop", "a");
    story.table.enrolled("uid-a", Some(name), Some("container-1".into()), story.now);
    story.does("annotate a true");
    story.rests();
    story.passes(5 * SECOND);
    // The pod comes before its namespace's label: no reason to let it go.
    story.sees(&[asks_no_more(annotated(member("a")))]);
    story.rests();
    story.sees(&[annotated(member("a"))]);
    story.rests();
    // Now it is.
    story.sees(&[asks_no_more(annotated(member("a")))]);
    story.does("annotate a false");
}

/// The container is that of the enrolment before.
#[test]
fn a_pod_whose_dns_is_to_be_captured_or_no_longer_is_enrolled_again() {
    let mut story = Story::new();
    let name = ObjectName::new("shop", "a");
    let pod = |dns| LocalPod { dns, ..annotated(member("a")) };
    story.sees(&[pod(true)]);
    story.table.enrolled("uid-a", Some(name.clone()), Some("container-1".into()), story.now);
    story.table.enrolled_with("uid-a", true);
    story.rests();
    for dns in [false, true] {
        story.sees(&[pod(dns)]);
        story.ends("enrol uid-a", failed("ztunnel is away"));
        story.passes(SECOND);
        story.does("enrol uid-a");
        story.rests();
        let certain = Some(("uid-a".to_owned(), true));
        assert_eq!(story.table.attached(None, &name, "container-1"), certain);
        assert_eq!(story.table.attached(None, &name, "container-2"), None);
    }
}

#[test]
fn a_pod_that_is_gone_stays_captured_while_it_has_processes() {
    let mut story = Story::new();
    story.sees(&[annotated(member("a"))]);
    story.does("enrol uid-a");
    // Deleted by force, unreadable, or the watch is away: the model does not tell.
    story.sees(&[]);
    for _ in 0..1000 {
        story.ends("sweep uid-a", Outcome::Failed { error: "processes are left".into(), early: true });
        assert!(story.table.is_enrolled("uid-a"));
        story.rests();
        story.passes(SECOND);
    }
    assert_eq!(story.table.counts(), (1, 0, 0), "nothing is wrong with it");
    story.does("sweep uid-a");
    assert!(!story.table.is_enrolled("uid-a"));
    story.rests();
}

#[test]
fn a_pod_that_goes_while_it_is_enrolled_is_swept() {
    let mut story = Story::new();
    story.sees(&[member("a")]);
    let plan = story.table.plan(story.now);
    let (uid, step) = &plan.steps[0];
    story.table.begin(uid);
    story.sees(&[]);
    story.table.finish(uid, step, Outcome::Done, story.now);
    story.does("sweep uid-a");
    story.rests();
}

#[test]
fn a_pod_that_never_shows_is_swept_in_the_end() {
    let mut story = Story::new();
    story.sees(&[]);
    story.table.enrolled("uid-a", Some(ObjectName::new("shop", "a")), Some("c".into()), story.now);
    story.does("annotate a true");
    story.sees(&[]);
    story.passes(299 * SECOND);
    story.rests();
    story.passes(SECOND);
    story.does("sweep uid-a");
    story.rests();
}

#[test]
fn del_names_the_container_that_it_means() {
    let mut story = Story::new();
    let name = ObjectName::new("shop", "a");
    story.table.enrolled("uid-a", Some(name.clone()), Some("new".into()), story.now);
    story.table.survived(["uid-b".to_owned()], story.now);
    for (uid, name, container, expect) in [
        (Some("uid-a"), &name, "new", Some(("uid-a", true))),
        (Some("uid-a"), &name, "old", None),
        (None, &name, "new", Some(("uid-a", true))),
        (Some("uid-b"), &ObjectName::new("shop", "b"), "any", Some(("uid-b", false))),
        (Some("uid-c"), &name, "new", None),
        (None, &ObjectName::new("shop", "c"), "new", None),
    ] {
        assert_eq!(
            story.table.attached(uid, name, container),
            expect.map(|(uid, certain): (&str, bool)| (uid.to_owned(), certain)),
            "{uid:?} {name} {container}"
        );
    }
    assert_eq!(story.table.detached(&["new".to_owned()].into()), Vec::<String>::new());
    assert_eq!(story.table.detached(&["other".to_owned()].into()), ["uid-a"]);
}

#[test]
fn after_del_a_pod_is_left_alone_for_a_while() {
    let mut story = Story::new();
    story.sees(&[annotated(member("a"))]);
    story.does("enrol uid-a");
    story.table.deleted("uid-a", story.now);
    story.rests();
    story.passes(10 * SECOND);
    assert_eq!(story.due(), ["enrol uid-a"]);
}
