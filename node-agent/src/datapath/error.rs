//! What can be wrong with the datapath, and with one pod of it.

use std::io;
use std::path::PathBuf;

/// Why the datapath cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The agent was built without `cargo xtask ebpf`.
    #[error("this agent was built without its eBPF programs; run `cargo xtask ebpf` and build it again")]
    NoObject,
    /// The embedded object lacks a program.
    #[error(
        "the embedded eBPF object has no program {name}; run `cargo xtask ebpf` and build the agent again"
    )]
    NoProgram {
        /// Its name.
        name: &'static str,
    },
    /// The embedded object lacks a map.
    #[error("the embedded eBPF object has no map {name}; run `cargo xtask ebpf` and build the agent again")]
    NoMap {
        /// Its name.
        name: &'static str,
    },
    /// The object could not be parsed, or a map not made.
    #[error("cannot load the eBPF object (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are needed)")]
    Object(#[source] Box<aya::EbpfError>),
    /// A program was refused; the source has the verifier's log.
    #[error("the kernel refused the eBPF program {name}")]
    Program {
        /// Its name.
        name: &'static str,
        /// What the verifier said.
        source: Box<aya::programs::ProgramError>,
    },
    /// A pinned map has another layout.
    #[error("the pinned map {name} is not of this version; was something else pinned there?")]
    Map {
        /// Its name.
        name: &'static str,
        /// What differs.
        source: Box<aya::maps::MapError>,
    },
    /// A pin could not be made or opened.
    #[error("cannot pin {name}")]
    Pin {
        /// The map, program or link.
        name: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel is older than 5.14.
    #[error("cannot tell the node's network namespace from the pods'")]
    Cookie(#[source] io::Error),
    /// There are no threads left.
    #[error("cannot start the thread that loads programs")]
    Thread(#[source] io::Error),
    /// The log of a debug build of the programs cannot be read.
    #[error("cannot read what the eBPF programs log")]
    Log(#[source] io::Error),
    /// bpffs is not there.
    #[error("{path} cannot hold pins; mount one with `mount -t bpf bpf {path}` or set AMBIT_BPFFS")]
    Bpffs {
        /// Where it should be.
        path: PathBuf,
        /// What is there.
        source: io::Error,
    },
    /// There is no cgroup of version 2.
    #[error("no cgroup2 mount in {mountinfo}; mount one or set AMBIT_CGROUP_ROOT")]
    NoCgroup2 {
        /// Where it was looked for.
        mountinfo: PathBuf,
    },
    /// The cgroup cannot be opened or attached to.
    #[error("cannot capture connections in the cgroup {path}")]
    Cgroup {
        /// The cgroup.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// What an earlier agent left cannot be read or updated.
    #[error("cannot take over what an earlier agent pinned in {path}")]
    TakeOver {
        /// The bpf file system.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why a pod could not be prepared, captured or let go.
#[derive(Debug, thiserror::Error)]
#[error("pod {uid}: cannot {step}")]
pub struct PodError {
    /// The pod.
    pub uid: String,
    /// What was being done, for example "attach the guard".
    pub step: &'static str,
    /// What the kernel answered.
    pub source: io::Error,
}
