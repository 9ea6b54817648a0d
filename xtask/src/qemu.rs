//! `cargo xtask qemu`: the suites that are about the kernel, on Debian 12's own kernel, which is older than what a
//! developer's machine may have.
//!
//! The kernel is unpacked into the target directory, never installed. The machine sees this one's files, read-only and
//! below a layer in memory, so the test binaries and tools are the same; nothing that it does stays. It is emulated,
//! which is slow and works everywhere: that there is a /dev/kvm does not mean that it is one that does (in a virtual
//! machine it may take the guest's first instruction and no second).
//!
//! **Invariant:** a machine that does not say how its suites ended has failed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::ebpf;
use crate::process::{self, step};
use crate::setup::{self, Need};
use crate::test;
use crate::workspace::Workspace;

/// Names the package of the newest kernel of this Debian.
const KERNEL: &str = "linux-image-amd64";
const BUSYBOX: &str = "busybox-static";
const INIT: &str = include_str!("qemu/init.sh");
/// What the init script loads; all else is found by the kernel once the modules are mounted.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
/// Before what the machine says of its end.
const END: &str = "ambit-machine: exit ";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Suites to run there.
    #[arg(default_values_t = ["ebpf".to_owned(), "netns".to_owned()])]
    suites: Vec<String>,
    /// Let the processor run the machine, by /dev/kvm.
    #[arg(long)]
    kvm: bool,
    /// Memory of the machine in MiB.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// Passed to the test binaries, e.g. part of a test's name.
    #[arg(last = true)]
    filter: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<()> {
    test::are_binaries(workspace, &args.suites)?;
    setup::require_root("reading all of this machine's files")?;
    setup::ensure(workspace, &[Need::Build, Need::Lab, Need::Machine])?;
    let files = Files::at(&workspace.target.join("qemu"));
    let version = step("the other kernel", || files.kernel())?;
    ebpf::build(workspace, false)?;
    ebpf::build_logging(workspace)?;
    let binaries = step("daemons and test binaries", || binaries(workspace, &args.suites))?;
    files.initramfs(&version)?;
    files.script(workspace, &binaries, &args.filter)?;
    eprintln!("==> {} on Linux {version}", args.suites.join(", "));
    let started = Instant::now();
    let mut report = Report::default();
    process::run_lines(&mut files.machine(&version, args), |line| report.line(line))?;
    println!("\n==> summary of Linux {version} ({})", process::seconds(started.elapsed()));
    report.end()
}

/// What the machine's console told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    results: Vec<String>,
    skipped: Vec<String>,
    exit: Option<i32>,
}

impl Report {
    fn line(&mut self, line: &str) {
        let line = line.trim_end();
        if line.starts_with("test result:") {
            self.results.push(line.to_owned());
        } else if let Some(at) = line.find("skipped: ") {
            self.skipped.push(line[at..].to_owned());
        } else if let Some(code) = line.strip_prefix(END) {
            self.exit = code.parse().ok();
        }
    }

    fn end(&self) -> Result<()> {
        for line in self.skipped.iter().chain(&self.results) {
            println!("    {line}");
        }
        match self.exit {
            Some(0) if self.results.is_empty() => bail!("no suite ran"),
            Some(0) => Ok(()),
            Some(code) => bail!("tests failed in the machine (exit code {code})"),
            None => bail!("the machine ended before its suites did"),
        }
    }
}

/// What is kept between runs.
struct Files {
    directory: PathBuf,
}

impl Files {
    fn at(directory: &Path) -> Self {
        Self { directory: directory.to_path_buf() }
    }

    fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    fn modules(&self) -> PathBuf {
        self.root().join("lib/modules")
    }

    fn busybox(&self) -> PathBuf {
        self.root().join("bin/busybox")
    }

