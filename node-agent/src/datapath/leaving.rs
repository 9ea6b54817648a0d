//! Letting pods go: those of this agent, those that an earlier one captured, and those that it only began with.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::pod::{FILTERS, Failed, Pod, step};
use super::{Datapath, PodError, clsact, netns};

impl Datapath {
    /// The pods that an earlier agent began to prepare and did not capture: nothing of their traffic is changed, and
    /// rules, routes or settings may be left in their network namespaces. Each wants `clear`. What another version
    /// captures is not among them.
    pub fn unfinished(&self) -> Vec<String> {
        let unfinished =
            |(uid, pod): &(&String, &Pod)| !pod.captured() && pod.netns.is_none() && !self.versions.has(uid);
        self.pods.iter().filter(unfinished).map(|(uid, _)| uid.clone()).collect()
    }

    /// Lets a pod go whose network namespace this is; none: no process of it is left. Of a pod that was not prepared
    /// since `open` only this can restore what is inside, be it unfinished or captured.
    ///
    /// # Errors
    /// As of `leave`.
    pub fn clear(&mut self, uid: &str, netns: Option<OwnedFd>) -> Result<(), PodError> {
        // Without a process they are gone with their network namespace.
        let theirs = netns.as_ref().map_or(Ok(()), |netns| self.release_filters(uid, netns));
        theirs.map_err(|failed| failed.of(uid))?;
        if let Some(pod) = self.pods.get_mut(uid).filter(|pod| pod.netns.is_none()) {
            let cookie = pod.record.netns_cookie;
            let same = |netns: &OwnedFd| netns::has_cookie(netns.as_fd(), cookie);
            pod.netns = netns.filter(same);
            pod.gone = pod.netns.is_none();
        }
        self.let_go(uid)
    }

    /// Takes the filters off with which another version guards a pod.
    ///
    /// # Errors
    /// As of RTM_DELTFILTER.
    pub(super) fn release_filters(&self, uid: &str, netns: &OwnedFd) -> Result<(), Failed> {
        if !self.versions.has_filters(uid) {
            return Ok(());
        }
        let pinned = self.versions.filters(uid);
        step(FILTERS, netns::within(netns.as_fd(), || clsact::detach_all(&pinned)))
    }

    /// Switches capture off and restores what was there; works for a pod whose network namespace is gone, and does
    /// nothing for an unknown one. The proxy must have closed the pod's connections: they lose their routes.
    ///
    /// # Errors
    /// When something of the pod could not be removed. Where that is a filter of the guard, as of a pod that was not
    /// prepared since `open`, the pod stays captured (`surviving`), else it is captured no more.
    pub fn leave(&mut self, uid: &str) -> Result<(), PodError> {
        if self.versions.has_filters(uid) {
            let unknown = || Err(io::Error::other("its network namespace is not known"));
            let pinned = self.versions.filters(uid);
            let off = self.pods.get(uid).map_or_else(unknown, |pod| pod.detach_filters(&pinned, || false));
            step(FILTERS, off).map_err(|failed| failed.of(uid))?;
        }
        self.let_go(uid)
    }

    fn let_go(&mut self, uid: &str) -> Result<(), PodError> {
        let Some(mut pod) = self.pods.remove(uid) else {
            let others = step("take it from another version", self.versions.release(uid));
            return others.map_err(|failed| failed.of(uid));
        };
        let released = match pod.release(&self.pins, &mut self.maps, self.config.numbers) {
            Err(failed) if failed.step == FILTERS => {
                self.pods.insert(uid.to_owned(), pod);
                return Err(failed.of(uid));
            }
            released => released,
        };
        let others = step("take it from another version", self.versions.release(uid));
        self.steers.forget(pod.slot);
        // Those whose pins are gone.
        self.held.detach(&self.pins.pod(uid));
        let dismantled = pod.dismantle(&self.config, &mut self.maps);
        released.and(others).and(dismantled).map_err(|failed| failed.of(uid))
    }
}
