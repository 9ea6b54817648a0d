//! `cargo xtask demo`: builds everything the demo needs, then becomes it.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::setup::{self, Need};
use crate::workspace::Workspace;
use crate::{ebpf, process};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave the lab running, and print how to reach it and what to try.
    #[arg(long)]
    keep: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<()> {
    setup::require_root("the demo")?;
    setup::ensure(workspace, &[Need::Build, Need::Lab])?;
    ebpf::build(workspace, false)?;
    build_daemons(workspace)?;
    let mut demo = Command::new(workspace.target.join("debug").join("ambit-lab"));
    demo.arg("demo").env("PATH", workspace.path());
    demo.args(args.keep.then_some("--keep")).args(args.json.then_some("--json"));
    // The lab takes this process's place: signals reach it, and it cleans up.
    Err(demo.exec()).context("cannot run the lab")
}

/// All default members at once: one set of features, so nothing is built twice.
pub(crate) fn build_daemons(workspace: &Workspace) -> Result<()> {
    process::step("daemons and lab", || process::run(workspace.cargo("build").arg("--locked")))
}
