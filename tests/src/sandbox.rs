//! How a process of the lab is placed: the namespaces, mounts, cgroup and capabilities it gets between fork and exec.
//!
//! A [`Plan`] is a list of [`Step`]s that are prepared beforehand and then only make system calls.
//! **Invariant:** running a step allocates nothing and takes no lock, since it runs in a forked child of a process
//! with threads.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;

pub mod capabilities;
mod enter;

pub use capabilities::Capabilities;

/// One thing a process does to itself before it becomes the program.
#[derive(Debug)]
pub enum Step {
    /// Join the cgroup whose `cgroup.procs` this is.
    Cgroup(OwnedFd),
    /// setns(2).
    Enter(OwnedFd, CloneFlags),
    /// unshare(2).
    Unshare(CloneFlags),
    /// mount(2), in all its forms.
    Mount {
        source: Option<CString>,
        target: CString,
        kind: Option<CString>,
        flags: MsFlags,
        data: Option<CString>,
    },
    /// mkdir(2); one that exists is fine.
    Directory(CString),
    /// An empty file, as the mount point of a file.
    File(CString),
    /// symlink(2): what it says, where it is.
    Link { says: CString, at: CString },
    /// Make this mount point `/` and forget the old one.
    Root(CString),
    /// The user, and the most that it or any program it runs can hold. Another user than root holds nothing.
    Credentials { uid: u32, gid: u32, capabilities: Capabilities },
    /// No exec of this process gains privileges any more.
    NoNewPrivileges,
}

impl Step {
    fn name(&self) -> &'static str {
        match self {
            Self::Cgroup(_) => "join the cgroup",
            Self::Enter(..) => "enter a namespace",
            Self::Unshare(_) => "unshare a namespace",
            Self::Mount { .. } => "mount",
            Self::Directory(_) => "make a directory",
            Self::File(_) => "make a mount point",
            Self::Link { .. } => "make a link",
            Self::Root(_) => "change the root",
            Self::Credentials { .. } => "limit user and capabilities",
            Self::NoNewPrivileges => "set no_new_privs",
        }
    }

    fn subject(&self) -> Option<&CString> {
        match self {
            Self::Mount { target, .. } => Some(target),
            Self::Directory(path) | Self::File(path) | Self::Root(path) => Some(path),
            Self::Link { at, .. } => Some(at),
            _ => None,
        }
    }

    fn run(&self) -> Result<(), Errno> {
        match self {
            Self::Cgroup(procs) => nix::unistd::write(procs, b"0").map(drop),
            Self::Enter(namespace, kind) => nix::sched::setns(namespace, *kind),
            Self::Unshare(flags) => nix::sched::unshare(*flags),
            Self::Mount { source, target, kind, flags, data } => nix::mount::mount(
                source.as_deref(),
                target.as_c_str(),
                kind.as_deref(),
                *flags,
                data.as_deref(),
            ),
            Self::Directory(path) => {
                ok_if_there(nix::unistd::mkdir(path.as_c_str(), Mode::from_bits_truncate(0o755)))
            }
            Self::File(path) => {
                let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                nix::fcntl::open(path.as_c_str(), flags, Mode::from_bits_truncate(0o644)).map(drop)
            }
            Self::Link { says, at } => {
                ok_if_there(nix::unistd::symlinkat(says.as_c_str(), nix::fcntl::AT_FDCWD, at.as_c_str()))
            }
            Self::Root(path) => {
                // pivot_root(".", ".") stacks the old root on the new one; see pivot_root(2).
                nix::unistd::chdir(path.as_c_str())?;
                nix::unistd::pivot_root(c".", c".")?;
                nix::mount::umount2(c".", MntFlags::MNT_DETACH)?;
                nix::unistd::chdir(c"/")
            }
            Self::Credentials { uid, gid, capabilities } => {
                enter::bound_capabilities(*capabilities)?;
                enter::become_user(*uid, *gid)?;
                if *uid == 0 { enter::hold_capabilities(*capabilities) } else { Ok(()) }
            }
            Self::NoNewPrivileges => enter::no_new_privileges(),
        }
    }
}

/// The steps of one process, in order.
#[derive(Debug, Default)]
pub struct Plan(Vec<Step>);

impl Plan {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub fn step(&mut self, step: Step) -> &mut Self {
        self.0.push(step);
        self
    }

    /// Every directory of `path` below `root`, which exists.
    pub fn directories(&mut self, root: &Path, path: &Path) -> &mut Self {
        let mut at = root.to_path_buf();
        for part in path.components() {
            if let std::path::Component::Normal(part) = part {
                at.push(part);
                self.step(Step::Directory(c_path(&at)));
            }
        }
        self
    }

    pub fn bind(&mut self, source: &Path, target: &Path, read_only: bool) -> &mut Self {
        self.mount(Some(source), target, None, MsFlags::MS_BIND | MsFlags::MS_REC, None);
        if read_only {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            self.mount(None, target, None, flags, None);
        }
        self
    }

    pub fn filesystem(&mut self, kind: &str, target: &Path, data: Option<&str>) -> &mut Self {
        self.mount(Some(Path::new(kind)), target, Some(kind), MsFlags::empty(), data)
    }

    /// Propagation: `MS_PRIVATE`, `MS_SLAVE` or `MS_SHARED`, for everything below `target`.
    pub fn propagation(&mut self, target: &Path, how: MsFlags) -> &mut Self {
        self.mount(None, target, None, how | MsFlags::MS_REC, None)
    }

    pub fn mount(
        &mut self,
        source: Option<&Path>,
        target: &Path,
        kind: Option<&str>,
        flags: MsFlags,
        data: Option<&str>,
    ) -> &mut Self {
        self.step(Step::Mount {
            source: source.map(c_path),
            target: c_path(target),
            kind: kind.map(c_string),
            flags,
            data: data.map(c_string),
        })
    }

    /// Do all of it in the calling thread, which should be one of its own.
    pub fn run(&self) -> Result<(), std::io::Error> {
        for step in &self.0 {
            step.run().map_err(|errno| {
                std::io::Error::new(
                    std::io::Error::from(errno).kind(),
                    format!("cannot {} ({:?}): {errno}", step.name(), step.subject()),
                )
            })?;
        }
        Ok(())
    }

    /// Have `command` do all of it between fork and exec. A step that fails is named on the child's stderr, as only
    /// the error number gets back to the parent.
    pub fn apply(self, command: &mut Command) {
        enter::before_exec(command, move || {
            for step in &self.0 {
                if let Err(errno) = step.run() {
                    complain(step);
                    return Err(errno.into());
                }
            }
            Ok(())
        });
    }
}

fn complain(step: &Step) {
    let stderr = std::io::stderr();
    let subject = step.subject().map_or(&b""[..], |path| path.as_bytes());
    for part in [b"lab: cannot ", step.name().as_bytes(), b" ", subject, b"\n"] {
        // Nobody left to tell if this fails.
        let _ = nix::unistd::write(&stderr, part);
    }
}

fn ok_if_there(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    }
}

pub(crate) fn c_path(path: &Path) -> CString {
    c_string(path.to_str().expect("the lab makes its paths of UTF-8 names"))
}

fn c_string(text: &str) -> CString {
    // A NUL cannot be in a path; a text with one is cut there, and the mount fails by name.
    CString::new(text.split('\0').next().unwrap_or_default()).unwrap_or_default()
}
