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

/// Sets them in the calling thread's network namespace; returns what they were, -1 for unused places.
///
/// # Errors
/// When one cannot be set, for example because /proc/sys is read-only; those before it are restored.
pub(super) fn set(proc: &Path) -> io::Result<[i32; 4]> {
    let mut before = [-1; 4];
    for (index, name) in NAMES.iter().enumerate() {
        if name.starts_with("net/ipv6/") && !path(proc, name).exists() {
            continue; // a kernel without IPv6
        }
        let result = read(proc, name).and_then(|value| {
            before[index] = value;
            write(proc, name, 1)
        });
        if let Err(error) = result {
            restore(proc, before)?;
            let path = path(proc, name);
            return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
        }
    }
    Ok(before)
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
    let text = fs::read_to_string(path(proc, name))?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("not a number: {text:?}")))
}

fn write(proc: &Path, name: &str, value: i32) -> io::Result<()> {
    fs::write(path(proc, name), value.to_string())
}

fn path(proc: &Path, name: &str) -> PathBuf {
    proc.join("sys").join(name)
}
