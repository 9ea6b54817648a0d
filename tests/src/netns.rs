//! Network namespaces: made by name with `ip netns`, entered by one thread at a time.
//!
//! **Invariant:** no thread of the runtime ever changes namespace; work inside one is done on a thread made for it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use anyhow::Context as _;
use nix::sched::CloneFlags;

use crate::shell;

/// Where iproute2 keeps its named namespaces.
pub const NAMED: &str = "/run/netns";

/// `ip` is a process of its own: it would make its namespace even after this one has removed all and ended.
static MAKING: RwLock<()> = RwLock::new(());

/// Waits for namespaces that are just being made; whoever wants to make another one waits for ever.
pub(crate) fn make_no_more() {
    std::mem::forget(MAKING.write().unwrap_or_else(PoisonError::into_inner));
}

/// A network namespace held open.
#[derive(Debug)]
pub struct Netns {
    name: String,
    fd: OwnedFd,
}

impl Netns {
    /// A new namespace under an `ip netns` name, with `lo` up. It stays until [`remove`].
    pub fn create(name: &str) -> anyhow::Result<Self> {
        let making = MAKING.read().unwrap_or_else(PoisonError::into_inner);
        shell::run("ip", ["netns", "add", name])?;
        drop(making);
        shell::run("ip", ["-n", name, "link", "set", "lo", "up"])?;
        Self::open(name, &Path::new(NAMED).join(name))
    }

    /// One that exists, by any path that names it.
    pub fn open(name: &str, path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("open network namespace {}", path.display()))?;
        Ok(Self { name: name.to_owned(), fd: file.into() })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A descriptor of its own, for a [`crate::sandbox::Step::Enter`].
    pub fn descriptor(&self) -> anyhow::Result<OwnedFd> {
        Ok(self.fd.try_clone()?)
    }

    /// Run `work` inside, on a thread of its own. Sockets it makes belong to the namespace for ever.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                nix::sched::setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("enter network namespace {}", self.name))?;
                work()
            });
            inside.join().map_err(|_| anyhow::anyhow!("a thread in namespace {} panicked", self.name))?
        })
    }

    /// One line per command, as for `ip -batch`.
    pub fn ip(&self, batch: &str) -> anyhow::Result<()> {
        shell::run_with_input("ip", ["-n", &self.name, "-batch", "-"], batch)
            .with_context(|| format!("set up network namespace {}", self.name))
            .map(drop)
    }

    /// Set a `net.*` sysctl, e.g. `ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = PathBuf::from("/proc/sys/net").join(key);
        self.run(|| {
            std::fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))
        })
    }
}

/// Remove a named namespace; one that is gone is fine.
pub fn remove(name: &str) {
    let path = Path::new(NAMED).join(name);
    if path.exists()
        && let Err(error) = shell::run("ip", ["netns", "del", name])
        && path.exists()
    {
        tracing::warn!("network namespace {name} stays: {error:#}");
    }
}
