//! SIGINT, SIGTERM and SIGHUP remove all runs of the process, then end it.
//!
//! On a thread with a runtime of its own, so that a lab that hangs can still be interrupted.
//! **Invariant:** once a signal came, only that thread ends the process: whoever begins or ends a run meanwhile waits
//! for it, so that no exit overtakes the removal.
#![allow(
    unsafe_code,
    reason = "_exit(2): the handlers of exit(3) would wait for what the interrupted threads hold"
)]

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::signal::unix::{SignalKind, signal};

static STATE: Mutex<State> = Mutex::new(State { runs: BTreeSet::new(), watched: false, interrupted: false });

struct State {
    runs: BTreeSet<String>,
    watched: bool,
    interrupted: bool,
}

/// From now on signals remove this run.
pub(super) fn register(run: &str) -> anyhow::Result<()> {
    let mut state = undisturbed();
    if !state.watched {
        watch()?;
        state.watched = true;
    }
    state.runs.insert(run.to_owned());
    Ok(())
}

/// Its owner has removed it.
pub(super) fn unregister(run: &str) {
    undisturbed().runs.remove(run);
}

/// The state; never returns once the process was told to end.
fn undisturbed() -> MutexGuard<'static, State> {
    let state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    if state.interrupted {
        drop(state);
        loop {
            std::thread::park();
        }
    }
    state
}

fn watch() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let inside = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    drop(inside);
    std::thread::spawn(move || {
        let kind = runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => SignalKind::interrupt(),
                _ = terminate.recv() => SignalKind::terminate(),
                _ = hang_up.recv() => SignalKind::hangup(),
            }
        });
        let runs = {
            let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
            state.interrupted = true;
            std::mem::take(&mut state.runs)
        };
        crate::netns::make_no_more();
        for run in runs {
            eprintln!("removing lab {run}");
            super::remove_while_it_runs(&run);
        }
        // SAFETY: takes an integer and does not return. The code is that of a program ended by the signal.
        unsafe { libc::_exit(128 + kind.as_raw_value()) }
    });
    Ok(())
}
