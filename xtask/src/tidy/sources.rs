//! Rules for each source file alone: its opening, its length, and words that do not belong in it.

use super::Finding;
use super::tree::File;

/// Product lines; aim at 150.
const LONGEST_FILE: usize = 600;

/// Words that are wrong in some files, and what to do instead.
struct Word {
    /// Two halves, so that this table does not find itself.
    text: (&'static str, &'static str),
    wrong_in: fn(&File) -> bool,
    instead: &'static str,
    /// Files that may, with the reason.
    except: &'static [(&'static str, &'static str)],
}

const WORDS: &[Word] = &[
    Word {
        text: ("env::", "var"),
        wrong_in: |file| is_product(file) && !file.path.ends_with("build.rs"),
        instead: "a setting is a field of the part's Config: a flag with `env`",
        except: &[("node-agent/src/bin/mesh-cni.rs", "the CNI specification passes parameters so")],
    },
    Word { text: ("/wo", "rk/"), wrong_in: |_| true, instead: "no path of one machine", except: &[] },
    Word { text: ("/ro", "ot/"), wrong_in: |_| true, instead: "no path of one machine", except: &[] },
    Word { text: ("/ho", "me/"), wrong_in: |_| true, instead: "no path of one machine", except: &[] },
];

fn is_product(file: &File) -> bool {
    file.has_extension("rs") && !file.is_test() && !file.path.starts_with("xtask/")
}

pub(super) fn check(files: &[File]) -> Vec<Finding> {
    let rust = || files.iter().filter(|file| file.has_extension("rs"));
    let mut findings: Vec<Finding> = rust().filter_map(opening).collect();
    findings.extend(rust().filter_map(length));
    findings.extend(rust().flat_map(ignored));
    findings.extend(rust().flat_map(naps));
    findings.extend(WORDS.iter().flat_map(|word| find_word(word, files)));
    findings
}

/// A file says first what it owns; a module's own tests have nothing to add to its name.
fn opening(file: &File) -> Option<Finding> {
    if file.path.ends_with("/tests.rs") {
        return None;
    }
    let first = file.text.lines().find(|line| !line.starts_with("#!") && !line.trim().is_empty());
    (!first.is_some_and(|line| line.starts_with("//!"))).then(|| {
        Finding::new(&file.path, 1, "open with `//!`: what this file owns, what it refuses, its rule")
    })
}

fn length(file: &File) -> Option<Finding> {
    let lines = file.product_lines().count();
    ((!file.is_test() || file.is_lab()) && lines > LONGEST_FILE).then(|| {
        Finding::new(&file.path, 0, format!("{lines} product lines, at most {LONGEST_FILE}: find the seam"))
    })
}

/// `#[ignore]` marks privilege only, and says which command runs the test.
fn ignored(file: &File) -> Vec<Finding> {
    let attribute = concat!("#[", "ignore");
    let wrong = |line: &str| line.trim_start().starts_with(attribute) && !line.contains("cargo xtask test");
    file.lines()
        .filter(|(_, line)| wrong(line))
        .map(|(number, _)| {
            Finding::new(&file.path, number, "say why: #[ignore = \"needs root: cargo xtask test\"]")
        })
        .collect()
}

/// The longest pause between two looks at a condition, in milliseconds.
const LONGEST_POLL: u32 = 20;

/// A test waits on conditions. A short pause is a poll's; a long one hopes that something has happened meanwhile.
fn naps(file: &File) -> Vec<Finding> {
    let call = concat!("sleep", "(");
    let is_poll = |line: &str| {
        let pause =
            line.split("from_millis(").nth(1).and_then(|rest| rest.split(')').next()?.parse::<u32>().ok());
        pause.is_some_and(|pause| pause <= LONGEST_POLL)
    };
    let wrong = |line: &str| line.contains(call) && !is_poll(line);
    let says = format!("wait on a condition; a poll pauses for {LONGEST_POLL} ms at most");
    let lines = file.lines().filter(|(_, line)| file.is_test() && !file.is_lab() && wrong(line));
    lines.map(|(number, _)| Finding::new(&file.path, number, says.as_str())).collect()
}

