//! Stops a thread, and those it makes, at its n-th call into the kernel that changes something: seccomp(2) hands such
//! calls to a supervisor (user notification), which lets them go on, fails them, or never answers.
//!
//! **Invariant:** only threads that asked for it are watched; the rest of the process is what answers.
#![allow(unsafe_code, reason = "seccomp(2) has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libc::{c_long, seccomp_notif, seccomp_notif_resp, sock_filter, sock_fprog};

/// What happens at the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call fails for want of memory.
    Fail,
    /// The call is never made, and its thread never comes back.
    Stop,
}

/// The supervisor's count, and what happens at which number.
#[derive(Clone, Debug, Default)]
pub struct Tripwire(Arc<Mutex<Wire>>);

#[derive(Debug, Default)]
struct Wire {
    seen: usize,
    armed: Option<(usize, Fault)>,
}

impl Tripwire {
    /// The `nth` call from now on is the one; 0: none is.
    pub fn arm(&self, nth: usize, fault: Fault) {
        *self.lock() = Wire { seen: 0, armed: Some((nth, fault)) };
    }

    /// Calls since it was armed.
    #[must_use]
    pub fn seen(&self) -> usize {
        self.lock().seen
    }

    /// Calls since it was armed; it is no longer.
    #[must_use]
    pub fn disarm(&self) -> usize {
        std::mem::take(&mut *self.lock()).seen
    }

    /// One more call; what happens to it.
    fn next(&self) -> Option<Fault> {
        let mut wire = self.lock();
        wire.seen += 1;
        wire.armed.filter(|(at, _)| *at == wire.seen).map(|(_, fault)| fault)
    }

    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches the calling thread and every thread it makes from now on; `stopped` is called when one never comes back.
    ///
    /// # Errors
    /// When the kernel has no such filters, or the process may not use them (CAP_SYS_ADMIN).
    pub fn watch(&self, stopped: impl Fn() + Send + 'static) -> io::Result<()> {
        let wire = self.clone();
        supervise(move |_| match wire.next() {
            Some(Fault::Fail) => Answer::Error(libc::ENOMEM),
            Some(Fault::Stop) => {
                stopped();
                Answer::Never
            }
            None => Answer::GoOn,
        })
    }
}

/// For the calling thread and every thread it makes from now on the kernel has neither tcx nor clsact.
///
/// # Errors
/// As for [`Tripwire::watch`].
pub fn without_interface_hooks() -> io::Result<()> {
    supervise(|call| match calls_interface_hook(call) {
        true => Answer::Error(libc::EINVAL),
        false => Answer::GoOn,
    })
}

/// BPF_LINK_CREATE for tcx, or RTM_NEWQDISC.
fn calls_interface_hook(call: &seccomp_notif) -> bool {
    const LINK_CREATE: u64 = 28;
    const TCX: [u32; 2] = [46, 47];
    const RTM_NEWQDISC: u16 = 36;
    let (number, arguments) = (c_long::from(call.data.nr), call.data.args);
    // SAFETY: the caller is a thread of this process that waits for the answer, so what it points to is there: the
    // attributes of a link, or a netlink message with its header.
    unsafe {
        if number == libc::SYS_bpf && arguments[0] == LINK_CREATE {
            return TCX.contains(&*(arguments[1] as *const u32).add(2));
        }
        number == libc::SYS_sendto
            && arguments[2] >= 16
            && *(arguments[1] as *const u16).add(2) == RTM_NEWQDISC
    }
}

/// What becomes of a call.
enum Answer {
    GoOn,
    Error(i32),
    /// Its thread never comes back.
    Never,
}

/// Asks `decide` about every such call of the calling thread and of those it makes from now on.
fn supervise(decide: impl Fn(&seccomp_notif) -> Answer + Send + 'static) -> io::Result<()> {
    let listener = install(&mut program())?;
    std::thread::spawn(move || {
        while let Ok(call) = receive(&listener) {
            let error = match decide(&call) {
                Answer::Never => continue,
                Answer::Error(error) => Some(error),
                Answer::GoOn => None,
            };
            // A thread that a signal has ended does not wait for an answer.
            let _ = answer(&listener, &call, error);
        }
    });
    Ok(())
}

