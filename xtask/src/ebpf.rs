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
/// The feature with which programs log.
const LOG: &str = "log";
/// The LLVM that bpf-linker is built against.
const LLVM: u32 = 22;
const FLAGS: [&str; 3] = ["-Clinker=bpf-linker", "-Cdebuginfo=2", "-Clink-arg=--btf"];
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// Where rustup's component rust-src has `core`, below the sysroot.
const CORE: &str = "lib/rustlib/src/rust/library/core/src/lib.rs";

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
    /// Also the agent of another map layout, which `ambit-lab upgrades --agent` changes to.
    #[arg(long)]
    other_layout: bool,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<()> {
    build(workspace, args.debug)?;
    build_logging(workspace)?;
    if args.other_layout { build_other_agent(workspace) } else { Ok(()) }
}

/// Builds the object if anything it is made of changed, and puts it where the agent's build looks for it.
pub(crate) fn build(workspace: &Workspace, debug: bool) -> Result<()> {
    setup::ensure(workspace, &[Need::Build])?;
    BPF_LINKER.ensure(workspace)?;
    process::step("eBPF programs", || {
        object(workspace, if debug { LOG } else { "" }, &workspace.ebpf_object())
    })
}

/// Builds the object that logs beside the other, for the suite that loads both.
pub(crate) fn build_logging(workspace: &Workspace) -> Result<()> {
    process::step("eBPF programs that log", || object(workspace, LOG, &workspace.ebpf_logging_object()))
}

/// Builds the agent whose maps look otherwise, with its programs.
pub(crate) fn build_other_agent(workspace: &Workspace) -> Result<()> {
    process::step("an agent of another map layout", || {
        object(workspace, "other-layout", &workspace.ebpf_other_object())?;
        let binary = ["--bin", "node-agent-other-layout", "--features", "node-agent/other-layout"];
        process::run(workspace.cargo("build").args(["--locked", "--quiet"]).args(binary))
    })
}

fn object(workspace: &Workspace, features: &str, place: &Path) -> Result<()> {
    let out = workspace.target.join("ebpf-build");
    process::run(cargo_build(workspace, compiler(), &out, features).arg("--quiet"))?;
    install(&out.join(TARGET).join("ebpf").join("mesh-ebpf"), place)
}

/// Who compiles the kernel programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compiler {
    /// rustup's nightly, which builds `core` itself.
    Nightly,
    /// Debian's rustc, with a `core` that is built already.
    Debian,
}

fn cargo_build(workspace: &Workspace, compiler: Compiler, out: &Path, features: &str) -> Command {
    let mut flags = FLAGS.to_vec();
    let mut build = match compiler {
        // As the nightly was found, so that it is the same one whatever `cargo` is first on the PATH.
        Compiler::Nightly => {
            let mut build = Command::new("rustup");
            build.current_dir(&workspace.root).env("PATH", workspace.path());
            build.args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
            build
        }
        Compiler::Debian => {
            // It comes without clippy, so its own warnings are the lints there are. Those of a nightly change daily.
            flags.push("-Dwarnings");
            let mut build = workspace.cargo("build");
            build.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
            build
        }
    };
    build.args(["--locked", "--package", "mesh-ebpf", "--profile", "ebpf", "--target", TARGET]);
    build.arg("--target-dir").arg(out);
    if !features.is_empty() {
        build.args(["--features", features]);
    }
    build.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    build
}

/// Is there a nightly with the sources of `core`, whose bitcode bpf-linker can read?
pub(crate) fn nightly_has_core() -> bool {
    compiler() == Compiler::Nightly
}

fn compiler() -> Compiler {
    let nightly = |arguments: &[&str]| {
        process::output(Command::new("rustup").args(["run", "nightly", "rustc"]).args(arguments))
    };
    choose(nightly(&["--print", "sysroot"]), nightly(&["-vV"]), Path::exists)
}

