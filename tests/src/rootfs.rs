//! Root file systems of nodes and containers: a tmpfs with the host's programs read-only and the project's binaries,
//! and nothing else of the host, so that a mount the manifests forgot is missing here as it would be in a cluster.

use std::path::{Path, PathBuf};

use nix::mount::MsFlags;

use crate::sandbox::{Plan, Step};

/// Where nodes and containers find the project's binaries.
pub const BINARIES: &str = "/opt/ambit/bin";

/// PATH of every process in the lab.
pub const PATH: &str = "/opt/ambit/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Top directories that hold programs; symbolic links into /usr on a merged system.
const PROGRAMS: [&str; 7] = ["bin", "lib", "lib32", "lib64", "libx32", "sbin", "usr"];

/// What programs read of /etc. resolv.conf and hosts are a node's or container's own.
const SETTINGS: [&str; 11] = [
    "alternatives",
    "group",
    "iproute2",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "nsswitch.conf",
    "passwd",
    "protocols",
    "services",
    "ssl",
];

const DEVICES: [&str; 6] = ["full", "null", "random", "tty", "urandom", "zero"];

/// Begin a root at `root`, an empty directory: programs, settings, devices, /proc, /tmp. `binaries` is the directory
/// of the project's binaries as the process sees it before its root changes.
pub fn base(plan: &mut Plan, root: &Path, binaries: &Path) {
    plan.filesystem("tmpfs", root, Some("mode=755,size=64m"));
    for name in PROGRAMS {
        let (source, target) = (Path::new("/").join(name), root.join(name));
        if let Ok(says) = std::fs::read_link(&source) {
            link(plan, &says, &target);
        } else if source.is_dir() {
            plan.directories(root, Path::new(name)).bind(&source, &target, true);
        }
    }
    plan.directories(root, Path::new("etc"));
    for name in SETTINGS {
        let source = Path::new("/etc").join(name);
        if source.exists() {
            mount_point(plan, root, &source, source.is_dir());
            plan.bind(&source, &root.join("etc").join(name), true);
        }
    }
    plan.directories(root, Path::new("dev"));
    for name in DEVICES {
        let source = Path::new("/dev").join(name);
        mount_point(plan, root, &source, false);
        plan.bind(&source, &root.join("dev").join(name), false);
    }
    link(plan, Path::new("/proc/self/fd"), &root.join("dev/fd"));
    plan.directories(root, Path::new("proc")).bind(Path::new("/proc"), &root.join("proc"), false);
    plan.propagation(&root.join("proc"), MsFlags::MS_PRIVATE);
    plan.directories(root, Path::new("tmp"));
    plan.filesystem("tmpfs", &root.join("tmp"), Some("mode=1777,size=64m"));
    let target = root.join(BINARIES.trim_start_matches('/'));
    plan.directories(root, Path::new(BINARIES)).bind(binaries, &target, true);
}

/// A directory, or an empty file, at `path` below `root`, for something to be mounted on.
pub fn mount_point(plan: &mut Plan, root: &Path, path: &Path, directory: bool) {
    let path = path.strip_prefix("/").unwrap_or(path);
    if directory {
        plan.directories(root, path);
        return;
    }
    if let Some(parent) = path.parent() {
        plan.directories(root, parent);
    }
    plan.step(Step::File(crate::sandbox::c_path(&root.join(path))));
}

pub fn link(plan: &mut Plan, says: &Path, at: &Path) {
    plan.step(Step::Link { says: crate::sandbox::c_path(says), at: crate::sandbox::c_path(at) });
}

/// The directory this program was built into, `deps` of a test binary aside: the daemons are beside it.
pub fn built_binaries() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let directory = program.parent().unwrap_or(Path::new("/"));
    let directory =
        if directory.ends_with("deps") { directory.parent().unwrap_or(directory) } else { directory };
    Ok(directory.to_path_buf())
}
