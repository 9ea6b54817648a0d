//! Work inside a pod's network namespace.
//!
//! **Invariant:** a namespace belongs to a thread, so the work gets a thread of its own that ends with it; no other
//! thread of the agent ever leaves the host's namespace.
#![allow(unsafe_code, reason = "SO_NETNS_COOKIE has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

/// Runs `work` on a new thread inside the network namespace, and waits for it.
///
/// # Errors
/// When the namespace cannot be entered, and what `work` returns.
pub(super) fn within<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let inside = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            work()
        })?;
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The calling thread's network namespace.
///
/// # Errors
/// When there is no /proc.
pub(super) fn own() -> io::Result<OwnedFd> {
    Ok(std::fs::File::open("/proc/thread-self/ns/net")?.into())
}

/// Cookie of the calling thread's network namespace: unlike its inode, never used again.
///
/// # Errors
/// When no socket can be made, or the kernel is older than 5.14.
pub(super) fn cookie() -> io::Result<u64> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    cookie_of(&socket)
}

/// Whether a network namespace is the one with this cookie; not where that cannot be told.
pub fn has_cookie(netns: BorrowedFd<'_>, wanted: u64) -> bool {
    within(netns, cookie).is_ok_and(|found| found == wanted)
}

/// Cookie of the network namespace that a socket is in.
///
/// # Errors
/// As of getsockopt(SO_NETNS_COOKIE).
pub(super) fn cookie_of(socket: &impl AsRawFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_cookie_is_the_namespaces() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        assert_eq!(cookie().unwrap(), cookie_of(&socket).unwrap());
        assert!(cookie_of(&std::fs::File::open("/dev/null").unwrap().as_fd()).is_err());
    }
}
