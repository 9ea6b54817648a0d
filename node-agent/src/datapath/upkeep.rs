//! What a captured pod needs later on: a guard on interfaces that were not there when it was captured, and the flag on
//! connections whose handshake was under way then.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tracing::{debug, warn};

use super::guards::Guards;
use super::hook::Chosen;
use super::pod::{Failed, Pod, step};
use super::{Datapath, maps, netns, older};

/// How soon a new interface is noticed. What is captured is bound to lo and does not leave by it in the meantime.
const IDLE: Duration = Duration::from_secs(1);
/// A look at a pod's interfaces that takes longer is followed by a rest that is so many times as long: others wait for it.
const LONG: Duration = Duration::from_millis(100);
const SHARE: u32 = 2;
/// While handshakes are under way.
const BUSY: Duration = Duration::from_millis(20);

/// Hears of new interfaces in a network namespace, and of changed filters where they are what guards it: others can take
/// them off.
#[derive(Debug)]
pub(super) struct Watch {
    socket: OwnedFd,
}

impl Watch {
    /// In the calling thread's network namespace, from now on.
    ///
    /// # Errors
    /// When netlink is not there.
    pub(super) fn open(hook: Chosen) -> io::Result<Self> {
        const RTMGRP_LINK: u32 = 1;
        const RTMGRP_TC: u32 = 8;
        let groups = if hook == Chosen::Clsact { RTMGRP_LINK | RTMGRP_TC } else { RTMGRP_LINK };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Self { socket })
    }

    /// Whether anything came, went or changed since the last call.
    fn changed(&self) -> bool {
        let mut message = [0; 8192];
        let mut changed = false;
        // Who changes them all the time is heard again at the next call.
        for _ in 0..MESSAGES {
            match recv(self.socket.as_raw_fd(), &mut message, MsgFlags::empty()) {
                Ok(_) | Err(Errno::EINTR) => changed = true,
                // More than the socket's buffer holds: look at all of them.
                Err(Errno::ENOBUFS) => changed = true,
                Err(_) => return changed,
            }
        }
        changed
    }
}

/// Messages that are taken at a time.
const MESSAGES: usize = 1024;

/// What is left to do for a pod.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// Its interfaces may have changed.
    pub watch: Option<Watch>,
    /// A guard could not be attached.
    pub unguarded: bool,
    /// Its interfaces are left alone until then: they could not be guarded, or took long.
    pub rest: Option<Instant>,
    /// Handshakes were under way; until then they are looked for.
    pub handshakes: Option<Instant>,
}

impl Datapath {
    /// Does what has become necessary for captured pods without anybody asking. Returns how soon to call it again.
    pub fn upkeep(&mut self) -> Duration {
        let mut next = IDLE;
        // Without a hook nothing can be put back: what an earlier agent captured keeps what it has.
        let Ok(hook) = self.hook else { return next };
        for (uid, pod) in self.pods.iter_mut().filter(|(_, pod)| pod.captured()) {
            let directory = self.pins.pod(uid);
            let guards = Guards::of(&self.pins, &self.programs, hook, &self.node);
            let result = match pod.upkeep(&guards) {
                Ok(true) => step("hold its pins", self.held.refresh(&directory)),
                other => other.map(drop),
            };
            if let Err(failed) = result {
                warn!(pod = uid, step = failed.step, error = %failed.source, "upkeep failed");
            }
            if pod.pending.handshakes.is_some() {
                next = BUSY;
            }
        }
        next
    }
}

impl Pod {
    /// Whether its pins may be others now.
    fn upkeep(&mut self, guards: &Guards<'_>) -> Result<bool, Failed> {
        let now = Instant::now();
        let rests = self.pending.rest.is_some_and(|until| now < until);
        let changed =
            !rests && (self.pending.watch.as_ref().is_some_and(Watch::changed) || self.pending.unguarded);
        if changed {
            debug!(pod = maps::uid(&self.record), "interfaces changed");
            let guarded = self.guard(guards);
            let took = now.elapsed();
            let rest = if guarded.is_err() { IDLE } else { Duration::ZERO };
            let rest = if took > LONG { rest.max(took * SHARE) } else { rest };
            self.pending.rest = Some(now + took + rest);
            guarded?;
        }
        let Some(until) = self.pending.handshakes else { return Ok(changed) };
        let netns = step("enter its network namespace", self.netns())?;
        let look = || older::look_again(guards.programs);
        let under_way = step("flag its older connections", netns::within(netns.as_fd(), look))?;
        if !under_way || Instant::now() >= until {
            self.pending.handshakes = None;
        }
        Ok(changed)
    }
}
