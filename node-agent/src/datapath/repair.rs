//! What is put back of a pod's capture beside what `prepare` and `capture` make again.

use std::io;
use std::os::fd::AsFd;

use mesh_ebpf_abi::program;

use super::hook::Chosen;
use super::{Datapath, PodError, PodSpec, attach, maps, netns, pod};

impl Datapath {
    /// A captured pod once more, to be prepared and captured again.
    ///
    /// # Errors
    /// When the process has no descriptors left, or does not know the pod.
    pub fn spec(&self, uid: &str) -> io::Result<PodSpec> {
        let pod = self.pods.get(uid).ok_or(io::ErrorKind::NotFound)?;
        Ok(PodSpec {
            uid: uid.to_owned(),
            netns: pod.netns()?,
            addresses: maps::ips(&pod.record),
            probe_ports: pod.probe_ports.clone(),
            dns: pod.dns,
        })
    }

    /// Has a captured pod's guard asked before programs of others that have come since.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn guard_again(&mut self, uid: &str) -> Result<(), PodError> {
        let hook = self.hook().map_err(|failed| failed.of(uid))?;
        let Some(pod) = self.pods.get(uid).filter(|_| hook == Chosen::Tcx) else { return Ok(()) };
        let directory = self.pins.pod(uid);
        let first = pod
            .netns()
            .and_then(|netns| netns::within(netns.as_fd(), || attach::first(&directory, &self.programs)))
            .and_then(|()| self.ends_first(&directory, &pod.ends));
        let held = first.and_then(|()| self.held.refresh(&directory));
        pod::step("put its guard first", held).map_err(|failed| failed.of(uid))
    }

    /// Puts the connect hooks back where somebody has taken them off.
    pub(super) fn connect(&mut self) -> io::Result<()> {
        if attach::connect(&self.pins, &self.programs, &self.root)? {
            let pins = [program::CONNECT4, program::CONNECT6].map(|name| self.pins.link(name));
            pins.iter().try_for_each(|pin| self.held.hold(pin))?;
        }
        Ok(())
    }
}
