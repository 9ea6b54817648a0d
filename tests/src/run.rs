//! One run of the lab: its name, its directory, the lock that says it lives, and the removal of runs that died.
//!
//! **Invariant:** everything a run makes can be found by its name alone: cgroups `ambit-<run>`, network namespaces
//! `<run>-*`, the directory `/run/ambit-lab/<run>`. Mounts are in mount namespaces of the run's processes and die with
//! them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use crate::{cgroup, netns};

mod interrupt;
mod remains;

pub use remains::remains;

/// Where runs keep their directories.
const RUNS: &str = "/run/ambit-lab";

/// A live run; its drop removes what the run made, and so do SIGINT, SIGTERM and SIGHUP.
#[derive(Debug)]
pub struct Run {
    name: String,
    directory: PathBuf,
    cgroup: PathBuf,
    // flock(2) is held as long as this is open, and gone when the process is, however it ended.
    _lock: nix::fcntl::Flock<File>,
}

impl Run {
    /// Take a new name, after removing what dead runs left behind.
    pub fn begin() -> anyhow::Result<Self> {
        anyhow::ensure!(
            nix::unistd::geteuid().is_root(),
            "the lab makes network namespaces: run it as root (cargo xtask does)"
        );
        let turn = turn()?;
        sweep_in(&turn)?;
        let mut names = std::iter::repeat_with(|| format!("amb{:04x}", rand::random::<u16>()));
        let free = |name: &String| !Path::new(RUNS).join(name).exists();
        let name = names.find(free).context("every name is taken")?;
        let root = cgroup::mount_point()?;
        // Before anything is made: whatever the moment, an interrupted run finds what it has to remove.
        interrupt::register(&name)?;
        tracing::info!("run {name} begins");
        let directory = Path::new(RUNS).join(&name);
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        let lock = lock(&directory)?.with_context(|| format!("somebody else has taken {name}"))?;
        let cgroup = root.join(format!("ambit-{name}"));
        let run = Self { name, directory, cgroup, _lock: lock };
        fs::create_dir_all(&run.cgroup).with_context(|| format!("make {}", run.cgroup.display()))?;
        Ok(run)
    }

    /// Unique on this machine, e.g. `amb3f2a`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The root of the run's cgroups, on the cgroup2 mount.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// What a network namespace of this run is called.
    #[must_use]
    pub fn netns(&self, part: &str) -> String {
        format!("{}-{part}", self.name)
    }

    /// Kill every process and remove everything. May be called twice.
    pub fn end(&self) {
        remove(&self.name);
        interrupt::unregister(&self.name);
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.end();
    }
}

/// Remove what runs left behind whose process is gone. Returns their names.
pub fn sweep() -> anyhow::Result<Vec<String>> {
    sweep_in(&turn()?)
}

/// Those who begin or sweep take turns: a run that has its directory but not yet its lock would be taken for dead.
fn turn() -> anyhow::Result<nix::fcntl::Flock<File>> {
    fs::create_dir_all(RUNS).with_context(|| format!("make {RUNS}"))?;
    let file = File::create(Path::new(RUNS).join("turn"))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

fn sweep_in(_turn: &nix::fcntl::Flock<File>) -> anyhow::Result<Vec<String>> {
    let mut swept = Vec::new();
    for name in traces()? {
        let directory = Path::new(RUNS).join(&name);
        // A run that ends right now takes its directory with it.
        if directory.exists() && !matches!(lock(&directory), Ok(Some(_))) {
            continue;
        }
        tracing::info!("removing what run {name} left behind");
        remove(&name);
        swept.push(name);
    }
    Ok(swept)
}

/// The names of all runs of which anything is left.
fn traces() -> anyhow::Result<BTreeSet<String>> {
    let names = |directory: &Path| -> Vec<String> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let mut runs: BTreeSet<String> = names(Path::new(RUNS)).into_iter().collect();
    runs.extend(
        names(&cgroup::mount_point()?)
            .iter()
            .filter_map(|name| name.strip_prefix("ambit-"))
            .map(str::to_owned),
    );
    runs.extend(
        names(Path::new(netns::NAMED)).iter().filter_map(|name| Some(name.split_once('-')?.0.to_owned())),
    );
    runs.retain(|name| is_run(name));
    Ok(runs)
}

/// `amb` and four hexadecimal digits.
fn is_run(name: &str) -> bool {
    let digits = name.strip_prefix("amb").unwrap_or_default();
    digits.len() == 4 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
}

/// The run's lock, if nobody has it.
fn lock(directory: &Path) -> anyhow::Result<Option<nix::fcntl::Flock<File>>> {
    let file = File::create(directory.join("lock"))?;
    match nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// The same for a run whose kubelets go on: what they bring back is removed again, until they find nothing to work on.
fn remove_while_it_runs(name: &str) {
    for _ in 0..50 {
        remove(name);
        if traces().is_ok_and(|runs| !runs.contains(name)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Kill and remove everything of that name.
fn remove(name: &str) {
    match cgroup::mount_point() {
        Ok(root) => cgroup::remove_tree(&root.join(format!("ambit-{name}"))),
        Err(error) => tracing::warn!("cgroups of {name} stay: {error:#}"),
    }
    let prefix = format!("{name}-");
    for entry in fs::read_dir(netns::NAMED).into_iter().flatten().flatten() {
        let namespace = entry.file_name().to_string_lossy().into_owned();
        if namespace.starts_with(&prefix) {
            netns::remove(&namespace);
        }
    }
    let directory = Path::new(RUNS).join(name);
    if let Err(error) = fs::remove_dir_all(&directory)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::info!("{} stays: {error}", directory.display());
    }
}
