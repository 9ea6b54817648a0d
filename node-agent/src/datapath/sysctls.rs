//! Settings of the pod's network stack that the proxy's connections to the app need.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// What is set to 1, below /proc/sys: the app's accepted sockets take over the mark of the proxy's SYN, and resets
/// of closed ports and ICMP errors the mark of what they answer. So both come back over lo, not by the network. The
/// first is for both families.
const NAMES: [&str; 3] = ["net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect"];

/// Whether the calling thread's network namespace can have IPv6 routes to lo.
pub(super) fn has_ipv6(proc: &Path) -> bool {
    // Not there at all where the kernel has no IPv6.
    read(proc, "net/ipv6/conf/lo/disable_ipv6").is_ok_and(|disabled| disabled == 0)
}

/// What they are in the calling thread's network namespace, -1 for unused places.
///
/// # Errors
/// When one cannot be read.
pub(super) fn current(proc: &Path) -> io::Result<[i32; 4]> {
    let mut current = [-1; 4];
    for (place, name) in current.iter_mut().zip(names(proc)) {
        *place = read(proc, name)?;
    }
    Ok(current)
}

/// What the kernel has them be in a new network namespace, as `current`.
pub(super) fn defaults(proc: &Path) -> [i32; 4] {
    let mut defaults = [-1; 4];
    defaults.iter_mut().zip(names(proc)).for_each(|(place, _)| *place = 0);
    defaults
}

/// Sets them in the calling thread's network namespace.
///
/// # Errors
/// When one cannot be set, for example because /proc/sys is read-only; `restore` undoes those before it.
pub(super) fn set(proc: &Path) -> io::Result<()> {
    names(proc).try_for_each(|name| write(proc, name, 1))
}

/// Those that are not set in the calling thread's network namespace, though they can be.
///
/// # Errors
/// When one cannot be read.
pub(super) fn changed(proc: &Path) -> io::Result<Vec<&'static str>> {
    let mut changed = Vec::new();
    for name in names(proc) {
        if read(proc, name)? != 1 {
            changed.push(name);
        }
    }
    Ok(changed)
}

/// Those that the kernel has: without IPv6, none of that.
fn names(proc: &Path) -> impl Iterator<Item = &'static str> {
    NAMES.into_iter().filter(|name| !name.starts_with("net/ipv6/") || path(proc, name).exists())
}

/// Sets them to what they were.
///
/// # Errors
/// When one cannot be set; the others are.
pub(super) fn restore(proc: &Path, before: [i32; 4]) -> io::Result<()> {
    let mut result = Ok(());
    for (name, value) in NAMES.iter().zip(before) {
        if value >= 0 {
            result = result.and(write(proc, name, value));
        }
    }
    result
}

fn read(proc: &Path, name: &str) -> io::Result<i32> {
    let text = fs::read_to_string(path(proc, name)).map_err(|error| told(proc, name, &error))?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("not a number: {text:?}")))
}

fn write(proc: &Path, name: &str, value: i32) -> io::Result<()> {
    fs::write(path(proc, name), value.to_string()).map_err(|error| told(proc, name, &error))
}

fn told(proc: &Path, name: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path(proc, name).display()))
}

fn path(proc: &Path, name: &str) -> PathBuf {
    proc.join("sys").join(name)
}
