//! `cargo xtask tidy`: the house rules that neither compiler nor clippy knows, checked by plain scanning.
//!
//! Each rule is a pure function from the files of the checkout to findings. **Invariant:** an exception stands in a
//! table beside its rule, with its reason, so that the list stays visible and short; one that is no longer needed is a
//! finding too.

mod docs;
mod imports;
mod manifests;
mod sources;
mod tree;

use std::fmt;

use anyhow::{Result, bail};

use crate::workspace::Workspace;

/// One place where a rule is broken.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    path: String,
    /// Counted from 1; 0 where the whole file is meant.
    line: usize,
    says: String,
}

impl Finding {
    fn new(path: impl Into<String>, line: usize, says: impl Into<String>) -> Self {
        Self { path: path.into(), line, says: says.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.says),
            line => write!(f, "{}:{line}: {}", self.path, self.says),
        }
    }
}

pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let files = tree::read(&workspace.root)?;
    let rules = [sources::check, imports::check, manifests::check, docs::check];
    let findings: Vec<Finding> = rules.iter().flat_map(|rule| rule(&files)).collect();
    for finding in &findings {
        println!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} findings; the rules and their exceptions are in xtask/src/tidy/", findings.len());
    }
    Ok(())
}
