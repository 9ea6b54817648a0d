//! `cargo xtask demo` and `cargo xtask bench`: build everything that the lab runs, then become the lab.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
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
    /// For `ambit-lab bench`: --rounds, --seconds, --connections, --parked, --json.
    #[arg(last = true)]
    lab: Vec<String>,
}

/// Which of cargo's builds the lab runs.
#[derive(Clone, Copy)]
enum Profile {
    /// The one that the suites share.
    Dev,
    /// What a cluster would run: only such binaries are worth measuring.
    Release,
}

pub(crate) fn demo(workspace: &Workspace, args: &Demo) -> Result<()> {
    prepare(workspace, &[Need::Build, Need::Lab], Profile::Dev)?;
    become_lab(workspace, Profile::Dev, args.words())
}

impl Demo {
    /// What the lab is told.
    fn words(&self) -> impl Iterator<Item = &'static str> {
        let flags = [self.keep.then_some("--keep"), self.json.then_some("--json")];
        ["demo"].into_iter().chain(flags.into_iter().flatten())
    }
}

pub(crate) fn bench(workspace: &Workspace, args: &Bench) -> Result<()> {
    prepare(workspace, &[Need::Build, Need::Lab], Profile::Release)?;
    let arguments = ["bench"].into_iter().chain(args.lab.iter().map(String::as_str));
    become_lab(workspace, Profile::Release, arguments)
}

/// Removes what labs left behind that were killed before they could. Best effort: the next lab does it too.
pub(crate) fn sweep(workspace: &Workspace) {
    let _ = Command::new(lab(workspace, Profile::Dev)).arg("sweep").output();
}

/// All default members at once: one set of features, so nothing is built twice.
fn prepare(workspace: &Workspace, needs: &[Need], profile: Profile) -> Result<()> {
    setup::require_root("the lab")?;
    setup::ensure(workspace, needs)?;
    ebpf::build(workspace, false)?;
    process::step("daemons and lab", || {
        let mut build = workspace.cargo("build");
        build.args(["--locked", "--bins"]);
        build.args(matches!(profile, Profile::Release).then_some("--release"));
        process::run(&mut build)
    })
}

/// The lab takes this process's place: signals reach it, and it cleans up.
fn become_lab<'a>(
    workspace: &Workspace,
    profile: Profile,
    arguments: impl Iterator<Item = &'a str>,
) -> Result<()> {
    let mut lab = Command::new(lab(workspace, profile));
    lab.args(arguments).current_dir(&workspace.root).env("PATH", workspace.path());
    Err(lab.exec()).context("cannot run the lab")
}

fn lab(workspace: &Workspace, profile: Profile) -> PathBuf {
    let directory = match profile {
        Profile::Dev => "debug",
        Profile::Release => "release",
    };
    workspace.target.join(directory).join("ambit-lab")
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::Task;

    #[test]
    fn the_lab_is_told_what_the_task_was_told() {
        for (line, expected) in [
            (&["xtask", "demo"][..], &["demo"][..]),
            (&["xtask", "demo", "--keep"], &["demo", "--keep"]),
            (&["xtask", "demo", "--json", "--keep"], &["demo", "--keep", "--json"]),
        ] {
            let Task::Demo(demo) = Task::parse_from(line) else { panic!("{line:?} is another task") };
            assert_eq!(demo.words().collect::<Vec<_>>(), expected);
        }
    }
}
