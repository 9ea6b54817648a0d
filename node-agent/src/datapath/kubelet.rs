//! Finds the cgroup of the node's kubelet: connections of its processes to pods are probes and hooks.
//!
//! The kubelet is who listens on the kubelet's port and is no pod; not who is called so, since names differ (k3s,
//! kubelite) and can be had by anybody. **Invariant:** where pods are below the kubelet's cgroup they are told apart, or
//! there is no answer: a pod on the node's network must not pass for the kubelet.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fmt, fs};

use super::cgroup;
use crate::netns_of_pod;

/// Where the kubelet is.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// Cgroup (version 2) of the kubelet, whose connections to pods are its probes; by default that of the process that
    /// listens on the kubelet's port. Everything in it that is no pod counts as the kubelet
    #[arg(long = "kubelet-cgroup", env = "AMBIT_KUBELET_CGROUP")]
    pub cgroup: Option<PathBuf>,
    /// The kubelet's port, by which it is found
    #[arg(long = "kubelet-port", env = "AMBIT_KUBELET_PORT", default_value_t = 10250)]
    pub port: u16,
}

/// The kubelet's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kubelet {
    /// Its cgroup's directory.
    pub cgroup: PathBuf,
    /// The pods' cgroup, where that is below.
    pub except: Option<PathBuf>,
    /// What speaks for it.
    pub evidence: Evidence,
}

/// How the kubelet was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    /// The setting says so.
    Setting,
    /// This process listens on the kubelet's port.
    Listens {
        /// Its number.
        pid: u32,
        /// The port.
        port: u16,
    },
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Setting => f.write_str("as AMBIT_KUBELET_CGROUP says"),
            Self::Listens { pid, port } => write!(f, "process {pid} listens on port {port}"),
        }
    }
}

/// Why the kubelet was not found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotFound {
    /// The setting is wrong, or the kubelet is restarting.
    #[error("there is no cgroup {}", .0.display())]
    NoCgroup(PathBuf),
    /// Nobody has the port.
    #[error("nobody listens on the kubelet's port {0}")]
    NotListening(u16),
    /// Somebody has, and is hidden, or a pod.
    #[error("no process but pods' can be seen to listen on the kubelet's port {0}")]
    NoProcess(u16),
    /// It is in a part of the hierarchy that this process has no mount of.
    #[error("the kubelet's cgroup {0} is not below a mounted cgroup2")]
    NotMounted(String),
    /// Pods would pass for it.
    #[error("pods are below the kubelet's cgroup {} and cannot be told apart", .0.display())]
    Pods(PathBuf),
}

/// Looks for it: `pods` is the pods' cgroup, where there is one. Without the setting this reads all of `/proc`:
/// blocking, some milliseconds on a busy node.
///
/// # Errors
/// When it is not there, or cannot be told from pods.
pub(super) fn find(
    config: &Config,
    proc: &Path,
    mountinfo: &str,
    pods: Option<&Path>,
) -> Result<Kubelet, NotFound> {
    if let Some(cgroup) = &config.cgroup {
        return match cgroup.is_dir() {
            true => Ok(Kubelet {
                cgroup: cgroup.clone(),
                except: below(pods, cgroup),
                evidence: Evidence::Setting,
            }),
            false => Err(NotFound::NoCgroup(cgroup.clone())),
        };
    }
    let sockets = listening(proc, config.port);
    if sockets.is_empty() {
        return Err(NotFound::NotListening(config.port));
    }
    let processes = processes(proc);
    let owner = processes.iter().find(|process| !process.of_pod && has_socket(proc, process.pid, &sockets));
    let owner = owner.ok_or(NotFound::NoProcess(config.port))?;
    let cgroup = cgroup::directory(mountinfo, &owner.cgroup, Path::is_dir)
        .ok_or_else(|| NotFound::NotMounted(owner.cgroup.clone()))?;
    let except = below(pods, &cgroup);
    let pod_inside = |process: &Process| process.of_pod && inside(&process.cgroup, &owner.cgroup);
    if except.is_none() && processes.iter().any(pod_inside) {
        return Err(NotFound::Pods(cgroup));
    }
    Ok(Kubelet { cgroup, except, evidence: Evidence::Listens { pid: owner.pid, port: config.port } })
}

fn below(pods: Option<&Path>, cgroup: &Path) -> Option<PathBuf> {
    pods.filter(|pods| pods.starts_with(cgroup)).map(Path::to_owned)
}

struct Process {
    pid: u32,
    /// Path in version 2, as seen from this process's cgroup namespace.
    cgroup: String,
    of_pod: bool,
}

fn processes(proc: &Path) -> Vec<Process> {
    let pids = fs::read_dir(proc).into_iter().flatten().flatten();
    pids.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let text = fs::read_to_string(entry.path().join("cgroup")).ok()?;
        let cgroup = text.lines().find_map(|line| line.strip_prefix("0::"))?.to_owned();
        Some(Process { pid, cgroup, of_pod: netns_of_pod::membership(&text).is_some() })
    })
    .collect()
}

/// Inodes of the sockets that listen on a port of the node.
fn listening(proc: &Path, port: u16) -> BTreeSet<u64> {
    let tables = ["tcp", "tcp6"].map(|name| fs::read_to_string(proc.join("thread-self/net").join(name)));
    tables.iter().flatten().flat_map(|table| listeners(table, port)).collect()
}

/// From a table as in proc_pid_net(5): `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ...`.
fn listeners(table: &str, port: u16) -> impl Iterator<Item = u64> + '_ {
    const LISTEN: &str = "0A";
    table.lines().skip(1).filter_map(move |line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (_, local) = fields.get(1)?.rsplit_once(':')?;
        let ours = u16::from_str_radix(local, 16) == Ok(port) && *fields.get(3)? == LISTEN;
        ours.then(|| fields.get(9)?.parse().ok()).flatten()
    })
}

fn has_socket(proc: &Path, pid: u32, sockets: &BTreeSet<u64>) -> bool {
    let descriptors = fs::read_dir(proc.join(pid.to_string()).join("fd")).into_iter().flatten().flatten();
    let inode =
        |target: PathBuf| target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok();
    descriptors
        .filter_map(|descriptor| fs::read_link(descriptor.path()).ok().and_then(inode))
        .any(|inode| sockets.contains(&inode))
}

/// Whether one cgroup is in another or the same, both as this process's cgroup namespace shows them: what is outside
/// of it begins with as many `..` as lead to the nearest common ancestor.
fn inside(cgroup: &str, other: &str) -> bool {
    let split = |path: &str| {
        let segments = path.split('/').filter(|segment| !segment.is_empty());
        let (up, down): (Vec<_>, Vec<_>) = segments.map(str::to_owned).partition(|segment| segment == "..");
        (up.len(), down)
    };
    let ((up, down), (other_up, other_down)) = (split(cgroup), split(other));
    if other_down.is_empty() { up <= other_up } else { up == other_up && down.starts_with(&other_down) }
}

#[cfg(test)]
mod tests;