    /// Unpacks the kernel where it is not there yet; its version.
    fn kernel(&self) -> Result<String> {
        let done = self.directory.join("version");
        if let Ok(version) = fs::read_to_string(&done) {
            return Ok(version);
        }
        fs::create_dir_all(&self.directory)?;
        let show = || process::output(Command::new("apt-cache").args(["show", "--no-all-versions", KERNEL]));
        let package = show().as_deref().and_then(image).context("apt knows no kernel; run apt-get update")?;
        setup::unpack(&[&package, BUSYBOX], &self.root())?;
        let version = package.trim_start_matches("linux-image-").to_owned();
        let mut depmod = Command::new(self.busybox());
        process::run(depmod.args(["depmod", "-b"]).arg(self.root()).arg(&version))?;
        fs::write(done, &version)?;
        Ok(version)
    }

    /// The first files: busybox, and the modules by which the others are reached.
    fn initramfs(&self, version: &str) -> Result<()> {
        let layout = self.directory.join("initramfs");
        // Of an earlier run.
        let _ = fs::remove_dir_all(&layout);
        let modules = Path::new("lib/modules").join(version);
        let listed = fs::read_to_string(self.root().join(&modules).join("modules.dep"))?;
        for name in ["modules.dep", "modules.alias", "modules.symbols"] {
            copy(&self.root().join(&modules).join(name), &layout.join(&modules).join(name))?;
        }
        for module in closure(&listed, &MODULES)? {
            copy(&self.root().join(&modules).join(&module), &layout.join(&modules).join(&module))?;
        }
        copy(&self.busybox(), &layout.join("bin/busybox"))?;
        fs::write(layout.join("init"), INIT)?;
        let pack = "chmod +x init && find . | \"$1\" cpio -o -H newc > ../initramfs.cpio";
        let mut shell = Command::new("sh");
        process::run(shell.current_dir(&layout).args(["-c", pack, "sh"]).arg(self.busybox()))
    }

    /// What the machine runs.
    fn script(&self, workspace: &Workspace, binaries: &[PathBuf], filter: &[String]) -> Result<()> {
        let path = workspace.path();
        let mut script = format!("export PATH={}\nexport HOME=/\n", quoted(&path.to_string_lossy()));
        for name in ["AMBIT_GUARD_HOOK", "AMBIT_FAULTS", "AMBIT_CYCLES"] {
            if let Ok(value) = std::env::var(name) {
                script += &format!("export {name}={}\n", quoted(&value));
            }
        }
        script += &format!("cd {}\ncode=0\n", quoted(&workspace.root.to_string_lossy()));
        let filter: String = filter.iter().map(|word| format!(" {}", quoted(word))).collect();
        for binary in binaries {
            let binary = quoted(&binary.to_string_lossy());
            script += &format!("{binary} --ignored --test-threads=1 --color=never{filter} || code=1\n");
        }
        script += "exit $code\n";
        fs::write(self.directory.join("suites.sh"), script).context("cannot write the machine's script")
    }

    fn machine(&self, version: &str, args: &Args) -> Command {
        let shown = |path: PathBuf| path.to_string_lossy().into_owned();
        let command_line = format!(
            "console=ttyS0 quiet loglevel=3 panic=-1 ambit.script={} ambit.modules={}",
            shown(self.directory.join("suites.sh")),
            shown(self.modules())
        );
        let processors = std::thread::available_parallelism().map_or(1, |number| number.get().min(4));
        let mut machine = Command::new("qemu-system-x86_64");
        let accelerator = if args.kvm { "q35,accel=kvm" } else { "q35,accel=tcg" };
        machine.args(["-machine", accelerator, "-cpu", "max", "-no-reboot", "-nodefaults"]);
        machine.args(["-display", "none", "-serial", "stdio", "-net", "none"]);
        machine.args(["-smp", &processors.to_string(), "-m", &args.memory.to_string()]);
        machine.arg("-kernel").arg(self.root().join(format!("boot/vmlinuz-{version}")));
        machine.arg("-initrd").arg(self.directory.join("initramfs.cpio"));
        machine.args(["-append", &command_line]);
        machine
            .args(["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"]);
        machine
    }
}

