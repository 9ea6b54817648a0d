//! `cargo xtask ebpf`: builds the kernel programs.
//!
//! Two ways, in this order: a rustup nightly that has rust-src builds `core` itself; else Debian's `rustc-web`, whose
//! package `libstd-rust-web-dev-bpf` carries `core` for the BPF target. Both link with bpf-linker, which reads LLVM
//! bitcode and so must not be older than the compiler's LLVM.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;
use crate::setup::{self, Need};
use crate::tools::Tool;
use crate::workspace::Workspace;

const TARGET: &str = "bpfel-unknown-none";
/// The LLVM that bpf-linker is built against.
const LLVM: u32 = 22;
/// Debian's compiler comes without clippy, so its own warnings are the lints there are.
const FLAGS: [&str; 4] = ["-Clinker=bpf-linker", "-Cdebuginfo=2", "-Clink-arg=--btf", "-Dwarnings"];
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

const BPF_LINKER: Tool = Tool {
    name: "bpf-linker",
    version: "0.13.0",
    arguments: &["--no-default-features", "--features", "llvm-22"],
    environment: &[("LLVM_PREFIX", "/usr/lib/llvm-22")],
    cost: "a minute",
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Programs that log through aya-log: slower, for development.
    #[arg(long)]
    debug: bool,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<()> {
    build(workspace, args.debug)
}

/// Builds the object if anything it is made of changed, and puts it where the agent's build looks for it.
pub(crate) fn build(workspace: &Workspace, debug: bool) -> Result<()> {
    setup::ensure(workspace, &[Need::Build])?;
    BPF_LINKER.ensure(workspace)?;
    process::step("eBPF programs", || {
        let out = workspace.target.join("ebpf-build");
        process::run(cargo_build(workspace, &out, debug).arg("--quiet"))?;
        install(&out.join(TARGET).join("ebpf").join("mesh-ebpf"), &workspace.ebpf_object())
    })
}

fn cargo_build(workspace: &Workspace, out: &Path, debug: bool) -> Command {
    let mut build = if nightly_has_core() {
        let mut build = Command::new("cargo");
        build.current_dir(&workspace.root).args(["+nightly", "build", "-Zbuild-std=core"]);
        build.env("PATH", workspace.path()).env_remove("RUSTUP_TOOLCHAIN");
        build
    } else {
        let mut build = workspace.cargo("build");
        build.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
        build
    };
    build.args(["--locked", "--package", "mesh-ebpf", "--profile", "ebpf", "--target", TARGET]);
    build.arg("--target-dir").arg(out);
    if debug {
        build.args(["--features", "log"]);
    }
    build.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"));
    build
}

/// Is there a nightly with the sources of `core`, whose bitcode bpf-linker can read?
pub(crate) fn nightly_has_core() -> bool {
    let nightly = |arguments: &[&str]| {
        process::output(Command::new("rustup").args(["run", "nightly", "rustc"]).args(arguments))
    };
    let core = "lib/rustlib/src/rust/library/core/src/lib.rs";
    nightly(&["--print", "sysroot"]).is_some_and(|root| Path::new(root.trim()).join(core).exists())
        && nightly(&["-vV"]).and_then(|version| llvm_major(&version)).is_some_and(|major| major <= LLVM)
}

/// The compiler's LLVM, from `rustc -vV`.
fn llvm_major(version: &str) -> Option<u32> {
    let line = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    line.split('.').next()?.parse().ok()
}

/// Copies only when the bytes differ: the agent is rebuilt whenever the object is newer.
fn install(built: &Path, object: &Path) -> Result<()> {
    let bytes = fs::read(built).with_context(|| format!("no object at {}", built.display()))?;
    if fs::read(object).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    if let Some(directory) = object.parent() {
        fs::create_dir_all(directory)?;
    }
    // Renamed into place, so that a build running beside this one never embeds half an object.
    let half = object.with_extension("new");
    fs::write(&half, bytes)?;
    fs::rename(&half, object).with_context(|| format!("cannot write {}", object.display()))
}

#[cfg(test)]
mod tests {
    use super::llvm_major;

    #[test]
    fn reads_the_llvm_version_of_rustc() {
        let said = "rustc 1.96.0 (x 2026-06-01)\nhost: x86_64-unknown-linux-gnu\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(llvm_major(said), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }
}