/// Commands of bpf(2) that change something: map update and delete, program load, pin, link create, update and detach,
/// iterator create.
const BPF_COMMANDS: [u32; 8] = [2, 3, 5, 6, 28, 29, 33, 34];

/// Other calls that do. sendto and sendmsg are netlink's; sysctls are opened for writing.
const CALLS: [c_long; 11] = [
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_setns,
    libc::SYS_mkdirat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    // By their older names on this architecture.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(not(target_arch = "x86_64"))]
    libc::SYS_renameat2,
    #[cfg(not(target_arch = "x86_64"))]
    libc::SYS_renameat2,
];

/// Removing files, where the architecture has calls of its own for that.
#[cfg(target_arch = "x86_64")]
const REMOVALS: [c_long; 2] = [libc::SYS_unlink, libc::SYS_rmdir];
#[cfg(not(target_arch = "x86_64"))]
const REMOVALS: [c_long; 0] = [];

/// The filter: notify for the calls above, for those bpf commands, and for opening a file to write; else allow.
fn program() -> Vec<sock_filter> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const ANY_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    // struct seccomp_data: the number, and the low words of the first and third argument (little endian).
    const NUMBER: u32 = 0;
    const FIRST: u32 = 16;
    const THIRD: u32 = 32;
    let step = |code: u32, k: u32, jt: u8, jf: u8| sock_filter { code: code as u16, jt, jf, k };
    let give = |verdict: u32| step(libc::BPF_RET | libc::BPF_K, verdict, 0, 0);
    let mut program = vec![step(LOAD, NUMBER, 0, 0)];
    for call in CALLS.into_iter().chain(REMOVALS) {
        program.push(step(EQUAL, call as u32, 0, 1));
        program.push(give(libc::SECCOMP_RET_USER_NOTIF));
    }
    program.push(step(EQUAL, libc::SYS_openat as u32, 0, 4));
    program.push(step(LOAD, THIRD, 0, 0));
    program.push(step(ANY_BIT, (libc::O_WRONLY | libc::O_RDWR) as u32, 0, 1));
    program.push(give(libc::SECCOMP_RET_USER_NOTIF));
    program.push(give(libc::SECCOMP_RET_ALLOW));
    program.push(step(EQUAL, libc::SYS_bpf as u32, 1, 0));
    program.push(give(libc::SECCOMP_RET_ALLOW));
    program.push(step(LOAD, FIRST, 0, 0));
    for command in BPF_COMMANDS {
        program.push(step(EQUAL, command, 0, 1));
        program.push(give(libc::SECCOMP_RET_USER_NOTIF));
    }
    program.push(give(libc::SECCOMP_RET_ALLOW));
    program
}

fn install(program: &mut [sock_filter]) -> io::Result<OwnedFd> {
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: the program outlives the call, which copies it.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const filter,
        )
    };
    let listener = i32::try_from(listener).map_err(io::Error::other)?;
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(listener) })
}

fn receive(listener: &OwnedFd) -> io::Result<seccomp_notif> {
    loop {
        // SAFETY: plain integers, for which zero is a value; the kernel wants it so.
        let mut call: seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one structure.
        let result =
            unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) };
        if result == 0 {
            return Ok(call);
        }
        let error = io::Error::last_os_error();
        // A thread was ended before its call was looked at, or a signal came to us.
        if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) {
            return Err(error);
        }
    }
}

fn answer(listener: &OwnedFd, call: &seccomp_notif, error: Option<i32>) -> io::Result<()> {
    let mut answer = seccomp_notif_resp {
        id: call.id,
        val: 0,
        error: error.map_or(0, |error| -error),
        flags: if error.is_none() { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 } else { 0 },
    };
    // SAFETY: the kernel reads one structure.
    let result =
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
