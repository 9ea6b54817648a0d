//! cgroup2 subtrees of the lab: found through mountinfo (hybrid hosts mount them below `unified`), killed and removed
//! as a whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Where this machine has its cgroup2 hierarchy.
pub fn mount_point() -> anyhow::Result<PathBuf> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    find(&mountinfo)
        .context("no cgroup2 mount in /proc/self/mountinfo; mount one: mount -t cgroup2 none /sys/fs/cgroup")
}

/// The first cgroup2 mount point; fields as in proc_pid_mountinfo(5).
fn find(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let kind = filesystem.split(' ').next()?;
        let point = mount.split(' ').nth(4)?;
        (kind == "cgroup2").then(|| PathBuf::from(point))
    })
}

/// The file by which a process joins `cgroup`, opened here so that the process needs no path to it.
pub fn procs(cgroup: &Path) -> anyhow::Result<OwnedFd> {
    fs::create_dir_all(cgroup).with_context(|| format!("make cgroup {}", cgroup.display()))?;
    let path = cgroup.join("cgroup.procs");
    let file: File =
        OpenOptions::new().write(true).open(&path).with_context(|| format!("open {}", path.display()))?;
    Ok(file.into())
}

/// Kill every process below (cgroup.kill, Linux 5.14) and wait until none is left.
pub fn kill(cgroup: &Path) {
    if !cgroup.exists() {
        return;
    }
    if let Err(error) = fs::write(cgroup.join("cgroup.kill"), "1") {
        tracing::warn!("cannot kill the processes of {}: {error}", cgroup.display());
    }
    if !emptied(cgroup) {
        tracing::warn!("processes of {} stay", cgroup.display());
    }
}

/// Waits until no process is in it or below; whether that is so in the end.
fn emptied(cgroup: &Path) -> bool {
    // One that is gone is empty, here and below.
    let Ok(mut events) = File::open(cgroup.join("cgroup.events")) else { return true };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut text = String::new();
        // Reading is what the next change is told since.
        if events.rewind().and_then(|()| events.read_to_string(&mut text)).is_err() || !is_populated(&text) {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let mut change = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        // An interrupted wait is as good as one that is over.
        let _ = poll(&mut change, PollTimeout::try_from(left.min(AGAIN)).unwrap_or(PollTimeout::ZERO));
        // A kubelet that still runs brings back what was killed; what comes in while others are there is no change.
        let _ = fs::write(cgroup.join("cgroup.kill"), "1");
    }
}

/// For the end of processes that were killed; those that wait for a disk take longest.
const PATIENCE: Duration = Duration::from_secs(10);
/// When to kill again what came in meanwhile.
const AGAIN: Duration = Duration::from_millis(50);

/// Kill what runs in it, then remove it from the leaves up. Nothing new comes in below meanwhile, whoever still works
/// there.
pub fn remove_tree(cgroup: &Path) {
    // Gone by now, perhaps.
    let _ = fs::write(cgroup.join("cgroup.max.descendants"), "0");
    kill(cgroup);
    remove_leaves(cgroup);
}

fn remove_leaves(cgroup: &Path) {
    let children = fs::read_dir(cgroup).into_iter().flatten().flatten();
    for child in children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_leaves(&child.path());
    }
    // Somebody may come in between the wait and the removal.
    for _ in 0..10 {
        match fs::remove_dir(cgroup) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && emptied(cgroup) => {}
            Err(error) if error.kind() != io::ErrorKind::NotFound => break,
            _ => return,
        }
    }
    tracing::warn!("cgroup {} stays: it is busy", cgroup.display());
}

/// Whether a process is in it or below.
#[must_use]
pub fn populated(cgroup: &Path) -> bool {
    fs::read_to_string(cgroup.join("cgroup.events")).is_ok_and(|events| is_populated(&events))
}

/// By its `cgroup.events`.
fn is_populated(events: &str) -> bool {
    events.contains("populated 1")
}

/// Processes in it and below.
#[must_use]
pub fn processes(cgroup: &Path) -> Vec<i32> {
    let own = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut found: Vec<i32> = own.lines().filter_map(|line| line.parse().ok()).collect();
    for child in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if child.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(processes(&child.path()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper(cgroup: &Path) -> anyhow::Result<Child> {
        let child = Command::new("sleep").arg("60").spawn()?;
        fs::create_dir_all(cgroup)?;
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string())?;
        Ok(child)
    }

    /// Also what is only about to come in.
    #[test]
    #[ignore = "needs root: cargo xtask test"]
    fn a_tree_is_removed_with_its_processes() -> anyhow::Result<()> {
        let top = mount_point()?.join(format!("ambit-test-{}", std::process::id()));
        let (inner, outer) = (top.join("a/b"), top.join("c"));
        let mut children = [sleeper(&inner)?, sleeper(&outer)?];
        anyhow::ensure!(populated(&top) && processes(&top).len() == 2, "nobody is in it");
        let late = Command::new("sleep").arg("60").spawn()?;
        let began = Instant::now();
        std::thread::scope(|scope| {
            let comes_in = scope.spawn(|| {
                // Until the cgroup is gone.
                while fs::write(inner.join("cgroup.procs"), late.id().to_string()).is_ok() {}
            });
            remove_tree(&top);
            comes_in.join()
        })
        .map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        anyhow::ensure!(!top.exists() && began.elapsed() < PATIENCE, "it is there");
        let mut late = late;
        late.kill()?;
        for child in children.iter_mut().chain([&mut late]) {
            anyhow::ensure!(!child.wait()?.success(), "it ended by itself");
        }
        Ok(())
    }

    #[test]
    fn finds_the_cgroup2_mount() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      38 31 0:35 / /sys/fs/cgroup/blkio rw,relatime - cgroup cgroup rw,blkio\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(find(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(find(unified), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(find("31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), None);
    }
}
