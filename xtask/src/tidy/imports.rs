//! Who may import whom. Rooms meet in protos and in map layouts, not in each other's code; and a foreign crate that
//! shapes what it touches (the Kubernetes client, the eBPF loader) is named in few files.

use super::Finding;
use super::tree::File;

/// Each package's directory and the packages of this workspace it may import.
const ROOMS: &[(&str, &[&str])] = &[
    ("mesh-ebpf/abi", &[]),
    ("mesh-ebpf", &["mesh-ebpf-abi"]),
    ("mesh-core", &[]),
    ("ztunnel", &["mesh-core", "mesh-ebpf-abi"]),
    ("node-agent", &["mesh-core", "mesh-ebpf-abi"]),
    ("tests", &["mesh-core", "mesh-ebpf-abi", "node-agent", "ztunnel"]),
    ("tests/fuzz", &["mesh-core", "mesh-ebpf-abi", "node-agent", "ztunnel"]),
    ("xtask", &[]),
];

const PACKAGES: [&str; 6] =
    ["mesh-core", "mesh-ebpf", "mesh-ebpf-abi", "node-agent", "ztunnel", "mesh-tests"];

/// The rooms whose code the tables below are about.
const DAEMONS: [&str; 3] = ["mesh-core/src/", "node-agent/src/", "ztunnel/src/"];

/// Foreign crates and the only files of the daemons that may name them; `watch` stands for watch.rs and watch/.
const FOREIGN: &[(&str, &[&str])] = &[
    ("aya", &["node-agent/src/datapath", "ztunnel/src/flag"]),
    ("h2", &["mesh-core/src/hbone"]),
    ("hyper", &["mesh-core/src/status"]),
    ("kube", &["node-agent/src/app", "node-agent/src/ca", "node-agent/src/cluster", "node-agent/src/watch"]),
    (
        "tonic",
        &[
            "mesh-core/src/certs",
            "mesh-core/src/proto",
            "mesh-core/src/xds/client",
            "node-agent/src/ca",
            "node-agent/src/xds/remote",
            "node-agent/src/xds/server",
        ],
    ),
];

/// Decisions: functions of their arguments, which a table can test. They know no runtime, no socket and no client.
const PURE: &[&str] = &[
    "mesh-core/src/addr",
    "mesh-core/src/authz",
    "mesh-core/src/certs/health",
    "mesh-core/src/convert",
    "mesh-core/src/identity",
    "mesh-core/src/service",
    "mesh-core/src/store",
    "mesh-core/src/tls/crl",
    "mesh-core/src/workload",
    "mesh-core/src/xds/stream",
    "node-agent/src/ca/rotation",
    "node-agent/src/cni/conflist",
    "node-agent/src/cni/spec",
    "node-agent/src/index",
    "node-agent/src/xds/session",
    "node-agent/src/xds/snapshot",
    "ztunnel/src/dns/answer",
    "ztunnel/src/dns/message",
    "ztunnel/src/dns/names",
    "ztunnel/src/outbound/plan",
    "ztunnel/src/sockets/datagram",
];
const NOT_PURE: [&str; 6] = ["aya", "kube", "nix", "socket2", "tokio", "tonic"];

pub(super) fn check(files: &[File]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = files.iter().flat_map(room).collect();
    findings.extend(FOREIGN.iter().flat_map(|(name, allowed)| foreign(name, allowed, files)));
    findings.extend(NOT_PURE.iter().flat_map(|name| impure(name, files)));
    findings
}

/// A manifest's dependencies, against the table.
fn room(file: &File) -> Vec<Finding> {
    let Some(directory) = file.path.strip_suffix("/Cargo.toml") else { return Vec::new() };
    let Some((_, allowed)) = ROOMS.iter().find(|(room, _)| *room == directory) else {
        return vec![Finding::new(
            &file.path,
            0,
            "a new room: say in the table of imports.rs whom it may import",
        )];
    };
    let mut section = "";
    let mut findings = Vec::new();
    for (number, line) in file.lines() {
        if line.starts_with('[') {
            section = line;
        }
        let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
        if section.contains("dependencies") && PACKAGES.contains(&name) && !allowed.contains(&name) {
            findings.push(Finding::new(&file.path, number, format!("{directory} may not import {name}")));
        }
    }
    findings
}