/// By what the nightly, if there is one, says of its sysroot and version.
fn choose(sysroot: Option<String>, version: Option<String>, exists: impl Fn(&Path) -> bool) -> Compiler {
    let has_core = sysroot.is_some_and(|root| exists(&Path::new(root.trim()).join(CORE)));
    let readable = version.and_then(|version| llvm_major(&version)).is_some_and(|major| major <= LLVM);
    if has_core && readable { Compiler::Nightly } else { Compiler::Debian }
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
    use std::ffi::OsStr;
    use std::path::Path;
    use std::process::Command;

    use super::{Compiler, LOG, cargo_build, choose, llvm_major};
    use crate::process;
    use crate::workspace::Workspace;

    const VERSION: &str =
        "rustc 1.97.0-nightly (x 2026-05-19)\nhost: x86_64-unknown-linux-gnu\nLLVM version: 22.1.4\n";

    #[test]
    fn reads_the_llvm_version_of_rustc() {
        assert_eq!(llvm_major(VERSION), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }

    #[test]
    fn a_nightly_is_chosen_only_with_the_sources_of_core_and_an_llvm_that_the_linker_reads() {
        let newer = VERSION.replace("22.1.4", "23.0.0");
        let core = Path::new("/nightly/lib/rustlib/src/rust/library/core/src/lib.rs");
        for (why, sysroot, version, sources, expected) in [
            ("all there", Some("/nightly\n"), Some(VERSION), true, Compiler::Nightly),
            ("no rust-src", Some("/nightly\n"), Some(VERSION), false, Compiler::Debian),
            ("its LLVM is newer", Some("/nightly\n"), Some(newer.as_str()), true, Compiler::Debian),
            ("no version", Some("/nightly\n"), None, true, Compiler::Debian),
            ("no nightly, or no rustup", None, None, true, Compiler::Debian),
        ] {
            let chosen = choose(sysroot.map(str::to_owned), version.map(str::to_owned), |path| {
                sources && path == core
            });
            assert_eq!(chosen, expected, "{why}");
        }
    }

    /// The value that a command gives a variable; the empty string when it removes it or leaves it alone.
    fn variable(command: &Command, name: &str) -> String {
        let value = command.get_envs().find(|(key, _)| *key == OsStr::new(name)).and_then(|(_, value)| value);
        value.unwrap_or_default().to_string_lossy().into_owned()
    }

    #[test]
    fn the_command_of_each_compiler() {
        let workspace = Workspace { root: "/w".into(), target: "/w/target".into() };
        let build = |compiler, features| cargo_build(&workspace, compiler, Path::new("/out"), features);
        let rest =
            "--locked --package mesh-ebpf --profile ebpf --target bpfel-unknown-none --target-dir /out";

        let nightly = build(Compiler::Nightly, "");
        let expected = format!("rustup run nightly cargo build -Zbuild-std=core {rest}");
        assert_eq!(process::shown(&nightly), expected);
        assert_eq!(nightly.get_current_dir(), Some(Path::new("/w")));
        assert!(variable(&nightly, "PATH").contains("/w/target/tools/bin"), "where bpf-linker is");
        assert_eq!(variable(&nightly, "RUSTC"), "");
        let flags = "-Clinker=bpf-linker\u{1f}-Cdebuginfo=2\u{1f}-Clink-arg=--btf";
        assert_eq!(variable(&nightly, "CARGO_ENCODED_RUSTFLAGS"), flags);

        let debian = build(Compiler::Debian, LOG);
        assert!(process::shown(&debian).ends_with(&format!(" build {rest} --features log")));
        assert_eq!(variable(&debian, "RUSTC"), "/usr/bin/rustc");
        assert_eq!(variable(&debian, "RUSTC_BOOTSTRAP"), "1");
        assert_eq!(variable(&debian, "CARGO_ENCODED_RUSTFLAGS"), format!("{flags}\u{1f}-Dwarnings"));
    }
}
