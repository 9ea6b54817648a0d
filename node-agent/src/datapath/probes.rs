//! Keeps the program that records the kubelet's connections where the kubelet is.
//!
//! A service manager makes a new cgroup when it restarts the kubelet, and the program goes with the old one, so this
//! is looked at again and again. Without it probes meet the proxy as other plaintext does: no reason to end the agent.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use mesh_ebpf_abi::program;
use tracing::{info, warn};

use super::bpf::{Hook, Target};
use super::kubelet::{self, Kubelet};
use super::load::Programs;
use super::pins::Pins;
use super::{Config, attach, cgroup};

/// What is known of the kubelet.
#[derive(Debug, Default)]
pub(super) struct Probes {
    kubelet: Option<Kubelet>,
    /// The last thing told: no message twice.
    told: Option<String>,
}

impl Probes {
    /// Makes sure that the kubelet's connections are recorded; cheap where they are. `pods` is the pods' cgroup, or the
    /// root of all where that is not known. Whether a pin was made or removed.
    pub(super) fn follow(&mut self, config: &Config, pins: &Pins, programs: &Programs, pods: &Path) -> bool {
        let followed = self.place(config, pods).and_then(|kubelet| {
            let attached = attach(pins, programs, &kubelet).map_err(|error| {
                format!("cannot attach to the kubelet's cgroup {}: {error}", kubelet.cgroup.display())
            })?;
            Ok((kubelet, attached))
        });
        match followed {
            Ok((kubelet, attached)) => {
                self.found(kubelet);
                attached
            }
            Err(error) => {
                self.lost(error);
                false
            }
        }
    }

    fn place(&self, config: &Config, pods: &Path) -> Result<Kubelet, String> {
        if let Some(known) = self.kubelet.as_ref().filter(|known| known.cgroup.is_dir()) {
            return Ok(known.clone());
        }
        let mountinfo = fs::read_to_string(config.proc.join("self/mountinfo")).unwrap_or_default();
        let pods = (!cgroup::is_mount(&mountinfo, pods)).then_some(pods);
        kubelet::find(&config.kubelet, &config.proc, &mountinfo, pods).map_err(|error| error.to_string())
    }

    fn found(&mut self, kubelet: Kubelet) {
        if self.kubelet.as_ref() != Some(&kubelet) {
            let except = kubelet.except.as_ref().map_or("nothing".into(), |except| except.to_string_lossy());
            let (cgroup, evidence) = (kubelet.cgroup.display(), kubelet.evidence);
            info!(%cgroup, except = %except, %evidence, "the kubelet's connections reach its probes' ports directly");
            self.kubelet = Some(kubelet);
        }
        self.told = None;
    }

    fn lost(&mut self, error: String) {
        self.kubelet = None;
        if self.told.as_ref() != Some(&error) {
            warn!(
                "probes of the kubelet meet the proxy, since {error}; AMBIT_KUBELET_CGROUP and AMBIT_KUBELET_PORT say where the kubelet is"
            );
            self.told = Some(error);
        }
    }
}

/// The pods' first: without their program, theirs would be the kubelet's connections. Whether a pin was made or removed.
fn attach(pins: &Pins, programs: &Programs, kubelet: &Kubelet) -> io::Result<bool> {
    let bystanders = pins.link(program::BYSTANDERS);
    let ensure = |path: &Path, program, cgroup: &PathBuf| {
        let cgroup = File::open(cgroup)?;
        attach::ensure(path, program, Target::Fd(cgroup.as_fd()), Hook::SockOps)
    };
    let told_apart = match &kubelet.except {
        Some(pods) => ensure(&bystanders, programs.bystanders.as_fd(), pods)?,
        // Also a change: what is held open as pinned must not be pinned again.
        None if bystanders.exists() => attach::detach(&bystanders).map(|()| true)?,
        None => false,
    };
    let recorded = ensure(&pins.link(program::PROBES), programs.probes.as_fd(), &kubelet.cgroup)?;
    Ok(told_apart || recorded)
}