fn foreign(name: &str, allowed: &[&str], files: &[File]) -> Vec<Finding> {
    let elsewhere = |file: &&File| is_daemon(file) && !allowed.iter().any(|module| is_of(&file.path, module));
    let says = format!("names `{name}`, which is for {}", allowed.join(", "));
    named(name, files.iter().filter(elsewhere), &says)
}

fn impure(name: &str, files: &[File]) -> Vec<Finding> {
    let pure = |file: &&File| is_daemon(file) && PURE.iter().any(|module| is_of(&file.path, module));
    named(name, files.iter().filter(pure), &format!("names `{name}` in a pure module"))
}

fn is_daemon(file: &File) -> bool {
    file.has_extension("rs") && !file.is_test() && DAEMONS.iter().any(|room| file.path.starts_with(room))
}

/// Is `path` the module's file or one below it?
fn is_of(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

fn named<'a>(name: &str, files: impl Iterator<Item = &'a File>, says: &str) -> Vec<Finding> {
    files
        .flat_map(|file| file.product_lines().map(move |(number, line)| (file, number, line)))
        .filter(|(_, _, line)| names_crate(line, name))
        .map(|(file, number, _)| Finding::new(&file.path, number, says))
        .collect()
}

/// Does a line of code, not a comment, have a path that starts with the crate?
fn names_crate(line: &str, name: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices(name).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = &code[at + name.len()..];
        let starts = !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':');
        starts
            && (after.starts_with("::") || (code.trim_start().starts_with("use ") && after.starts_with(';')))
    })
}

#[cfg(test)]
mod tests {
    use super::{foreign, impure, names_crate, room};
    use crate::tidy::tree::File;

    #[test]
    fn the_daemons_do_not_import_each_other() {
        let manifest = |dependency: &str| {
            room(&File::new(
                "ztunnel/Cargo.toml",
                &format!("[package]\nname = \"ztunnel\"\n[dependencies]\n{dependency}\n"),
            ))
        };
        assert_eq!(manifest("mesh-core.workspace = true"), []);
        assert_eq!(manifest("mesh-ebpf-abi = { workspace = true }"), []);
        assert_eq!(manifest("node-agent.workspace = true").len(), 1);
        assert_eq!(room(&File::new("waypoint/Cargo.toml", "")).len(), 1);
    }

    #[test]
    fn a_crate_is_named_by_a_path_that_starts_with_it() {
        assert!(names_crate("use kube::Client;", "kube"));
        assert!(names_crate("    fn a(client: kube::Client) {}", "kube"));
        assert!(!names_crate("// kube::Client is elsewhere", "kube"));
        assert!(!names_crate("use crate::kube::Client;", "kube"));
        assert!(!names_crate("use my_kube::Client;", "kube"));
    }

    #[test]
    fn a_foreign_crate_stays_in_its_files() {
        let check = |path: &str| {
            let files = [File::new(path, "use kube::Client;\n")];
            foreign("kube", &["node-agent/src/watch", "node-agent/src/ca"], &files).len()
        };
        assert_eq!(check("node-agent/src/watch.rs"), 0);
        assert_eq!(check("node-agent/src/ca/roots.rs"), 0);
        assert_eq!(check("node-agent/src/cache.rs"), 1);
        assert_eq!(check("node-agent/src/index.rs"), 1);
        assert_eq!(check("tests/src/lab.rs"), 0);
    }

    #[test]
    fn a_pure_module_knows_no_runtime() {
        let check = |path: &str, text: &str| impure("tokio", &[File::new(path, text)]).len();
        assert_eq!(check("node-agent/src/index/pod.rs", "use tokio::sync::mpsc;\n"), 1);
        assert_eq!(check("node-agent/src/index/pod.rs", "#[cfg(test)]\nuse tokio::sync::mpsc;\n"), 0);
        assert_eq!(check("node-agent/src/watch.rs", "use tokio::sync::mpsc;\n"), 0);
    }
}
