//! A fault at each step of joining and leaving: an error, a hang, and the agent's death before and after the step.
//! Whatever happens the pod is outside of the mesh, or captured, served and said to be; and the job gets done, by the
//! same agent or the next.

use super::fakes::*;
use super::world::*;
use crate::cni::server::{AddError, Enroller};
use crate::index::event::Kind;

/// Where a pod is, as kernel, ztunnel and API server have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    served: bool,
    captured: bool,
    annotated: bool,
}

const OUTSIDE: Place = Place { served: false, captured: false, annotated: false };
const INSIDE: Place = Place { served: true, captured: true, annotated: true };

/// Steps as the journal has them, with the place where the pod is before each.
const JOINING: [(&str, Place); 4] = [
    ("prepare uid-a", OUTSIDE),
    ("ztunnel adds uid-a", OUTSIDE),
    ("capture uid-a", Place { served: true, ..OUTSIDE }),
    ("annotate shop/a uid-a true", Place { annotated: false, ..INSIDE }),
];
const LEAVING: [(&str, Place); 3] = [
    ("annotate shop/a uid-a false", INSIDE),
    ("ztunnel removes uid-a", Place { annotated: false, ..INSIDE }),
    ("leave uid-a", Place { captured: true, ..OUTSIDE }),
];

impl Place {
    /// Where it is after what happened.
    ///
    /// # Panics
    /// When anything happened in an order in which the pod's traffic would be cut, or go out in the clear.
    fn after(mut self, entries: &[String]) -> Self {
        for entry in entries {
            match entry.as_str() {
                "ztunnel adds uid-a" | "ztunnel keeps uid-a" => self.served = true,
                "ztunnel removes uid-a" => {
                    assert!(
                        !self.annotated,
                        "peers are told to tunnel to a pod that nobody serves: {entries:#?}"
                    );
                    self.served = false;
                }
                "capture uid-a" => {
                    assert!(self.served, "captured, and nobody serves it: {entries:#?}");
                    self.captured = true;
                }
                "leave uid-a" => {
                    assert!(!self.annotated && !self.served, "in the clear: {entries:#?}");
                    self.captured = false;
                }
                "annotate shop/a uid-a true" => {
                    assert!(self.captured && self.served, "said to be captured: {entries:#?}");
                    self.annotated = true;
                }
                "annotate shop/a uid-a false" => self.annotated = false,
                _ => {}
            }
        }
        self
    }
}

/// One agent with the pod, which came to it in a place.
struct Story {
    world: World,
    begin: Place,
    /// What the watch has shown last.
    shown: bool,
}

impl Story {
    async fn begin(name: &str, mode: &str, begin: Place) -> Self {
        let captured: &[&str] = if begin.captured { &["uid-a"] } else { &[] };
        let served: &[&str] = if begin.served { &["uid-a"] } else { &[] };
        let world = World::new(name, captured);
        world.ztunnel(served).await;
        world.sees(Kind::Namespace, namespace(mode)).await;
        world.sees(Kind::Pod, pod("a", begin.annotated)).await;
        world.is_synced().await;
        Self { world, begin, shown: begin.annotated }
    }

    fn place(&self) -> Place {
        self.begin.after(&self.world.journal.borrow())
    }

    /// Waits until the pod is there; the watch shows its annotation meanwhile.
    async fn arrives(&mut self, expect: Place) {
        let mut journal = self.world.journal.subscribe();
        let arrives = async {
            while self.place() != expect {
                if self.place().annotated != self.shown {
                    self.shown = !self.shown;
                    self.world.sees(Kind::Pod, pod("a", self.shown)).await;
                }
                journal.changed().await.unwrap();
            }
        };
        let arrived = tokio::time::timeout(PATIENCE, arrives).await;
        assert!(arrived.is_ok(), "expected {expect:?}: {:#?}", self.world.journal.borrow());
        if self.place().annotated != self.shown {
            self.shown = !self.shown;
            self.world.sees(Kind::Pod, pod("a", self.shown)).await;
        }
    }

    /// Waits until the fault has come about.
    async fn springs(&self, fault: Fault) {
        self.world
            .until(|entries| entries.iter().any(|entry| entry.starts_with(fault.name())), fault.name())
            .await;
    }
}

