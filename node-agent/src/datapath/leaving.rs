//! Letting pods go: those of this agent, those that an earlier one captured, and those that it only began with.

use std::os::fd::{AsFd, OwnedFd};

use super::pod::{Failed, step};
use super::{Datapath, PodError, clsact, netns};

impl Datapath {
    /// The pods that an earlier agent began to prepare and did not capture: nothing of their traffic is changed, and
    /// rules, routes or settings may be left in their network namespaces. Each wants `clear`.
    pub fn unfinished(&self) -> Vec<String> {
        let unfinished = self.pods.iter().filter(|(_, pod)| !pod.captured() && pod.netns.is_none());
        unfinished.map(|(uid, _)| uid.clone()).collect()
    }

    /// Lets a pod go whose network namespace this is; none: no process of it is left. Of a pod that was not prepared
    /// since `open` only this can restore what is inside, be it unfinished or captured.
    ///
    /// # Errors
    /// When something of it could not be removed.
    pub fn clear(&mut self, uid: &str, netns: Option<OwnedFd>) -> Result<(), PodError> {
        let filters = self.release_filters(uid, netns.as_ref());
        if let Some(pod) = self.pods.get_mut(uid).filter(|pod| pod.netns.is_none()) {
            let cookie = pod.record.netns_cookie;
            let same =
                |netns: &OwnedFd| netns::within(netns.as_fd(), netns::cookie).is_ok_and(|now| now == cookie);
            pod.netns = netns.filter(same);
            pod.gone = pod.netns.is_none();
        }
        let left = self.leave(uid);
        filters.map_err(|failed| failed.of(uid)).and(left)
    }

    /// Takes the filters off with which another version guards a pod.
    ///
    /// # Errors
    /// As of RTM_DELTFILTER.
    pub(super) fn release_filters(&self, uid: &str, netns: Option<&OwnedFd>) -> Result<(), Failed> {
        match netns {
            Some(netns) if self.versions.has_filters(uid) => {
                step("remove the guard's filters", netns::within(netns.as_fd(), clsact::detach_all))
            }
            _ => Ok(()),
        }
    }

    /// Switches capture off and restores what was there; works for a pod whose network namespace is gone, and does
    /// nothing for an unknown one. The proxy must have closed the pod's connections: they lose their routes.
    ///
    /// # Errors
    /// When something of the pod could not be removed; it is then no longer captured all the same.
    pub fn leave(&mut self, uid: &str) -> Result<(), PodError> {
        let others = step("take it from another version", self.versions.release(uid));
        let Some(mut pod) = self.pods.remove(uid) else { return others.map_err(|failed| failed.of(uid)) };
        let released = others.and(pod.release(&self.pins, &mut self.maps, self.config.numbers));
        // Those whose pins are gone.
        self.held.detach(&self.pins.pod(uid));
        let dismantled = pod.dismantle(&self.config, &mut self.maps);
        released.and(dismantled).map_err(|failed| failed.of(uid))
    }
}
