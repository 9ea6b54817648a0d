//! `cargo xtask demo` and `cargo xtask bench`: build everything that the lab runs, then become the lab.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::setup::{self, Need};
use crate::workspace::Workspace;
use crate::{ebpf, process};

#[derive(clap::Args)]
pub(crate) struct Demo {
    /// Leave the lab running, and print how to reach it and what to try.
    #[arg(long)]
    keep: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct Bench {
    /// Passed to `ambit-lab bench`, which lists them with --help.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn demo(workspace: &Workspace, args: &Demo) -> Result<()> {
    let flags = [args.keep.then_some("--keep"), args.json.then_some("--json")];
    become_lab(workspace, "demo", &[Need::Build, Need::Lab], flags.into_iter().flatten())
}

pub(crate) fn bench(workspace: &Workspace, args: &Bench) -> Result<()> {
    let needs = [Need::Build, Need::Lab, Need::Bench];
    become_lab(workspace, "bench", &needs, args.arguments.iter().map(String::as_str))
}

/// All default members at once: one set of features, so nothing is built twice.
pub(crate) fn build_daemons(workspace: &Workspace) -> Result<()> {
    process::step("daemons and lab", || process::run(workspace.cargo("build").args(["--locked", "--bins"])))
}

/// Removes what labs left behind that were killed before they could.
pub(crate) fn sweep(workspace: &Workspace) {
    let lab = workspace.target.join("debug").join("ambit-lab");
    // Best effort: the next lab does it too.
    let _ = Command::new(lab).arg("sweep").output();
}

fn become_lab<'a>(
    workspace: &Workspace,
    act: &str,
    needs: &[Need],
    arguments: impl Iterator<Item = &'a str>,
) -> Result<()> {
    setup::require_root("the lab")?;
    setup::ensure(workspace, needs)?;
    ebpf::build(workspace, false)?;
    build_daemons(workspace)?;
    let lab =
        fs::canonicalize(workspace.target.join("debug").join("ambit-lab")).context("no lab was built")?;
    let mut command = Command::new(lab);
    command.arg(act).args(arguments).current_dir(&workspace.root).env("PATH", workspace.path());
    // The lab takes this process's place: signals reach it, and it cleans up.
    Err(command.exec()).context("cannot run the lab")
}
