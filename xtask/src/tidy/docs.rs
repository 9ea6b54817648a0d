//! What the documents name exists: files in links and in backquotes, and the README stays short.

use std::collections::BTreeSet;

use super::Finding;
use super::tree::File;

const README_LINES: usize = 200;

pub(super) fn check(files: &[File]) -> Vec<Finding> {
    let known: BTreeSet<&str> = files.iter().map(|file| file.path.as_str()).collect();
    let mut findings = Vec::new();
    for file in files.iter().filter(|file| file.has_extension("md")) {
        if file.path == "README.md" && file.lines().count() > README_LINES {
            findings.push(Finding::new(
                &file.path,
                0,
                format!("more than {README_LINES} lines: move some to ARCHITECTURE.md"),
            ));
        }
        for (number, line) in file.lines() {
            let named =
                links(line).map(|link| beside(&file.path, link)).chain(paths(line).map(str::to_owned));
            findings.extend(
                named
                    .filter(|path| !exists(path, &known))
                    .map(|path| Finding::new(&file.path, number, format!("there is no {path}"))),
            );
        }
    }
    findings
}

/// Targets of `[text](target)` that are files of the checkout.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', '#']).next())
        .filter(|t| !t.is_empty() && !t.contains(':'))
}

/// Words in backquotes that look like a file of this workspace: `room/.../name.extension`.
fn paths(line: &str) -> impl Iterator<Item = &str> {
    let looks = |word: &&str| {
        let plain = word.chars().all(|c| c.is_ascii_alphanumeric() || "/_-.".contains(c));
        let source = [".rs", ".yaml", ".proto", ".md", ".toml"].iter().any(|end| word.ends_with(end));
        plain && source && word.contains('/') && !word.starts_with(['/', '.']) && !word.starts_with("target/")
    };
    line.split('`').skip(1).step_by(2).filter(looks)
}

/// A link is relative to the file it stands in.
fn beside(file: &str, link: &str) -> String {
    let mut parts: Vec<&str> = file.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            "." | "" => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn exists(path: &str, known: &BTreeSet<&str>) -> bool {
    let directory = format!("{path}/");
    path == "LICENSE" || known.contains(path) || known.iter().any(|file| file.starts_with(&directory))
}

#[cfg(test)]
mod tests {
    use super::check;
    use crate::tidy::tree::File;

    fn findings(path: &str, text: &str) -> usize {
        let there = File::new("ztunnel/src/app.rs", "");
        check(&[File::new(path, text), there]).len()
    }

    #[test]
    fn what_a_document_names_exists() {
        assert_eq!(
            findings(
                "README.md",
                "see [the app](ztunnel/src/app.rs#L1) and `ztunnel/src/app.rs`, [x](https://x.y)"
            ),
            0
        );
        assert_eq!(findings("README.md", "see [the app](ztunnel/src/gone.rs)"), 1);
        assert_eq!(findings("README.md", "see `ztunnel/src/gone.rs`"), 1);
        assert_eq!(findings("tests/README.md", "see [it](../ztunnel/src/app.rs) in [there](../ztunnel/)"), 0);
        assert_eq!(
            findings(
                "README.md",
                "a glob `ztunnel/src/*.rs`, a host path `/etc/x.yaml`, made: `target/x.toml`"
            ),
            0
        );
    }

    #[test]
    fn the_readme_stays_short() {
        assert_eq!(findings("README.md", &"line\n".repeat(200)), 0);
        assert_eq!(findings("README.md", &"line\n".repeat(201)), 1);
    }
}
