//! Flags a pod's connections that are older than its enrolment, so that the guard lets them live.
//!
//! Socket iterators set the flag on the sockets themselves. A table of address pairs would have to be cleaned when
//! they close, and would let a later connection with the same pair pass.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::bpf;
use super::load::Programs;

/// How long handshakes that were under way at enrolment are looked after.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Most handshakes take less than this; what they send before they are flagged is lost in the guard, and sent again.
const LOOKS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(2);

/// Flags what there is in the calling thread's network namespace, and for a moment what comes of the handshakes that
/// are under way. Returns whether some still are: then [`look_again`]. Of a pod that is `taken_over` from another version
/// the proxy's tunnels are told from what the apps have.
///
/// # Errors
/// When the iterators cannot be run.
pub(super) fn flag(programs: &Programs, taken_over: bool) -> io::Result<bool> {
    let first = if taken_over { &programs.inherit } else { &programs.older };
    let mut pending = run(first.as_fd())?;
    for _ in 0..LOOKS {
        if !pending {
            break;
        }
        std::thread::sleep(PAUSE);
        pending = look_again(programs)?;
    }
    Ok(pending)
}

/// Flags the connections that have come of the handshakes that were under way at [`flag`]. Returns whether some still
/// are; those that began later do not count.
///
/// # Errors
/// When the iterator cannot be run.
pub(super) fn look_again(programs: &Programs) -> io::Result<bool> {
    run(programs.grown.as_fd())
}

fn run(program: BorrowedFd<'_>) -> io::Result<bool> {
    let mut pending = Vec::new();
    bpf::iterate(program)?.read_to_end(&mut pending)?;
    Ok(!pending.is_empty())
}
