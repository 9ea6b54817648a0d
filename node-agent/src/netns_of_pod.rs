//! Finds the network namespace of a running pod, through the cgroups of the node's processes.
//!
//! No container runtime is asked: containerd, CRI-O and cri-dockerd all put a pod's containers below a cgroup that
//! names the pod's UID, in one of two layouts (cgroupfs and systemd).
//!
//! **Invariant:** what is returned is not the host's namespace, and belonged to a process of that pod when it was
//! opened.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

/// An open network namespace.
#[derive(Debug)]
pub struct PodNetns {
    /// Open on it; keeps it alive.
    pub netns: OwnedFd,
    /// Its inode in nsfs: two with the same inode are the same namespace.
    pub inode: u64,
}

/// Why a pod's network namespace was not found.
#[derive(Debug, thiserror::Error)]
pub enum NotFound {
    /// The list of processes cannot be read.
    #[error("cannot read {}: {source}; the agent must see the host's processes (hostPID)", path.display())]
    Proc {
        /// What was read.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A process cannot be looked at, so nobody knows whether the pod runs.
    #[error("cannot look at {}: {source}", path.display())]
    Process {
        /// Its directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// No process is in a cgroup of this pod.
    #[error("no process of pod {uid} is running; it is starting, or has ended")]
    NoProcess {
        /// The pod's UID.
        uid: String,
    },
    /// All its processes are in the host's network namespace.
    #[error("pod {uid} has only processes in the host's network namespace: it is a hostNetwork pod")]
    HostNetwork {
        /// The pod's UID.
        uid: String,
    },
}

/// Finds the namespace of the pod with this UID: of those that its processes are in, the first that is `wanted`, or else
/// the first. Reads all of `/proc`: blocking, some milliseconds on a busy node.
///
/// # Errors
/// When no process of the pod is running, or all of them are in the host's namespace; and when that cannot be told.
pub fn find(proc: &Path, pod_uid: &str, wanted: impl Fn(&PodNetns) -> bool) -> Result<PodNetns, NotFound> {
    let hosts = host_inodes(proc)?;
    let mut candidates = Vec::new();
    for pid in processes(proc)? {
        candidates.extend(Candidate::open(proc, pid, pod_uid)?);
    }
    // The pause process is the pod's first. A container may make namespaces of its own (docker in a pod does), so
    // later processes, and those in cgroups below a container's, are asked last.
    candidates.sort_by_key(|candidate| (candidate.nested, candidate.started));
    let mut in_host = false;
    let mut others: Vec<PodNetns> = Vec::new();
    for candidate in candidates {
        match candidate.netns(pod_uid)? {
            Some(found) if hosts.contains(&found.inode) => in_host = true,
            Some(found) if others.iter().any(|other| other.inode == found.inode) => {}
            Some(found) if wanted(&found) => return Ok(found),
            Some(found) => others.push(found),
            None => {}
        }
    }
    let uid = pod_uid.to_owned();
    let nowhere = if in_host { NotFound::HostNetwork { uid } } else { NotFound::NoProcess { uid } };
    others.into_iter().next().ok_or(nowhere)
}

/// Which pod a process is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The pod's UID, with dashes.
    pub uid: String,
    /// It is in a cgroup that its container made, not in the container's own.
    pub nested: bool,
}

/// Reads the text of `/proc/<pid>/cgroup`: `<hierarchy>:<controllers>:<path>` a line, one line with v2, one per
/// controller with v1 (cgroups(7)). Paths are relative to the reader's cgroup namespace, so they may start with `..`
/// and lack `kubepods`.
pub fn membership(cgroup: &str) -> Option<Membership> {
    let path = |line: &str| line.splitn(3, ':').nth(2).and_then(membership_of_path);
    cgroup.lines().find_map(path)
}

/// The outermost pod counts: a process can name cgroups only below its own.
fn membership_of_path(path: &str) -> Option<Membership> {
    let mut segments = path.split('/').filter(|segment| !matches!(*segment, "" | "." | ".."));
    let uid = segments.find_map(pod_uid_of)?;
    Some(Membership { uid, nested: segments.count() > 1 })
}

/// `pod<uid>` with the cgroupfs driver, `kubepods-<class>-pod<uid>.slice` with systemd, whose escape of `-` is `_`.
pub(crate) fn pod_uid_of(segment: &str) -> Option<String> {
    let uid = match segment.strip_suffix(".slice") {
        Some(slice) => {
            let (parents, uid) = slice.rsplit_once("-pod")?;
            parents.split('-').any(|parent| parent == "kubepods").then(|| uid.replace('_', "-"))?
        }
        None => segment.strip_prefix("pod")?.to_owned(),
    };
    // A UUID; or 32 digits, the hash that kubelet gives to pods from its manifest directory.
    let groups: Vec<_> = uid.split('-').map(str::len).collect();
    let hex = uid.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-');
    (hex && matches!(groups[..], [8, 4, 4, 4, 12] | [32])).then_some(uid)
}

/// A process that was in the pod. Its files are read through its directory's descriptor, so a new process with the
/// same number cannot take its place: reads of a dead one fail.
struct Candidate {
    path: PathBuf,
    directory: OwnedFd,
    nested: bool,
    /// In clock ticks since boot.
    started: u64,
}

impl Candidate {
    /// None where it is gone, or no process of the pod.
    fn open(proc: &Path, pid: u32, pod_uid: &str) -> Result<Option<Self>, NotFound> {
        let path = proc.join(pid.to_string());
        Self::look(&path, pod_uid).map_err(|source| NotFound::Process { path, source })
    }

