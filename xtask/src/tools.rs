//! Tools built once from crates.io into target/tools, at a fixed version.

use std::fs;
use std::process::Command;

use anyhow::Result;

use crate::process;
use crate::workspace::Workspace;

/// One crate that is a command.
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    /// Arguments and environment of `cargo install`.
    pub(crate) arguments: &'static [&'static str],
    pub(crate) environment: &'static [(&'static str, &'static str)],
    /// What a first build costs, for whoever waits.
    pub(crate) cost: &'static str,
}

impl Tool {
    /// Is the wanted version there?
    pub(crate) fn is_present(&self, workspace: &Workspace) -> bool {
        process::output(Command::new(workspace.tool(self.name)).arg("--version"))
            .is_some_and(|said| said.split_whitespace().any(|word| word == self.version))
    }

    /// Builds it unless it is there.
    pub(crate) fn ensure(&self, workspace: &Workspace) -> Result<()> {
        if self.is_present(workspace) {
            return Ok(());
        }
        process::step(&format!("building {} {}, once ({})", self.name, self.version, self.cost), || {
            let build = workspace.tools().join("build");
            let mut install = workspace.cargo("install");
            install.args(["--locked", "--force", "--quiet", "--root"]).arg(workspace.tools());
            install.arg("--target-dir").arg(&build).args(["--version", self.version]);
            install.args(self.arguments).arg(self.name).envs(self.environment.iter().copied());
            process::run(&mut install)?;
            // Only the command is kept: the build is several times its size. What stays behind is used next time.
            let _ = fs::remove_dir_all(build);
            Ok(())
        })
    }
}