/// The package of the kernel that the package `KERNEL` stands for, of what apt-cache shows.
fn image(shown: &str) -> Option<String> {
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let first = depends.split([',', ' ', '(']).find(|word| word.starts_with("linux-image-"))?;
    Some(first.to_owned())
}

/// The files of modules and of all they need, of a modules.dep.
fn closure(listed: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for name in wanted {
        let is_it = |path: &str| {
            let file = path.rsplit('/').next().unwrap_or(path);
            file.split('.').next().is_some_and(|stem| stem.replace('-', "_") == *name)
        };
        let line = listed.lines().find(|line| line.split_once(':').is_some_and(|(path, _)| is_it(path)));
        let line = line.with_context(|| format!("the kernel has no module {name}"))?;
        files.extend(line.split([':', ' ']).filter(|word| !word.is_empty()).map(str::to_owned));
    }
    files.sort();
    files.dedup();
    Ok(files)
}

/// Builds what the suites need; the suites' binaries.
fn binaries(workspace: &Workspace, suites: &[String]) -> Result<Vec<PathBuf>> {
    let mut build = workspace.cargo("build");
    build.args(["--locked", "--bins", "--tests", "--quiet", "--message-format=json-render-diagnostics"]);
    let mut artifacts = String::new();
    // Its own lines are not for people.
    let output =
        build.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the build failed");
    artifacts += &String::from_utf8_lossy(&output.stdout);
    let find = |suite: &String| {
        artifacts
            .lines()
            .find_map(|line| executable(line, suite))
            .with_context(|| format!("no suite `{suite}`"))
    };
    suites.iter().map(find).collect()
}

/// The binary of a suite, if this line of cargo's is about it.
fn executable(line: &str, suite: &str) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Artifact {
        target: Target,
        executable: Option<PathBuf>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    let artifact: Artifact = serde_json::from_str(line).ok()?;
    let is_it = artifact.target.name == suite && artifact.target.kind.iter().any(|kind| kind == "test");
    artifact.executable.filter(|_| is_it)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_package_of_the_kernel() {
        let shown = "Package: linux-image-amd64\nDepends: linux-image-6.1.0-30-amd64 (= 6.1.124-1)\n";
        assert_eq!(image(shown).as_deref(), Some("linux-image-6.1.0-30-amd64"));
        assert_eq!(image("Package: linux-image-amd64\n"), None);
    }

    #[test]
    fn modules_come_with_what_they_need() {
        let listed = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs/netfs.ko\n\
                      kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio-ring.ko\n\
                      kernel/net/9p/9pnet.ko:\n";
        let files = closure(listed, &["9p", "virtio_pci"]).unwrap();
        assert_eq!(files.len(), 5);
        assert!(files.contains(&"kernel/net/9p/9pnet.ko".to_owned()));
        assert!(closure(listed, &["overlay"]).is_err());
    }

    #[test]
    fn a_machine_that_does_not_say_how_it_ended_has_failed() {
        let report = |lines: &[&str]| {
            let mut report = Report::default();
            lines.iter().for_each(|line| report.line(line));
            report
        };
        let passed = "test result: ok. 3 passed; 0 failed; 0 ignored\r";
        let all = report(&[passed, "test a ... skipped: a: no tcx\r", "ambit-machine: exit 0\r"]);
        assert_eq!(all.skipped, ["skipped: a: no tcx"]);
        assert!(all.end().is_ok());
        assert!(report(&[passed]).end().is_err());
        assert!(report(&[passed, "ambit-machine: exit 1\r"]).end().is_err());
        assert!(report(&["ambit-machine: exit 0"]).end().is_err());
    }

    #[test]
    fn the_binary_of_a_suite() {
        let line = r#"{"reason":"compiler-artifact","target":{"name":"netns","kind":["test"]},"executable":"/t/netns-1"}"#;
        assert_eq!(executable(line, "netns"), Some("/t/netns-1".into()));
        assert_eq!(executable(line, "ebpf"), None);
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#, "netns"), None);
    }

    #[test]
    fn words_for_the_shell() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
