//! What is pinned, held open as well: pins go with their file system, and a hook that nothing refers to is gone.
//!
//! So an unmounted bpffs detaches nothing while the agent runs, and once there is one again the pins are put back.
//! **Invariant:** only what is pinned is held; a hook that was let go has no descriptor here that keeps it attached.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::{bpf, pins};

/// Descriptors by the paths of their pins.
#[derive(Debug, Default)]
pub(super) struct Held(BTreeMap<PathBuf, OwnedFd>);

impl Held {
    /// Holds what is pinned below a directory now, and nothing else from there.
    ///
    /// # Errors
    /// When a pin cannot be opened; those that can are held.
    pub(super) fn refresh(&mut self, directory: &Path) -> io::Result<()> {
        self.forget(directory);
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        let mut result = Ok(());
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            let held = if entry.file_type()?.is_dir() {
                self.refresh(&path)
            } else {
                bpf::open(&path).map(|object| drop(self.0.insert(path, object)))
            };
            result = result.and(held);
        }
        result
    }

    /// Holds nothing of a directory any more.
    pub(super) fn forget(&mut self, directory: &Path) {
        self.0.retain(|path, _| !path.starts_with(directory));
    }

    /// Takes the hooks off that are pinned below a directory; for pins that are gone.
    pub(super) fn detach(&mut self, directory: &Path) {
        for (_, object) in self.0.iter().filter(|(path, _)| path.starts_with(directory)) {
            // A link whose target is gone is detached already.
            let _ = bpf::detach(object.as_fd());
        }
        self.forget(directory);
    }

    /// Pins again what is no longer pinned; how much that was.
    ///
    /// # Errors
    /// When bpffs refuses.
    pub(super) fn restore(&self) -> io::Result<usize> {
        let mut restored = 0;
        for (path, object) in self.0.iter().filter(|(path, _)| !path.exists()) {
            fs::create_dir_all(path.parent().unwrap_or(path))?;
            pins::replace(object.as_fd(), path)?;
            restored += 1;
        }
        Ok(restored)
    }
}
