//! Flags a pod's connections that are older than its enrolment, so that the guard lets them live.
//!
//! A socket iterator sets the flag on the sockets themselves. A table of address pairs would have to be cleaned when
//! they close, and would let a later connection with the same pair pass.

use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::bpf;

/// Handshakes take a round trip; this many looks, that far apart, are the patience for those under way.
const LOOKS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(2);

/// Runs the iterator in the calling thread's network namespace until no handshake is under way: a connection whose
/// handshake began at the app's listener would be cut by the guard. Gives up silently, since a busy proxy has
/// handshakes all the time, and its own are flagged by inheritance.
///
/// # Errors
/// When the iterator cannot be run.
pub(super) fn flag(program: BorrowedFd<'_>) -> io::Result<()> {
    for _ in 0..LOOKS {
        let mut pending = Vec::new();
        bpf::iterate(program)?.read_to_end(&mut pending)?;
        if pending.is_empty() {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
