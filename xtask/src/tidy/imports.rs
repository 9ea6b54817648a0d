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
    ("xtask", &[]),
];

const PACKAGES: [&str; 6] =
    ["mesh-core", "mesh-ebpf", "mesh-ebpf-abi", "node-agent", "ztunnel", "mesh-tests"];

/// Foreign crates and the only product files that may name them: a path, or a directory with its `/`.
const FOREIGN: &[(&str, &[&str])] = &[];

pub(super) fn check(files: &[File]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = files.iter().flat_map(room).collect();
    findings.extend(FOREIGN.iter().flat_map(|(name, allowed)| foreign(name, allowed, files)));
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
    let may = |path: &str| {
        allowed.iter().any(|entry| path == *entry || (entry.ends_with('/') && path.starts_with(entry)))
    };
    let product =
        files.iter().filter(|file| file.has_extension("rs") && file.path.contains("src/") && !file.is_test());
    product
        .filter(|file| !may(&file.path))
        .flat_map(|file| file.product_lines().map(move |(number, line)| (file, number, line)))
        .filter(|(_, _, line)| names_crate(line, name))
        .map(|(file, number, _)| {
            Finding::new(&file.path, number, format!("names `{name}`, which is for: {}", allowed.join(", ")))
        })
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
    use super::{foreign, names_crate, room};
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
        let files = |path: &str| [File::new(path, "use kube::Client;\n")];
        let check = |path: &str| {
            foreign("kube", &["node-agent/src/watch.rs", "node-agent/src/ca/"], &files(path)).len()
        };
        assert_eq!(check("node-agent/src/watch.rs"), 0);
        assert_eq!(check("node-agent/src/ca/roots.rs"), 0);
        assert_eq!(check("node-agent/src/index.rs"), 1);
        assert_eq!(check("tests/src/lab.rs"), 0);
    }
}
