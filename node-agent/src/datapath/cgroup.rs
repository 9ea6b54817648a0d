//! Finds the cgroup whose processes' connections are captured: kubepods if there is one, else the root.
//!
//! **Invariant:** the mount is looked up, never assumed: on hybrid nodes cgroup version 2 is not at /sys/fs/cgroup.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Config, DatapathError};
use crate::netns_of_pod::pod_uid_of;

/// Names of the cgroup of all pods: cgroupfs driver, systemd driver.
const KUBEPODS: [&str; 2] = ["kubepods", "kubepods.slice"];

/// The cgroup to attach to: the setting, or what is found.
///
/// # Errors
/// When there is no cgroup of version 2.
pub(super) fn root(config: &Config) -> Result<PathBuf, DatapathError> {
    if let Some(root) = &config.cgroup_root {
        return Ok(root.clone());
    }
    let mountinfo = config.proc.join("self/mountinfo");
    let text = fs::read_to_string(&mountinfo).unwrap_or_default();
    find(&text, Path::is_dir).ok_or(DatapathError::NoCgroup2 { mountinfo })
}

/// The cgroup to attach to. `mountinfo` is the text of /proc/self/mountinfo, `exists` says whether a directory does.
///
/// Of several mounts of version 2 (a container has its own beside the host's) the one with kubepods below it counts,
/// else the one that shows most of the hierarchy: seen from a cgroup namespace, its root begins with `/..`.
pub(super) fn find(mountinfo: &str, exists: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let mounts: Vec<Mount> = mountinfo.lines().filter_map(Mount::parse).collect();
    let kubepods = mounts.iter().flat_map(|mount| KUBEPODS.iter().map(|name| mount.point.join(name)));
    if let Some(found) = kubepods.into_iter().find(|path| exists(path)) {
        return Some(found);
    }
    let outermost = mounts.iter().find(|mount| mount.root.starts_with("/.."));
    outermost.or(mounts.first()).map(|mount| mount.point.clone())
}

/// The directory of the cgroup that `/proc/<pid>/cgroup` calls so; none where no mount shows it.
pub(super) fn directory(mountinfo: &str, cgroup: &str, exists: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let mounts = mountinfo.lines().filter_map(Mount::parse);
    let directory = |mount: Mount| Some(mount.point.join(Path::new(cgroup).strip_prefix(&mount.root).ok()?));
    mounts.filter_map(directory).find(|path| exists(path))
}

/// The cgroups of wanted pods below this one by UID, those of their containers among them. A pod's is there by itself or
/// in one of its class (`burstable`, `kubepods-besteffort.slice`).
pub(super) fn of_pods(root: &Path, wanted: impl Fn(&str) -> bool) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let mut classes = vec![root.to_owned()];
    for depth in 0..2 {
        for path in std::mem::take(&mut classes).iter().flat_map(|class| below(class)) {
            match path.file_name().and_then(|name| name.to_str()).and_then(pod_uid_of) {
                Some(uid) if wanted(&uid) => {
                    found.extend(below(&path).into_iter().map(|container| (uid.clone(), container)));
                    found.push((uid, path));
                }
                None if depth == 0 => classes.push(path),
                _ => {}
            }
        }
    }
    found
}

fn below(path: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path()).collect()
}

/// Whether all cgroups are below this directory, as far as they can be seen.
pub(super) fn is_mount(mountinfo: &str, directory: &Path) -> bool {
    mountinfo.lines().filter_map(Mount::parse).any(|mount| mount.point == directory)
}

struct Mount {
    root: String,
    point: PathBuf,
}

impl Mount {
    /// A line as in proc_pid_mountinfo(5): `36 35 98:0 /root /mnt options [optional...] - type source options`.
    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        if after.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = before.split(' ').skip(3);
        Some(Self { root: unescape(fields.next()?), point: PathBuf::from(unescape(fields.next()?)) })
    }
}

/// Undoes the kernel's octal escapes of blanks and backslashes.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (code, character)| text.replace(code, character))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";

    #[test]
    fn directories() {
        let host = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n".to_owned();
        let container = format!(
            "31 23 0:28 / /sys/fs/cgroup ro - cgroup2 cgroup ro\n{}",
            "90 23 0:28 /../.. /host/cgroup rw - cgroup2 cgroup2 rw\n"
        );
        for (why, text, cgroup, expected) in [
            ("host", &host, "/system.slice/a.service", Some("/sys/fs/cgroup/system.slice/a.service")),
            ("root", &host, "/", Some("/sys/fs/cgroup")),
            ("out of sight", &host, "/../a", None),
            ("container's own", &container, "/a", Some("/sys/fs/cgroup/a")),
            (
                "host's, from a container",
                &container,
                "/../../system.slice",
                Some("/host/cgroup/system.slice"),
            ),
            ("a part of it that has no name here", &container, "/../a", None),
        ] {
            let found = directory(text, cgroup, |path| !path.to_string_lossy().contains(".."));
            assert_eq!(found.as_deref(), expected.map(Path::new), "{why}");
        }
        assert!(is_mount(&host, Path::new("/sys/fs/cgroup")));
        assert!(!is_mount(&host, Path::new("/sys/fs/cgroup/kubepods")));
    }

    #[test]
    fn mounts() {
        let unified = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw\n".to_owned();
        let hybrid = format!("{V1}41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n");
        let container = format!(
            "31 23 0:28 / /sys/fs/cgroup ro - cgroup2 cgroup ro\n{}",
            "90 23 0:28 /../../.. /host/sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
        );
        let blank = "31 23 0:28 / /mnt/cgroup\\0402 rw - cgroup2 cgroup2 rw\n".to_owned();
        let none: &[&str] = &[];
        for (why, text, there, expected) in [
            ("unified", &unified, none, Some("/sys/fs/cgroup")),
            ("unified, cgroupfs", &unified, &["/sys/fs/cgroup/kubepods"], Some("/sys/fs/cgroup/kubepods")),
            (
                "unified, systemd",
                &unified,
                &["/sys/fs/cgroup/kubepods.slice"],
                Some("/sys/fs/cgroup/kubepods.slice"),
            ),
            ("hybrid", &hybrid, none, Some("/sys/fs/cgroup/unified")),
            (
                "hybrid with pods",
                &hybrid,
                &["/sys/fs/cgroup/systemd/kubepods", "/sys/fs/cgroup/unified/kubepods"],
                Some("/sys/fs/cgroup/unified/kubepods"),
            ),
            (
                "container, pods seen from the host's mount",
                &container,
                &["/host/sys/fs/cgroup/kubepods.slice"],
                Some("/host/sys/fs/cgroup/kubepods.slice"),
            ),
            ("container, the host's mount", &container, none, Some("/host/sys/fs/cgroup")),
            ("blank", &blank, none, Some("/mnt/cgroup 2")),
            ("version 1 only", &V1.to_owned(), none, None),
            ("nonsense", &"a b c\n\n - cgroup2\n".to_owned(), none, None),
        ] {
            let found = find(text, |path| there.iter().any(|there| Path::new(there) == path));
            assert_eq!(found.as_deref(), expected.map(Path::new), "{why}");
        }
    }
}
