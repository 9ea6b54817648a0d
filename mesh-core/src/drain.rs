//! Shutting down: everyone is told to finish, later to stop, and the end waits for them.
//!
//! A [`Watch`] is held by whoever has work to finish; dropping it says that the work is done.

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Running,
    Draining,
    Closing,
}

/// The side that orders the shutdown.
#[derive(Debug)]
pub struct Drain {
    stage: watch::Sender<Stage>,
}

/// The side that obeys it.
#[derive(Clone, Debug)]
pub struct Watch {
    stage: watch::Receiver<Stage>,
}

/// A new pair, nothing ordered yet.
pub fn new() -> (Drain, Watch) {
    let (sender, receiver) = watch::channel(Stage::Running);
    (Drain { stage: sender }, Watch { stage: receiver })
}

impl Drain {
    /// Another watch on this drain.
    pub fn watch(&self) -> Watch {
        Watch { stage: self.stage.subscribe() }
    }

    /// Whether all watches are dropped: there is nothing left to wait for.
    pub fn is_done(&self) -> bool {
        self.stage.is_closed()
    }

    /// Completes when all watches are dropped.
    pub async fn done(&self) {
        self.stage.closed().await;
    }

    /// Asks all to take no new work and to finish what they have.
    pub fn start(&self) {
        self.stage.send_if_modified(|stage| {
            let first = *stage == Stage::Running;
            if first {
                *stage = Stage::Draining;
            }
            first
        });
    }

    /// Tells all to stop at once.
    pub fn close(&self) {
        self.stage.send_replace(Stage::Closing);
    }

    /// Asks all to finish, waits until all watches are dropped or `deadline` has passed, and then tells the rest to
    /// stop at once. Returns whether all had finished in time; the caller's own watches must be dropped before.
    pub async fn finish(self, deadline: Duration) -> bool {
        self.start();
        let in_time = tokio::time::timeout(deadline, self.done()).await.is_ok();
        self.close();
        in_time
    }
}

impl Watch {
    /// Waits for the order to take no new work.
    pub async fn draining(&self) {
        self.reached(Stage::Draining).await;
    }

    /// Waits for the order to stop at once.
    pub async fn closing(&self) {
        self.reached(Stage::Closing).await;
    }

    /// Whether new work is unwelcome.
    pub fn is_draining(&self) -> bool {
        *self.stage.borrow() >= Stage::Draining || self.stage.has_changed().is_err()
    }

    async fn reached(&self, wanted: Stage) {
        // A dropped Drain orders both: its owner is gone, nobody could order it later.
        let _ = self.stage.clone().wait_for(|stage| *stage >= wanted).await;
    }
}

/// Completes on SIGTERM or SIGINT, with the signal's name. The handlers are in place when this function returns.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn terminated() -> io::Result<impl Future<Output = &'static str>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_for_the_work_in_hand() {
        let (drain, watch) = new();
        assert!(!watch.is_draining() && !drain.is_done());
        let worker = tokio::spawn(async move {
            watch.draining().await;
            assert!(watch.is_draining());
        });
        assert!(drain.finish(Duration::from_secs(5)).await);
        worker.await.unwrap();
    }

    #[tokio::test]
    async fn stops_those_who_do_not_finish() {
        let (drain, watch) = new();
        let worker = tokio::spawn(async move { watch.closing().await });
        assert!(!drain.finish(Duration::ZERO).await);
        worker.await.unwrap();
    }

    #[tokio::test]
    async fn a_lost_drain_is_an_order() {
        let (drain, watch) = new();
        drop(drain);
        assert!(watch.is_draining());
        watch.draining().await;
        watch.closing().await;
    }
}
