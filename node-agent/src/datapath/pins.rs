//! Where everything is pinned: `<bpffs>/ambit/v<ABI>/{maps,progs,links}`, a directory in `links` for each pod.
//!
//! **Invariant:** the directory's name changes with the layouts, so no program ever reads bytes of another one.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::{fs, path};

use mesh_ebpf_abi::{ABI_VERSION, MAX_UID};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::bpf;

/// The pin directory of this build's layouts.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
}

impl Pins {
    /// Makes the directories.
    ///
    /// # Errors
    /// `InvalidInput` when `bpffs` is no bpf file system.
    pub(super) fn create(bpffs: &Path) -> io::Result<Self> {
        if statfs(bpffs)?.filesystem_type() != BPF_FS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a bpf file system"));
        }
        let pins = Self { root: bpffs.join("ambit").join(format!("v{ABI_VERSION}")) };
        for dir in ["maps", "progs", "links"] {
            fs::create_dir_all(pins.root.join(dir))?;
        }
        Ok(pins)
    }

    /// The directory of all of them.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Pin of a map.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.root.join("maps").join(name)
    }

    /// Pin of a program.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.root.join("progs").join(name)
    }

    /// Pin of a link that belongs to no pod.
    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.root.join("links").join(name)
    }

    /// Directory of a pod's links.
    pub(super) fn pod(&self, uid: &str) -> PathBuf {
        self.root.join("links").join(uid)
    }

    /// Names of the links pinned for a pod; none when it has no directory.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(super) fn pod_links(&self, uid: &str) -> io::Result<Vec<String>> {
        match fs::read_dir(self.pod(uid)) {
            Ok(entries) => {
                entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

/// Whether a pod's UID can name a directory in bpffs, which takes no dots.
pub(super) fn valid_uid(uid: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    !uid.is_empty() && uid.len() <= MAX_UID && uid.bytes().all(plain)
}

/// End of the name that a pin has until it takes another one's place.
const NEW: &str = "_new";

/// Removes what an agent left that died within [`replace`]: what is pinned so is not in use, or is made again.
///
/// # Errors
/// The first one; the rest is removed.
pub(super) fn remove_new(directory: &Path) -> io::Result<()> {
    let mut result = Ok(());
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            result = result.and(remove_new(&entry.path()));
        } else if entry.file_name().to_string_lossy().ends_with(NEW) {
            result = result.and(remove(&entry.path()));
        }
    }
    result
}

/// Pins an object, in the place of what is pinned there.
///
/// # Errors
/// When bpffs refuses.
pub(super) fn replace(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(NEW);
    let beside = path::Path::with_file_name(path, name);
    remove(&beside)?;
    bpf::pin(object, &beside)?;
    fs::rename(&beside, path)
}

/// Removes a pin, if it is there.
///
/// # Errors
/// When bpffs refuses.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids() {
        for (uid, expected) in [
            ("0f9d1c1e-6a53-4f36-8a3e-f0ac3a3f5c57", true),
            ("d41d8cd98f00b204e9800998ecf8427e", true),
            ("", false),
            (".", false),
            ("..", false),
            ("a/b", false),
            ("a.b", false),
            ("a\0b", false),
            (&"a".repeat(63), true),
            (&"a".repeat(64), false),
        ] {
            assert_eq!(valid_uid(uid), expected, "{uid:?}");
        }
    }

    #[test]
    fn only_half_made_pins_are_removed() {
        let root = std::env::temp_dir().join(format!("ambit-pins-{}", std::process::id()));
        let pod = root.join("links/pod_new");
        fs::create_dir_all(&pod).unwrap();
        for name in ["guard-2", "guard-2_new", "steer_new"] {
            fs::write(pod.join(name), "").unwrap();
        }
        remove_new(&root).unwrap();
        let left: Vec<_> = fs::read_dir(&pod).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(left, ["guard-2"]);
    }

    #[test]
    fn refuses_another_file_system() {
        assert_eq!(Pins::create(Path::new("/proc")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
