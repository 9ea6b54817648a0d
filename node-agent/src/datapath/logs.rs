//! What debug builds of the kernel programs log (`cargo xtask ebpf --debug`), brought into the agent's log.

use std::io;
use std::os::fd::AsFd;

use aya::Ebpf;
use aya_log::EbpfLogger;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The map that aya's log macros write to.
const MAP: &str = "AYA_LOGS";

/// Starts a thread that forwards the programs' log for as long as the agent runs; nothing for release builds.
///
/// # Errors
/// When the log cannot be read or the process can have no more threads.
pub(super) fn forward(object: &mut Ebpf) -> io::Result<()> {
    if object.map(MAP).is_none() {
        return Ok(());
    }
    let mut logger = EbpfLogger::init(object).map_err(io::Error::other)?;
    let thread = std::thread::Builder::new().name("ebpf-log".to_owned());
    thread
        .spawn(move || {
            while readable(&logger) {
                logger.flush();
            }
        })
        .map(drop)
}

fn readable(log: &impl AsFd) -> bool {
    let mut wanted = [PollFd::new(log.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut wanted, PollTimeout::NONE), Ok(_) | Err(nix::Error::EINTR))
}
