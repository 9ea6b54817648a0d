//! `cargo xtask deny`: what the dependencies may be, as deny.toml says.

use anyhow::Result;

use crate::process;
use crate::tools::Tool;
use crate::workspace::Workspace;

const CARGO_DENY: Tool =
    Tool { name: "cargo-deny", version: "0.20.2", arguments: &[], environment: &[], cost: "several minutes" };

/// Building it takes longer than all the suites: `cargo xtask test` runs the check where it is there already.
pub(crate) fn is_present(workspace: &Workspace) -> bool {
    CARGO_DENY.is_present(workspace)
}

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    CARGO_DENY.ensure(workspace)?;
    process::step("dependencies: bans, licences, sources", || {
        process::run(workspace.cargo("deny").args([
            "--locked",
            "check",
            "--hide-inclusion-graph",
            "bans",
            "licenses",
            "sources",
        ]))
    })
}
