//! Where the programs on a pod's interfaces are attached: tcx, or else clsact.
//!
//! **Invariant:** features are tried, never inferred from a version. Where neither can be had no pod is enrolled: without
//! its guard it would not be fail closed.

use std::io;
use std::os::fd::BorrowedFd;

use tracing::{info, warn};

use super::{bpf, clsact};

/// Which of them to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum GuardHook {
    /// tcx where the kernel has it, else clsact.
    #[default]
    Auto,
    /// tcx (Linux 6.6).
    Tcx,
    /// A clsact qdisc with filters of the kind bpf.
    Clsact,
}

/// The one that is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chosen {
    /// Links, pinned.
    Tcx,
    /// Filters, see [`clsact`].
    Clsact,
}

/// Tries what the setting allows with a program of the kind that is to be attached; else why no pod can be enrolled.
pub(super) fn choose(setting: GuardHook, program: BorrowedFd<'_>) -> Result<Chosen, String> {
    let chosen = first(setting, || bpf::probe_tcx(program), || clsact::probe(program));
    match &chosen {
        Ok(hook) => info!(?hook, "pods' interfaces are guarded"),
        Err(reason) => warn!("no pod can be enrolled: {reason}"),
    }
    chosen
}

fn first(
    setting: GuardHook,
    tcx: impl FnOnce() -> io::Result<()>,
    clsact: impl FnOnce() -> io::Result<()>,
) -> Result<Chosen, String> {
    let mut reasons = Vec::new();
    if setting != GuardHook::Clsact {
        match tcx() {
            Ok(()) => return Ok(Chosen::Tcx),
            Err(error) => reasons.push(format!("tcx (Linux 6.6): {error}")),
        }
    }
    if setting != GuardHook::Tcx {
        match clsact() {
            Ok(()) => return Ok(Chosen::Clsact),
            Err(error) => reasons.push(format!("clsact with bpf filters (CONFIG_NET_CLS_BPF): {error}")),
        }
    }
    Err(format!("the kernel cannot attach the egress guard by {}", reasons.join(", nor by ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lacks() -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }

    fn unasked() -> io::Result<()> {
        panic!("tried")
    }

    #[test]
    fn the_first_that_works() {
        assert_eq!(first(GuardHook::Auto, || Ok(()), unasked), Ok(Chosen::Tcx));
        assert_eq!(first(GuardHook::Auto, lacks, || Ok(())), Ok(Chosen::Clsact));
        assert_eq!(first(GuardHook::Tcx, || Ok(()), unasked), Ok(Chosen::Tcx));
        assert_eq!(first(GuardHook::Clsact, unasked, || Ok(())), Ok(Chosen::Clsact));
    }

    #[test]
    fn the_reasons_name_what_was_tried() {
        let named = |setting, tcx, clsact| {
            let reason = first(setting, lacks, lacks).unwrap_err();
            assert_eq!((reason.contains("tcx"), reason.contains("clsact")), (tcx, clsact), "{reason}");
        };
        named(GuardHook::Auto, true, true);
        named(GuardHook::Tcx, true, false);
        named(GuardHook::Clsact, false, true);
    }
}
