//! Descriptors of this process: the pods' connections may not have the last ones, which are for the agent's messages
//! (each pod comes with ten), for who asks for metrics, and for the processes' own files.
//!
//! **Invariant:** a connection for which there is none is reset at once; it neither waits nor costs more than that.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::addr::{ClientAddr, NextHop, Target};
use nix::sys::resource::{Resource, getrlimit};
use prometheus_client::metrics::counter::Counter;
use socket2::Socket;

use crate::sockets::{Datagrams, Sockets};

/// Kept back of all, at most: enough for some hundred pods at once. A quarter where there are few.
const KEPT_BACK: u64 = 4096;
/// How often it is told that there are too few.
const TOLD_EVERY: Duration = Duration::from_secs(30);

/// How many connections may have; clones are the same.
#[derive(Clone, Debug)]
pub struct Descriptors {
    /// The first that none may have. Numbers are given out lowest first (POSIX), so it says how many are open.
    end: RawFd,
    /// Connections that were reset for want of one.
    pub shed: Counter,
    told: Arc<Mutex<Option<(Instant, u64)>>>,
}

impl Descriptors {
    /// As many as this process may have now (RLIMIT_NOFILE), without those that are kept back.
    pub fn of_process() -> Self {
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((u64::MAX, u64::MAX));
        Self::up_to(limit - (limit / 4).min(KEPT_BACK))
    }

    /// As if there were no limit.
    pub fn without_limit() -> Self {
        Self::up_to(u64::MAX)
    }

    fn up_to(end: u64) -> Self {
        let end = RawFd::try_from(end).unwrap_or(RawFd::MAX);
        Self { end, shed: Counter::default(), told: Arc::default() }
    }

    /// Returns `socket` if a connection may have it; else counts, and tells now and then.
    ///
    /// # Errors
    /// The socket, if there are too few descriptors.
    pub fn admit<T: AsRawFd>(&self, socket: T) -> Result<T, T> {
        if socket.as_raw_fd() < self.end {
            return Ok(socket);
        }
        let shed = self.shed.inc() + 1;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|(at, _)| at.elapsed() >= TOLD_EVERY) {
            let before = told.map_or(0, |(_, before)| before);
            tracing::warn!(
                open = self.end,
                reset = shed - before,
                "out of descriptors: new connections are reset, open ones go on (raise the limit of open files)"
            );
            *told = Some((Instant::now(), shed));
        }
        Err(socket)
    }

    /// The same for a socket that the process has just made.
    fn made(&self, socket: Socket) -> io::Result<Socket> {
        self.admit(socket).map_err(|_| io::Error::from_raw_os_error(libc::EMFILE))
    }
}

/// A pod's sockets, as long as there are descriptors for them.
pub struct Limited {
    /// Makes them.
    pub sockets: Arc<dyn Sockets>,
    /// How many.
    pub descriptors: Descriptors,
}

impl Sockets for Limited {
    fn to_network(&self, from: Option<ClientAddr>, next_hop: NextHop) -> io::Result<Socket> {
        self.descriptors.made(self.sockets.to_network(from, next_hop)?)
    }

    fn to_application(&self, from: ClientAddr, target: Target) -> io::Result<Socket> {
        self.descriptors.made(self.sockets.to_application(from, target)?)
    }

    fn to_nameserver(&self, server: SocketAddr) -> io::Result<Socket> {
        self.descriptors.made(self.sockets.to_nameserver(server)?)
    }

    fn datagrams(&self, ip: IpAddr) -> io::Result<Box<dyn Datagrams>> {
        // Once for each pod, when it is added.
        self.sockets.datagrams(ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_back_goes_to_no_connection() {
        let descriptors = Descriptors::up_to(100);
        assert_eq!((descriptors.admit(99), descriptors.admit(100)), (Ok(99), Err(100)));
        assert_eq!(descriptors.clone().admit(5000), Err(5000));
        assert_eq!(descriptors.shed.get(), 2);
        assert_eq!(Descriptors::without_limit().admit(1 << 30), Ok(1 << 30));
    }
}
