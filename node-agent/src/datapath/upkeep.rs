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
/// After so long whoever waits for the datapath has a turn before the next look.
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
    /// When they were looked at last.
    looked: Option<Instant>,
    /// Handshakes were under way; until then they are looked for.
    pub handshakes: Option<Instant>,
}

impl Datapath {
    /// Does what has become necessary for captured pods without anybody asking. Returns how soon to call it again: at
    /// once where whoever waits should have a turn first.
    pub fn upkeep(&mut self) -> Duration {
        // Without a hook nothing can be put back: what an earlier agent captured keeps what it has.
        let Ok(hook) = self.hook else { return IDLE };
        let guards = Guards::of(&self.pins, &self.programs, hook, &self.node);
        let mut handshakes = false;
        for (uid, pod) in self.pods.iter_mut().filter(|(_, pod)| pod.captured()) {
            tell(uid, pod.flag_handshakes(&guards));
            handshakes |= pod.pending.handshakes.is_some();
        }
        let pods = self.pods.iter_mut().filter(|(_, pod)| pod.captured());
        let all = in_turn(pods.map(|pod| (pod.1.pending.looked, pod)).collect(), |(uid, pod)| {
            let now = Instant::now();
            if !pod.pending.changed(now) {
                return Duration::ZERO;
            }
            let guarded = pod.look(&guards, now);
            // Also of what could not be guarded some may be pinned, and some gone.
            let held = step("hold its pins", self.held.refresh(&self.pins.pod(uid)));
            tell(uid, guarded.and(held));
            now.elapsed()
        });
        match (all, handshakes) {
            (false, _) => Duration::ZERO,
            (true, true) => BUSY,
            (true, false) => IDLE,
        }
    }
}

/// Looks at one after another, those first that were looked at longest ago, until that has taken long. Whether it came to
/// the last one; `look` says how long each took.
fn in_turn<T>(mut all: Vec<(Option<Instant>, T)>, mut look: impl FnMut(T) -> Duration) -> bool {
    all.sort_by_key(|(looked, _)| *looked);
    let mut spent = Duration::ZERO;
    for (_, one) in all {
        if spent > LONG {
            return false;
        }
        spent += look(one);
    }
    true
}

fn tell(uid: &str, result: Result<(), Failed>) {
    if let Err(failed) = result {
        warn!(pod = uid, step = failed.step, error = %failed.source, "upkeep failed");
    }
}

impl Pending {
    /// Whether the pod's interfaces are to be looked at; what was heard of them is taken for known then.
    fn changed(&self, now: Instant) -> bool {
        let rests = self.rest.is_some_and(|until| now < until);
        !rests && (self.watch.as_ref().is_some_and(Watch::changed) || self.unguarded)
    }
}

impl Pod {
    /// Looks at its interfaces, and has them guarded.
    fn look(&mut self, guards: &Guards<'_>, now: Instant) -> Result<(), Failed> {
        debug!(pod = maps::uid(&self.record), "interfaces changed");
        let guarded = self.guard(guards);
        let took = now.elapsed();
        let rest = if guarded.is_err() { IDLE } else { Duration::ZERO };
        let rest = if took > LONG { rest.max(took * SHARE) } else { rest };
        (self.pending.looked, self.pending.rest) = (Some(now), Some(now + took + rest));
        guarded
    }

    /// Flags connections whose handshakes were under way.
    fn flag_handshakes(&mut self, guards: &Guards<'_>) -> Result<(), Failed> {
        let Some(until) = self.pending.handshakes else { return Ok(()) };
        let netns = step("enter its network namespace", self.netns())?;
        let look = || older::look_again(guards.programs);
        let under_way = step("flag its older connections", netns::within(netns.as_fd(), look))?;
        if !under_way || Instant::now() >= until {
            self.pending.handshakes = None;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each call looks at one of those that take long, in turn, and whoever is quiet is looked at as soon as it is not.
    #[test]
    fn whoever_takes_long_takes_turns() {
        const PODS: usize = 4;
        let (begin, mut clock) = (Instant::now(), Duration::ZERO);
        let mut looked = [None; PODS];
        let mut call = |takes: [Duration; PODS]| {
            let mut met = Vec::new();
            let all = in_turn(looked.into_iter().zip(0..PODS).collect(), |pod: usize| {
                if takes[pod].is_zero() {
                    return takes[pod];
                }
                (looked[pod], clock) = (Some(begin + clock), clock + takes[pod]);
                met.push(pod);
                takes[pod]
            });
            (met, all)
        };
        let (long, short, none) = (LONG * 3, LONG / 10, Duration::ZERO);
        let flapping = [long, long, long, none];
        let calls: Vec<_> = (0..4).map(|_| call(flapping)).collect();
        assert_eq!(calls, [(vec![0], false), (vec![1], false), (vec![2], false), (vec![0], false)]);
        assert_eq!(call([long, long, long, short]), (vec![3, 1], false), "the quiet one waited");
        assert_eq!(call([short; PODS]), (vec![2, 0, 3, 1], true));
        assert_eq!(call([none; PODS]), (vec![], true));
        assert_eq!(call([LONG / 2 + short; PODS]).0.len(), 2, "many that are not long by themselves");
    }
}
