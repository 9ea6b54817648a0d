//! `cargo xtask bench`: what the mesh costs, measured with optimised binaries; everything after `--` goes to the lab.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::setup::{self, Need};
use crate::workspace::Workspace;
use crate::{ebpf, process};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// For `ambit-lab bench`: --rounds, --seconds, --connections, --parked, --json.
    #[arg(last = true)]
    lab: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<()> {
    setup::require_root("the benchmark")?;
    setup::ensure(workspace, &[Need::Build, Need::Lab])?;
    ebpf::build(workspace, false)?;
    process::step("optimised daemons and lab", || {
        process::run(workspace.cargo("build").args(["--locked", "--release"]))
    })?;
    let mut bench = Command::new(workspace.target.join("release").join("ambit-lab"));
    bench.arg("bench").args(&args.lab).env("PATH", workspace.path());
    // The lab takes this process's place: signals reach it, and it cleans up.
    Err(bench.exec()).context("cannot run the lab")
}
