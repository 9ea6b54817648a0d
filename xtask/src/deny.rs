//! `cargo xtask deny`: what the dependencies may be, as deny.toml says.
//!
//! cargo-deny checks all of it. Building it takes longer than the suites, so `cargo xtask test` uses it where it is
//! there already, and else checks the bans alone, with what cargo itself knows.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::tools::Tool;
use crate::workspace::Workspace;

const CARGO_DENY: Tool =
    Tool { name: "cargo-deny", version: "0.20.2", arguments: &[], environment: &[], cost: "several minutes" };

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    CARGO_DENY.ensure(workspace)?;
    process::step("dependencies: bans, licences, sources", || {
        let what = ["--locked", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"];
        process::run(workspace.cargo("deny").args(what))
    })
}

/// As much of it as there is without building anything.
pub(crate) fn run_cheaply(workspace: &Workspace) -> Result<()> {
    if CARGO_DENY.is_present(workspace) {
        return run(workspace);
    }
    process::step("dependencies: bans (cargo xtask deny checks licences too)", || {
        let rules = fs::read_to_string(workspace.root.join("deny.toml")).context("no deny.toml")?;
        let mut tree = workspace.cargo("tree");
        tree.args(["--locked", "--workspace", "--all-features", "--edges=normal,build"]);
        tree.args(["--prefix=none", "--format={p}"]);
        let graph = process::output(&mut tree).context("cargo tree failed; run it to see why")?;
        let used = used_though_banned(&rules, &graph);
        if !used.is_empty() {
            bail!("deny.toml bans {}; see who needs it: cargo tree --all-features -i NAME", used.join(", "));
        }
        Ok(())
    })
}

fn used_though_banned<'a>(rules: &'a str, graph: &str) -> Vec<&'a str> {
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("{ name = \"")?.split('"').next());
    names.filter(|name| graph.lines().any(|line| line.split(' ').next() == Some(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::used_though_banned;

    #[test]
    fn finds_a_banned_crate_in_the_graph() {
        let rules = "deny = [\n  # why\n  { name = \"ring\" },\n  { name = \"openssl-sys\" },\n]\n";
        assert_eq!(used_though_banned(rules, "rustls v0.23.4\nring v0.17.8\n"), ["ring"]);
        assert_eq!(used_though_banned(rules, "rustls v0.23.4\nstring v0.17.8\n"), [""; 0]);
    }
}
