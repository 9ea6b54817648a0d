//! One lab for all scenarios of the process, one scenario at a time; it is removed when the process ends.
#![allow(
    unsafe_code,
    reason = "statics are never dropped, and the test harness offers nothing to run at the end"
)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use mesh_tests::Lab;

use crate::fixture;

static LAB: Mutex<Option<Result<Lab, String>>> = Mutex::new(None);
static AT_EXIT: Once = Once::new();
/// Scenarios so far.
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// Then there is another lab: a node has 250 addresses for pods, and to one that is given again with another hardware
/// address its neighbours find no way for a while.
const OF_ONE_LAB: usize = 40;

/// Run a scenario in the shared lab, which has the mesh and the fixture. Its error fails the test, with the daemons'
/// last words.
pub(crate) fn scenario(work: impl FnOnce(&Lab) -> anyhow::Result<()>) {
    AT_EXIT.call_once(|| {
        // SAFETY: atexit(3) with a function that lives as long as the program.
        unsafe { libc::atexit(remove) };
    });
    // A scenario that failed says nothing about the next one.
    let mut lab = LAB.lock().unwrap_or_else(PoisonError::into_inner);
    if COUNT.fetch_add(1, Ordering::Relaxed) % OF_ONE_LAB == OF_ONE_LAB - 1 {
        *lab = None;
    }
    match lab.get_or_insert_with(|| start().map_err(|error| format!("{error:#}"))) {
        Err(error) => panic!("the lab does not start: {error}"),
        Ok(lab) => {
            if let Err(error) = work(lab) {
                // The story may be long: what went wrong is at its end as well.
                panic!("{error:#}\n{}\n{error:#}", lab.story("ambit-system"));
            }
        }
    }
}

fn start() -> anyhow::Result<Lab> {
    let lab = Lab::new().nodes(2).mesh().start()?;
    fixture::make(&lab).map_err(|error| error.context(lab.story("ambit-system")))?;
    Ok(lab)
}

extern "C" fn remove() {
    // On a thread of its own: this one's thread-local state may be gone already.
    let removed = std::thread::spawn(|| LAB.lock().unwrap_or_else(PoisonError::into_inner).take());
    drop(removed.join());
}