fn find_word(word: &Word, files: &[File]) -> Vec<Finding> {
    let text = format!("{}{}", word.text.0, word.text.1);
    let mut unused: Vec<&str> = word.except.iter().map(|(path, _)| *path).collect();
    let mut findings = Vec::new();
    for file in files.iter().filter(|file| (word.wrong_in)(file)) {
        let mut lines = file.lines().filter(|(_, line)| line.contains(&text)).peekable();
        if lines.peek().is_some() && word.except.iter().any(|(path, _)| *path == file.path) {
            unused.retain(|path| *path != file.path);
            continue;
        }
        findings.extend(
            lines.map(|(number, _)| Finding::new(&file.path, number, format!("`{text}`: {}", word.instead))),
        );
    }
    // Only where the rules see a whole checkout: an exception without its file is stale.
    findings.extend(
        unused
            .into_iter()
            .filter(|path| files.iter().any(|file| file.path == *path))
            .map(|path| Finding::new(path, 0, format!("has no `{text}` any more: drop its exception"))),
    );
    findings
}

#[cfg(test)]
mod tests {
    use super::check;
    use crate::tidy::tree::File;

    fn says(path: &str, text: &str) -> Vec<String> {
        check(&[File::new(path, text)]).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_file_opens_with_its_purpose() {
        assert_eq!(says("ztunnel/src/a.rs", "#![no_std]\n\n//! Owns a.\nfn a() {}\n"), [""; 0]);
        assert_eq!(says("ztunnel/src/a.rs", "fn a() {}\n").len(), 1);
        assert_eq!(says("ztunnel/src/a.rs", "// Not a module comment.\n").len(), 1);
    }

    #[test]
    fn the_length_of_a_file_is_counted_without_its_tests() {
        let lines = |count: usize| format!("//! A.\n{}", "fn a() {}\n".repeat(count));
        assert_eq!(says("ztunnel/src/a.rs", &lines(599)), [""; 0]);
        assert_eq!(says("ztunnel/src/a.rs", &lines(600)).len(), 1);
        assert_eq!(says("ztunnel/src/a.rs", &format!("{}#[cfg(test)]\n{}", lines(500), lines(500))), [""; 0]);
        assert_eq!(says("tests/e2e/a.rs", &lines(900)), [""; 0]);
        assert_eq!(says("tests/src/a.rs", &lines(900)).len(), 1);
    }

    #[test]
    fn an_ignored_test_says_which_command_runs_it() {
        let test = |attribute: &str| format!("//! A.\n    #[{attribute}]\n");
        assert_eq!(says("tests/a.rs", &test("ignore = \"needs root: cargo xtask test\"")), [""; 0]);
        assert_eq!(says("tests/a.rs", &test("ignore")).len(), 1);
        assert_eq!(says("tests/a.rs", &test("ignore = \"flaky\"")).len(), 1);
    }

    #[test]
    fn a_test_polls_and_does_not_nap() {
        let sleep = |how: &str| ["//! A.\nfn a() { sleep", "(", how, ") }\n"].concat();
        assert_eq!(says("tests/e2e/a.rs", &sleep("Duration::from_millis(10)")), [""; 0]);
        assert_eq!(says("tests/e2e/a.rs", &sleep("Duration::from_millis(500)")).len(), 1);
        assert_eq!(says("ztunnel/src/a/tests.rs", &sleep("Duration::from_secs(1)")).len(), 1);
        assert_eq!(says("tests/src/lab.rs", &sleep("pause")), [""; 0]);
        assert_eq!(says("ztunnel/src/a.rs", &sleep("pause")), [""; 0]);
    }

    #[test]
    fn words_are_found_where_they_are_wrong() {
        let variable = ["//! A.\nfn a() { env::", "var(\"A\") }\n"].concat();
        assert_eq!(says("ztunnel/src/a.rs", &variable).len(), 1);
        assert_eq!(says("ztunnel/build.rs", &variable), [""; 0]);
        assert_eq!(says("node-agent/src/bin/mesh-cni.rs", &variable), [""; 0]);
        assert_eq!(says("node-agent/src/bin/mesh-cni.rs", "//! A.\n").len(), 1, "a stale exception");
        assert_eq!(says("README.md", &["see /wo", "rk/main\n"].concat()).len(), 1);
    }
}
