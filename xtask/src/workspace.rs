//! Where things are: the checkout, its target directory, and the tools built into it.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// The checkout that this task works on.
pub(crate) struct Workspace {
    /// The directory of the workspace's Cargo.toml.
    pub(crate) root: PathBuf,
    /// Cargo's target directory: `CARGO_TARGET_DIR`, else `target` in the checkout.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// The checkout whose `cargo xtask` is running.
    pub(crate) fn find() -> Result<Self> {
        let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&manifest).parent().context("xtask has no parent directory")?.to_path_buf();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(directory) => env::current_dir()?.join(directory),
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// Root of `cargo install` for the tools that tasks build once.
    pub(crate) fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// A tool that tasks build once.
    pub(crate) fn tool(&self, name: &str) -> PathBuf {
        self.tools().join("bin").join(name)
    }

    /// The object that the agent embeds.
    pub(crate) fn ebpf_object(&self) -> PathBuf {
        self.target.join("ebpf").join("mesh-ebpf")
    }

    /// The same of programs that log, for the test that loads them.
    pub(crate) fn ebpf_logging_object(&self) -> PathBuf {
        self.ebpf_object().with_file_name("mesh-ebpf-log")
    }

    /// The same with maps of another layout, for the agent that upgrades are tested with.
    pub(crate) fn ebpf_other_object(&self) -> PathBuf {
        self.ebpf_object().with_file_name("mesh-ebpf-other")
    }

    /// `cargo` with the lock file as it is, in the checkout.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(&self.root).arg(subcommand);
        cargo.env("PATH", self.path());
        cargo
    }

    /// `PATH` for children: the daemons just built, then the tools, then the caller's.
    pub(crate) fn path(&self) -> OsString {
        let own = [self.target.join("debug"), self.tools().join("bin")];
        let callers = env::var_os("PATH").unwrap_or_default();
        env::join_paths(own.into_iter().chain(env::split_paths(&callers))).unwrap_or(callers)
    }
}
