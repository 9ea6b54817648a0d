//! Work inside a pod's network namespace.
//!
//! **Invariant:** a namespace belongs to a thread, so the work gets a thread of its own that ends with it; no other
//! thread of the agent ever leaves the host's namespace.
#![allow(unsafe_code, reason = "SO_NETNS_COOKIE has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{fstat, stat};
use socket2::{Domain, Socket, Type};

/// The calling thread's.
const OWN: &str = "/proc/thread-self/ns/net";

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

/// The same where the network namespace may be the calling thread's own, as the node's is the agent's: there `work` needs
/// no thread.
///
/// # Errors
/// As there, and when there is no /proc.
pub(super) fn here_or_within<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    if is_own(netns)? { work() } else { within(netns, work) }
}

/// Whether the calling thread is in this network namespace. The descriptor holds it, so no other one has its inode.
fn is_own(netns: BorrowedFd<'_>) -> io::Result<bool> {
    let netns = fstat(netns)?;
    let own = stat(OWN)?;
    Ok((netns.st_dev, netns.st_ino) == (own.st_dev, own.st_ino))
}

/// The calling thread's network namespace.
///
/// # Errors
/// When there is no /proc.
pub(super) fn own() -> io::Result<OwnedFd> {
    Ok(std::fs::File::open(OWN)?.into())
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
    fn the_own_one_is_worked_in_by_the_calling_thread() {
        let own = own().unwrap();
        let thread = || Ok(std::thread::current().id());
        assert_eq!(here_or_within(own.as_fd(), thread).unwrap(), std::thread::current().id());
        // Of the same file system, and no network namespace.
        let other = std::fs::File::open("/proc/thread-self/ns/mnt").unwrap();
        assert!(!is_own(other.as_fd()).unwrap());
        assert!(here_or_within(other.as_fd(), thread).is_err());
    }

    #[test]
    fn the_cookie_is_the_namespaces() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        assert_eq!(cookie().unwrap(), cookie_of(&socket).unwrap());
        assert!(cookie_of(&std::fs::File::open("/dev/null").unwrap().as_fd()).is_err());
    }
}