    fn look(path: &Path, pod_uid: &str) -> io::Result<Option<Self>> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let Some(directory) = there(nix::fcntl::open(path, flags, Mode::empty()))? else { return Ok(None) };
        let cgroup = read(&directory, "cgroup")?;
        let own = cgroup.and_then(|text| membership(&text)).filter(|found| found.uid == pod_uid);
        let Some(Membership { nested, .. }) = own else { return Ok(None) };
        let started = read(&directory, "stat")?.and_then(|stat| started(&stat));
        Ok(started.map(|started| Self { path: path.to_owned(), directory, nested, started }))
    }

    /// Its network namespace, if it is still in the pod with that open: processes can be moved.
    fn netns(&self, pod_uid: &str) -> Result<Option<PodNetns>, NotFound> {
        self.look_inside(pod_uid).map_err(|source| NotFound::Process { path: self.path.clone(), source })
    }

    fn look_inside(&self, pod_uid: &str) -> io::Result<Option<PodNetns>> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let netns = match nix::fcntl::openat(&self.directory, "ns/net", flags, Mode::empty()) {
            // What the kernel also says of a process that ends meanwhile (proc_ns_get_link()).
            Err(Errno::EACCES) if read(&self.directory, "cgroup")?.is_none() => return Ok(None),
            opened => there(opened)?,
        };
        let Some(netns) = netns else { return Ok(None) };
        let inode = nix::sys::stat::fstat(&netns)?.st_ino;
        let cgroup = read(&self.directory, "cgroup")?;
        let still = cgroup.and_then(|text| membership(&text)).is_some_and(|found| found.uid == pod_uid);
        Ok(still.then_some(PodNetns { netns, inode }))
    }
}

/// Only these two say that a process is gone. Any other error, of a reader without descriptors for example, says nothing:
/// a pod that runs must not be taken for one that has ended.
fn there<T>(result: nix::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// None where the process is gone.
fn read(directory: &OwnedFd, name: &str) -> io::Result<Option<String>> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let Some(file) = there(nix::fcntl::openat(directory, name, flags, Mode::empty()))? else {
        return Ok(None);
    };
    let mut text = Vec::new();
    match File::from(file).take(MAX_FILE).read_to_end(&mut text) {
        Ok(_) => Ok(Some(String::from_utf8_lossy(&text).into_owned())),
        Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Field 22 of `/proc/<pid>/stat`; the second one is the command in parentheses, which may hold anything (proc(5)).
fn started(stat: &str) -> Option<u64> {
    let (_, after_command) = stat.rsplit_once(')')?;
    after_command.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn processes(proc: &Path) -> Result<Vec<u32>, NotFound> {
    let failed = |source| NotFound::Proc { path: proc.to_owned(), source };
    let entries = fs::read_dir(proc).map_err(failed)?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// This process is in the host's namespace (hostNetwork), as is the host's first one; where `proc` is only part of a
/// host, the two differ, and neither is a pod's.
fn host_inodes(proc: &Path) -> Result<Vec<u64>, NotFound> {
    let own = proc.join("self/ns/net");
    let inode = fs::metadata(&own).map_err(|source| NotFound::Proc { path: own, source })?.ino();
    let first = fs::metadata(proc.join("1/ns/net")).map(|metadata| metadata.ino());
    Ok([inode].into_iter().chain(first).collect())
}

/// Bytes of a file in `/proc/<pid>` that are looked at; a hybrid host has some twelve lines.
const MAX_FILE: u64 = 64 * 1024;

#[cfg(test)]
mod tests;