/// A story up to a fault at a step: joining or leaving.
async fn up_to(name: &str, step: &str, joining: bool, fault: Fault) -> Story {
    let mut story = if joining {
        let (world, begin) = (World::new(name, &[]), OUTSIDE);
        world.faults.set(step, fault);
        world.ztunnel(&[]).await;
        world.lists([pod("a", false)]).await;
        Story { world, begin, shown: false }
    } else {
        let mut story = Story::begin(name, "ambient", OUTSIDE).await;
        story.arrives(INSIDE).await;
        story.world.faults.set(step, fault);
        story.world.sees(Kind::Namespace, namespace("none")).await;
        story
    };
    // What the watch shows of the withdrawn annotation begins the rest.
    if !joining && step != LEAVING[0].0 {
        story.arrives(LEAVING[1].1).await;
    }
    story.springs(fault).await;
    story
}

/// Every step, where the pod is before it, and where it is after the next.
fn steps() -> impl Iterator<Item = (&'static str, Place, bool, Place)> {
    let end = |steps: &[(&'static str, Place)], last: Place| {
        let after: Vec<Place> = steps[1..].iter().map(|step| step.1).chain([last]).collect();
        steps.iter().zip(after).map(|((step, before), after)| (*step, *before, after)).collect::<Vec<_>>()
    };
    let joining = end(&JOINING, INSIDE).into_iter().map(|(step, before, after)| (step, before, true, after));
    let leaving =
        end(&LEAVING, OUTSIDE).into_iter().map(|(step, before, after)| (step, before, false, after));
    joining.chain(leaving)
}

fn end(joining: bool) -> Place {
    if joining { INSIDE } else { OUTSIDE }
}

#[tokio::test]
async fn an_error_at_any_step_is_made_good() {
    let stories = steps().enumerate().map(|(index, (step, _, joining, _))| async move {
        let mut story = up_to(&format!("error{index}"), step, joining, Fault::Error).await;
        story.arrives(end(joining)).await;
    });
    futures_util::future::join_all(stories).await;
}

#[tokio::test]
async fn a_pod_that_cannot_be_let_go_is_let_go_later() {
    let mut story = up_to("refusal", "leave uid-a", false, Fault::Refusal).await;
    let entry = |entry: &String| entry == "leave uid-a";
    assert!(!story.world.journal.borrow().iter().any(entry), "no refusal");
    story.arrives(OUTSIDE).await;
}

#[tokio::test]
async fn a_hang_at_any_step_holds_the_pod_where_it_is() {
    for (index, (step, before, joining, _)) in steps().enumerate() {
        let mut story = up_to(&format!("hang{index}"), step, joining, Fault::HangBefore).await;
        assert_eq!(story.place(), before, "{step}");
        story.world.faults.go_on();
        story.arrives(end(joining)).await;
    }
}

#[tokio::test]
async fn the_next_agent_finishes_what_one_that_died_at_any_step_began() {
    for (index, (step, before, joining, after)) in steps().enumerate() {
        for (fault, place) in [(Fault::HangBefore, before), (Fault::HangAfter, after)] {
            let name = format!("death{index}{}", fault == Fault::HangAfter);
            // Neither goes on nor is it told to end.
            let died = up_to(&name, step, joining, fault).await;
            assert_eq!(died.place(), place, "{step} {fault:?}");
            let mode = if joining { "ambient" } else { "none" };
            let mut next = Story::begin(&format!("{name}-next"), mode, place).await;
            next.arrives(end(joining)).await;
            drop(died);
        }
    }
}

#[tokio::test]
async fn cni_add_fails_with_an_error_at_any_step_and_leaves_nothing() {
    for (index, (step, _)) in JOINING.iter().take(3).enumerate() {
        let world = World::new(&format!("add{index}"), &[]);
        world.ztunnel(&[]).await;
        world.answers(at_the_server("a", "ambient"));
        world.faults.set(step, Fault::Error);
        let error = world.desk.add(request("a", Some("uid-a"))).await.unwrap_err();
        assert!(matches!(&error, AddError::Unavailable(text) if text.contains(WISH)), "{step}: {error:?}");
        assert_eq!(OUTSIDE.after(&world.journal.borrow()), OUTSIDE);
        // The runtime tries again.
        assert_eq!(world.desk.add(request("a", Some("uid-a"))).await, Ok(()));
        let inside = Place { annotated: false, ..INSIDE };
        assert_eq!(OUTSIDE.after(&world.journal.borrow()), inside);
    }
}
