//! The system calls of [`super::Step`] that have no safe wrapper.
#![allow(unsafe_code, reason = "pre_exec, prctl and capset have no safe wrapper among the kept dependencies")]

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;

use super::Capabilities;

pub(super) fn before_exec(
    command: &mut Command,
    steps: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: the closure runs in the forked child. It only makes system calls on data that was prepared before the
    // fork: it allocates nothing and takes no lock (the invariant of the parent module).
    unsafe {
        command.pre_exec(steps);
    }
}

pub(super) fn no_new_privileges() -> Result<(), Errno> {
    // SAFETY: prctl(2) with constants.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).map(drop)
}

/// By raw system calls: the libc wrappers signal every thread of the parent's, which do not exist after fork.
pub(super) fn become_user(uid: u32, gid: u32) -> Result<(), Errno> {
    // SAFETY: setgroups(2) with no groups, setresgid(2) and setresuid(2) with plain numbers.
    unsafe {
        Errno::result(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()))?;
        Errno::result(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        Errno::result(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }
    Ok(())
}

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The sets this process has (capget).
pub(super) fn own_capabilities() -> Result<u64, Errno> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut data = [Data { effective: 0, permitted: 0, inheritable: 0 }; 2];
    // SAFETY: capget(2) version 3 writes two data blocks; both structures live on this stack frame.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    Ok(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32)
}

/// Drop the rest from the bounding set: an exec by root gains exactly what is left there.
pub(super) fn bound_capabilities(set: Capabilities) -> Result<(), Errno> {
    for capability in 0..64 {
        if set.bits() & (1 << capability) != 0 {
            continue;
        }
        // SAFETY: prctl(2) with plain numbers. EINVAL: this kernel knows no such capability.
        match Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }) {
            Ok(_) | Err(Errno::EINVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

pub(super) fn hold_capabilities(set: Capabilities) -> Result<(), Errno> {
    let bits = set.bits();
    let mut header = Header { version: VERSION_3, pid: 0 };
    let (low, high) = (bits as u32, (bits >> 32) as u32);
    let data = [
        Data { effective: low, permitted: low, inheritable: 0 },
        Data { effective: high, permitted: high, inheritable: 0 },
    ];
    // SAFETY: capset(2) version 3 reads two data blocks; both structures live on this stack frame.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) }).map(drop)
}
