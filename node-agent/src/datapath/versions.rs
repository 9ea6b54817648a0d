//! What agents with other layouts left pinned, in directories of their own beside ours.
//!
//! Their hooks go on working on their own maps until each pod is captured by ours as well; then those of the pod are
//! taken off, and with the last pod the rest of the directory. **Invariant:** bytes of another layout are never read;
//! all that is known of a version is how its directory is built.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, io};

use tracing::info;

use super::attach;

/// The versions that are left.
#[derive(Debug)]
pub(super) struct Others(Vec<PathBuf>);

impl Others {
    /// Finds them beside our own directory, and removes what no living pod needs.
    ///
    /// # Errors
    /// When bpffs cannot be read.
    pub(super) fn find(own: &Path) -> io::Result<Self> {
        let beside = own.parent().unwrap_or(own);
        let mut found = Vec::new();
        for entry in fs::read_dir(beside)? {
            let path = entry?.path();
            if path != own && path.is_dir() {
                info!(path = %path.display(), "pods are captured by programs of another version; they will be taken over");
                found.push(path);
            }
        }
        let mut others = Self(found);
        for uid in others.pods()? {
            if !others.is_alive(&uid) {
                others.release(&uid)?;
            }
        }
        others.finish()?;
        Ok(others)
    }

    /// The pods that they capture.
    ///
    /// # Errors
    /// When bpffs cannot be read.
    pub(super) fn pods(&self) -> io::Result<BTreeSet<String>> {
        let mut pods = BTreeSet::new();
        for version in &self.0 {
            pods.extend(directories(&version.join("links"))?);
        }
        Ok(pods)
    }

    /// Whether one of them captures the pod; so it is where that cannot be told.
    pub(super) fn has(&self, uid: &str) -> bool {
        self.0.iter().any(|version| version.join("links").join(uid).try_exists().unwrap_or(true))
    }

    /// Whether one of them guards the pod by filters, which their pins only tell of.
    pub(super) fn has_filters(&self, uid: &str) -> bool {
        let filters = |version: &PathBuf| {
            let links = files(&version.join("links").join(uid)).unwrap_or_default();
            links.iter().any(|name| attach::is_filter(name))
        };
        self.0.iter().any(filters)
    }

    /// The interfaces of the pod that these pins are of.
    pub(super) fn filters(&self, uid: &str) -> BTreeSet<u32> {
        let links = |version: &PathBuf| files(&version.join("links").join(uid)).unwrap_or_default();
        attach::filtered(&self.0.iter().flat_map(links).collect::<Vec<_>>())
    }

    /// Takes a pod's hooks off, the guard first, and what is left when it was the last.
    ///
    /// # Errors
    /// The first one; the rest is removed.
    pub(super) fn release(&mut self, uid: &str) -> io::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut result = Ok(());
        for version in &self.0 {
            let directory = version.join("links").join(uid);
            let (guards, others): (Vec<_>, Vec<_>) =
                files(&directory)?.into_iter().partition(|name| attach::is_guard(name));
            for links in [guards, others] {
                result = result.and(attach::remove_all(&directory, &links));
            }
            if directory.exists() {
                result = result.and(fs::remove_dir(&directory));
            }
        }
        result.and(self.finish())
    }

    /// Whether a hook of the pod still has its target.
    fn is_alive(&self, uid: &str) -> bool {
        self.0.iter().any(|version| {
            let directory = version.join("links").join(uid);
            let links = files(&directory).unwrap_or_default();
            let mut links = links.iter().filter(|name| !attach::is_filter(name));
            links.any(|name| attach::alive(&directory.join(name)).unwrap_or(false))
        })
    }

    /// Removes the versions that no pod is left of: hooks of the node, then programs and maps.
    fn finish(&mut self) -> io::Result<()> {
        let mut left = Vec::new();
        for version in std::mem::take(&mut self.0) {
            if directories(&version.join("links"))?.is_empty() {
                attach::remove_all(&version.join("links"), &files(&version.join("links"))?)?;
                remove(&version)?;
                info!(path = %version.display(), "the last pod of another version is taken over");
            } else {
                left.push(version);
            }
        }
        self.0 = left;
        Ok(())
    }
}

fn remove(directory: &Path) -> io::Result<()> {
    for name in files(directory)? {
        fs::remove_file(directory.join(name))?;
    }
    for name in directories(directory)? {
        remove(&directory.join(name))?;
    }
    fs::remove_dir(directory)
}

fn files(directory: &Path) -> io::Result<Vec<String>> {
    entries(directory, false)
}

fn directories(directory: &Path) -> io::Result<Vec<String>> {
    entries(directory, true)
}

fn entries(directory: &Path, directories: bool) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() == directories {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}
