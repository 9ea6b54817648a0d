//! What is pinned, held open as well: pins go with their file system, and a hook that nothing refers to is gone.
//!
//! So an unmounted bpffs detaches nothing while the agent runs, and once there is one again the pins are put back.
//! **Invariant:** nothing that is attached is let go because its pin is not there: whoever takes a hook off detaches it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::{attach, bpf, pins};

/// Descriptors by the paths of their pins.
#[derive(Debug, Default)]
pub(super) struct Held(BTreeMap<PathBuf, OwnedFd>);

impl Held {
    /// Holds what is pinned below a directory now, and of the rest from there only links that are attached. Without the
    /// directory bpffs is not there: what is held from it is all there is.
    ///
    /// # Errors
    /// When a pin cannot be opened; those that can are held.
    pub(super) fn refresh(&mut self, directory: &Path) -> io::Result<()> {
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        let mut paths: BTreeSet<PathBuf> = self.below(directory).map(|(path, _)| path.clone()).collect();
        let mut result = Ok(());
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                result = result.and(self.refresh(&entry.path()));
            } else {
                paths.insert(entry.path());
            }
        }
        paths.iter().fold(result, |result, path| result.and(self.hold(path)))
    }

    /// Holds what is pinned at this path now, in the place of what was. A link that is not pinned there any more is held
    /// while it is attached, and none whose interface is gone: there may be any number of these.
    ///
    /// # Errors
    /// When the pin cannot be opened.
    pub(super) fn hold(&mut self, path: &Path) -> io::Result<()> {
        match bpf::open(path) {
            Ok(object) if of_interface(path) && !is_attached(path, &object) => drop(self.0.remove(path)),
            Ok(object) => drop(self.0.insert(path.to_owned(), object)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(_) => {
                if self.0.get(path).is_some_and(|object| !is_attached(path, object)) {
                    self.0.remove(path);
                }
            }
        }
        Ok(())
    }

    fn below(&self, directory: &Path) -> impl Iterator<Item = (&PathBuf, &OwnedFd)> {
        self.0.iter().filter(move |(path, _)| path.starts_with(directory))
    }

    /// Takes the hooks off that are pinned at or below a path, and forgets them; for pins that are gone.
    pub(super) fn detach(&mut self, path: &Path) {
        for (_, object) in self.below(path) {
            // A link whose target is gone is detached already.
            let _ = bpf::detach(object.as_fd());
        }
        self.0.retain(|pin, _| !pin.starts_with(path));
    }

    /// Pins again what is no longer pinned below a directory; how much that was.
    ///
    /// # Errors
    /// When bpffs refuses.
    pub(super) fn restore(&self, directory: &Path) -> io::Result<usize> {
        let mut restored = 0;
        for (path, object) in self.below(directory).filter(|(path, _)| !path.exists()) {
            fs::create_dir_all(path.parent().unwrap_or(path))?;
            pins::replace(object.as_fd(), path)?;
            restored += 1;
        }
        Ok(restored)
    }
}

/// Whether the pin is that of a link on an interface.
fn of_interface(path: &Path) -> bool {
    name(path).is_some_and(|name| attach::index(name).is_some() && !attach::is_filter(name))
}

fn name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// Whether a link is; what stands for a filter is none.
fn is_attached(path: &Path, object: &OwnedFd) -> bool {
    !name(path).is_some_and(attach::is_filter)
        && bpf::link_info(object.as_fd()).is_ok_and(|link| link.target != 0)
}
