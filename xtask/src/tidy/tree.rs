//! The text files of the checkout, without what is built.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const SKIPPED: [&str; 2] = ["target", ".git"];
const READ: [&str; 6] = ["rs", "toml", "yaml", "md", "proto", "sh"];

/// One file, its path relative to the checkout with `/` between parts.
pub(super) struct File {
    pub(super) path: String,
    pub(super) text: String,
}

impl File {
    #[cfg(test)]
    pub(super) fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    pub(super) fn has_extension(&self, extension: &str) -> bool {
        Path::new(&self.path).extension().is_some_and(|own| own == extension)
    }

    /// A file of tests, or of the lab they run in.
    pub(super) fn is_test(&self) -> bool {
        self.path.starts_with("tests/") || self.path.contains("/tests/") || self.path.ends_with("tests.rs")
    }

    /// The lab is as large as a daemon, and read as often.
    pub(super) fn is_lab(&self) -> bool {
        self.path.starts_with("tests/src/") && !self.path.ends_with("tests.rs")
    }

    /// Numbered lines up to the inline test module.
    pub(super) fn product_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.lines().take_while(|(_, line)| *line != "#[cfg(test)]")
    }

    /// Lines counted from 1.
    pub(super) fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line))
    }
}

/// All files that the rules read, sorted by path.
pub(super) fn read(root: &Path) -> Result<Vec<File>> {
    let mut files = Vec::new();
    collect(root, root, &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn collect(root: &Path, directory: &Path, files: &mut Vec<File>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_symlink() || SKIPPED.contains(&name.as_ref()) {
            continue;
        }
        if path.is_dir() {
            collect(root, &path, files)?;
        } else if path.extension().is_some_and(|own| READ.iter().any(|read| own == *read)) {
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let relative = path.strip_prefix(root)?.to_string_lossy().into_owned();
            files.push(File { path: relative, text });
        }
    }
    Ok(())
}
