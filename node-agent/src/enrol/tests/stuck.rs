//! Parts that do not come back.

use std::sync::atomic::Ordering;
use std::time::Instant;

use mesh_core::readiness::Readiness;
use tokio::sync::mpsc;

use super::fakes::*;
use super::member;
use super::world::*;
use crate::cni::server::AddError;
use crate::enrol::cni::Desk;
use crate::enrol::kernel::{self, Dead, Unwell};
use crate::enrol::*;
use crate::upkeep;

#[tokio::test]
async fn a_step_that_panics_is_a_failure_and_is_tried_again() {
    let world = World::new("panic", &[]);
    world.ztunnel(&[]).await;
    world.desk.cluster.panics.store(true, Ordering::Relaxed);
    world.lists([pod("a", false)]).await;
    world.journal(&[joined("a"), vec!["annotate shop/a uid-a true".to_owned()]].concat()).await;
}

#[tokio::test]
async fn the_cni_plugin_is_answered_though_enrolment_is_stuck() {
    let world = World::new("stuck", &[]);
    let (requests, _never_looked_at) = mpsc::channel(1);
    let desk = Desk { requests, model: world.desk.model.clone(), cluster: Arc::clone(&world.desk.cluster) };
    let patience = Duration::from_millis(10);
    for _ in 0..2 {
        let answer = desk.ask(patience, |reply| Request::Check { uid: "uid-a".into(), reply });
        let answer = tokio::time::timeout(Duration::from_secs(10), answer).await.unwrap();
        assert!(
            matches!(&answer, Err(AddError::Unavailable(text)) if text.contains("did not get to it")),
            "{answer:?}"
        );
    }
}

fn fake_kernel() -> FakeKernel {
    FakeKernel::new(&Faults::new(&Journal::default()))
}

#[tokio::test]
async fn a_datapath_that_is_stuck_is_unwell() {
    let kernel = kernel::spawn(fake_kernel()).unwrap();
    let (begun, begins) = oneshot::channel();
    let (end, ends) = std::sync::mpsc::channel::<()>();
    let job = tokio::spawn({
        let kernel = kernel.clone();
        async move {
            kernel
                .run(move |_| {
                    begun.send(()).unwrap();
                    ends.recv().unwrap();
                })
                .await
        }
    });
    begins.await.unwrap();
    let now = Instant::now();
    assert_eq!(kernel.check(now), Ok(()));
    let later = now + Duration::from_secs(61);
    assert!(matches!(kernel.check(later), Err(Unwell::Stuck(silent)) if silent > Duration::from_secs(60)));
    end.send(()).unwrap();
    assert_eq!(job.await.unwrap(), Ok(()));
    assert_eq!(kernel.run(|_| ()).await, Ok(()));
    assert_eq!(kernel.check(Instant::now()), Ok(()));
}

/// Nobody asks for a guard on an interface that comes later.
#[tokio::test]
async fn an_idle_datapath_is_kept_up() {
    let fake = fake_kernel();
    let mut upkeeps = fake.upkeeps.subscribe();
    let _kernel = kernel::spawn(fake).unwrap();
    let several = upkeeps.wait_for(|calls| *calls >= 3);
    tokio::time::timeout(Duration::from_secs(4), several).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_datapath_that_panicked_is_dead() {
    let kernel = kernel::spawn(fake_kernel()).unwrap();
    assert_eq!(kernel.run(|_| panic!("as the test wishes")).await, Err::<(), _>(Dead));
    tokio::time::timeout(PATIENCE, kernel.ended()).await.unwrap();
    assert_eq!(kernel.check(Instant::now()), Err(Unwell::Dead(Dead)));
    assert_eq!(kernel.run(|_| ()).await, Err(Dead));
}

#[tokio::test]
async fn a_survivor_waits_for_the_ztunnel_that_has_its_listeners() {
    let world = World::new("late", &["uid-a"]);
    let step = Step::Enrol(Box::new(member("a")));
    let outcome = world.hands.carry_out("uid-a", &step).await;
    assert!(
        matches!(&outcome, Outcome::Failed { error, early: false } if error.contains("no ztunnel")),
        "{outcome:?}"
    );
    world.journal::<&str>(&[]).await;
    let _ztunnel = world.ztunnel(&["uid-a"]).await;
    world.hands.pods.connected().await;
    assert_eq!(world.hands.carry_out("uid-a", &step).await, Outcome::Done);
    let entries = world.story("uid-a");
    assert!(entries.contains(&"prepare uid-a [10.0.0.9] kept listeners".to_owned()), "{entries:?}");
    assert!(!entries.contains(&"ztunnel adds uid-a".to_owned()), "{entries:?}");
}

#[tokio::test]
async fn readiness_falls_while_nothing_is_pinned() {
    let faults = Faults::new(&Journal::default());
    let kernel = kernel::spawn(FakeKernel::new(&faults)).unwrap();
    let readiness = Readiness::new();
    let gate = readiness.gate("pins");
    faults.set("keep pins", Fault::Error);
    for expect in
        [vec![format!("pins (capture would end with this agent, bpffs holds no pins: {WISH})")], vec![]]
    {
        // Long enough for one look.
        let period = Duration::from_secs(3600);
        let upkeep = upkeep::run(kernel.clone(), period, gate.clone(), CancellationToken::new());
        let looked = readiness.until(|pending| pending == expect);
        tokio::select! {
            () = upkeep => panic!("it ended by itself"),
            looked = tokio::time::timeout(PATIENCE, looked) => assert!(looked.is_ok(), "{:?}", readiness.pending()),
        }
    }
}

#[tokio::test]
async fn what_an_earlier_agent_did_not_finish_is_cleared_first() {
    let faults = Faults::new(&Journal::default());
    let world = World::new("unfinished", &[]);
    let fake = FakeKernel::new(&faults);
    let unfinished = ["uid-a".to_owned(), "uid-gone".to_owned()].into();
    let kernel = kernel::spawn(FakeKernel { unfinished, ..fake }).unwrap();
    let hands = Hands { kernel, ..world.hands.clone() };
    hands.clear_unfinished().await;
    assert_eq!(*faults.journal().borrow(), ["clear uid-a, alive: true", "clear uid-gone, alive: false"]);
    hands.clear_unfinished().await;
    assert_eq!(faults.journal().borrow().len(), 2, "there is nothing left to clear");
}
