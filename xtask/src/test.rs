//! `cargo xtask test`: what CI runs, in the order in which it is cheapest to fail.
//!
//! Suites: `static` (formatting, tidy, lints), `unit` (all that needs no root), `privileged` (what does inside the
//! crates), `fuzz` (each target of tests/fuzz for some seconds), and one per test binary (`ebpf`, `netns`, `e2e` ...) for its tests that do. Every cargo call takes all default members: one
//! choice of features, so that clippy, tests and demo share what was built.
//!
//! **Invariant:** a suite that fails stops nothing but itself, and a suite for root that ran no test has failed.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::fuzz::{self, Bound};
use crate::process::{self, step};
use crate::setup::{self, Need};
use crate::workspace::Workspace;
use crate::{deny, ebpf, lab, tidy};

const STATIC: &str = "static";
const UNIT: &str = "unit";
/// Tests inside the crates that need root.
const PRIVILEGED: &str = "privileged";
/// Each fuzz target for a few seconds.
const FUZZ: &str = "fuzz";
/// The same inputs each time: what is found by chance is found by `cargo xtask fuzz`.
const SHORT: Bound = Bound { seconds: 10, executions: 20_000, seed: 1 };
/// Run last, in this order: a fault that a smaller suite can name should be named by it.
const LAST: [&str; 3] = ["ebpf", "netns", "e2e"];
/// With this setting pods are guarded as on kernels without tcx.
const GUARD_HOOK: (&str, &str) = ("AMBIT_GUARD_HOOK", "clsact");
/// The tests of `netns` that notice; they are run both ways.
const GUARDED: &[&str] = &[
    "captured::",
    "guard::",
    "fail_closed::",
    "faults::",
    "kinds::",
    "lifecycle::",
    "older::",
    "probes::",
    "refuse::",
    "upheaval::",
    "carried::",
    "handover::",
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Suites to run; all of them when none is named. `cargo xtask test list` names them.
    suites: Vec<String>,
    /// Passed to the test binaries, e.g. part of a test's name.
    #[arg(last = true)]
    filter: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<()> {
    let known = suites(workspace)?;
    if args.suites == ["list"] {
        println!("{}", known.join("\n"));
        return Ok(());
    }
    let mut chosen = choose(&known, &args.suites)?;
    let checks = chosen.iter().any(|suite| suite == STATIC);
    chosen.retain(|suite| suite != STATIC);
    if chosen.iter().any(|suite| suite != UNIT && suite != FUZZ) {
        setup::require_root("this suite")?;
    }
    let started = Instant::now();
    if checks {
        check_format_and_rules(workspace)?;
    }
    if !chosen.is_empty() {
        let fuzz = chosen.iter().any(|suite| suite == FUZZ).then_some(Need::Fuzz);
        setup::ensure(workspace, &[Need::Build, Need::Lab].into_iter().chain(fuzz).collect::<Vec<_>>())?;
        ebpf::build(workspace, false)?;
        ebpf::build_logging(workspace)?;
    }
    if checks {
        lint(workspace)?;
    }
    if chosen.is_empty() {
        return Ok(());
    }
    step("daemons, lab and test binaries", || {
        process::run(workspace.cargo("build").args(["--locked", "--bins", "--tests"]))
    })?;
    if chosen.iter().any(|suite| suite == "e2e") {
        ebpf::build_other_agent(workspace)?;
    }
    let reports = run_suites(workspace, &chosen, &args.filter);
    // A suite that was killed could not end its labs.
    lab::sweep(workspace);
    let reports = reports?;
    summarise(&reports, started)
}

/// Seconds each, and neither needs anything built.
fn check_format_and_rules(workspace: &Workspace) -> Result<()> {
    step("formatting", || process::run(workspace.cargo("fmt").args(["--all", "--check"])))?;
    step("house rules", || tidy::run(workspace))
}

fn lint(workspace: &Workspace) -> Result<()> {
    deny::run_cheaply(workspace)?;
    step("lints", || {
        process::run(workspace.cargo("clippy").args([
            "--locked",
            "--all-targets",
            "--quiet",
            "--",
            "-Dwarnings",
        ]))
    })
}

/// All suites, in the order in which they run.
fn suites(workspace: &Workspace) -> Result<Vec<String>> {
    let mut binaries = binaries(workspace)?;
    binaries.sort_by_key(|name| LAST.iter().position(|last| last == name).map_or(0, |place| place + 1));
    Ok([STATIC, UNIT, PRIVILEGED, FUZZ].map(str::to_owned).into_iter().chain(binaries).collect())
}

fn binaries(workspace: &Workspace) -> Result<Vec<String>> {
    let metadata =
        process::output(workspace.cargo("metadata").args(["--locked", "--no-deps", "--format-version=1"]))
            .context("cargo metadata failed; run it to see why")?;
    test_binaries(&metadata)
}

/// Whether each of these suites is a test binary of its own.
///
/// # Errors
/// When one is not: it names those that are.
pub(crate) fn are_binaries(workspace: &Workspace, suites: &[String]) -> Result<()> {
    choose(&binaries(workspace)?, suites).map(drop)
}

/// The test binaries of all packages, each name once.
fn test_binaries(metadata: &str) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        targets: Vec<Target>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    let metadata: Metadata = serde_json::from_str(metadata).context("unreadable cargo metadata")?;
    let targets = metadata.packages.into_iter().flat_map(|package| package.targets);
    let tests = targets.filter(|target| target.kind.iter().any(|kind| kind == "test"));
    Ok(tests.map(|target| target.name).collect::<BTreeSet<_>>().into_iter().collect())
}

fn choose(known: &[String], named: &[String]) -> Result<Vec<String>> {
    if let Some(unknown) = named.iter().find(|name| !known.contains(name)) {
        bail!("no suite `{unknown}`; there are: {}", known.join(", "));
    }
    Ok(known.iter().filter(|suite| named.is_empty() || named.contains(suite)).cloned().collect())
}

/// What a suite's runner said, one line per binary that had a test to run.
struct Report {
    suite: String,
    results: Vec<String>,
    seconds: String,
    succeeded: bool,
}

fn run_suites(workspace: &Workspace, chosen: &[String], filter: &[String]) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    for suite in chosen {
        eprintln!("==> suite {suite}");
        let started = Instant::now();
        let mut results = Vec::new();
        let mut succeeded = true;
        if suite == FUZZ {
            let fuzzed = fuzzed(workspace)?;
            succeeded = fuzzed.iter().all(|outcome| outcome.succeeded);
            results.push(counted(&fuzzed));
        }
        for run in runs(suite, chosen) {
            let mut cargo = workspace.cargo("test");
            cargo.args(["--locked", "--quiet", "--no-fail-fast"]).args(run.arguments);
            cargo.envs(run.environment);
            if filter.is_empty() {
                cargo.args(run.tests)
            } else {
                cargo.args(filter)
            };
            let status = process::run_lines(&mut cargo, |line| {
                if line.starts_with("test result:") && !line.contains(" 0 passed; 0 failed;") {
                    results.push(line.to_owned());
                }
            })?;
            if !status.success() {
                eprintln!("    `{}`: {status}", process::shown(&cargo));
                succeeded = false;
            }
        }
        // A renamed binary or a lost attribute must not pass for a success.
        succeeded &= !(filter.is_empty() && LAST.contains(&suite.as_str()) && results.is_empty());
        reports.push(Report {
            suite: suite.clone(),
            results,
            seconds: process::seconds(started.elapsed()),
            succeeded,
        });
    }
    Ok(reports)
}

fn fuzzed(workspace: &Workspace) -> Result<Vec<fuzz::Outcome>> {
    let targets = fuzz::prepare(workspace)?;
    targets.iter().map(|target| fuzz::fuzz(workspace, target, SHORT)).collect()
}

/// In the words of libtest's summary.
fn counted(outcomes: &[fuzz::Outcome]) -> String {
    let passed = outcomes.iter().filter(|outcome| outcome.succeeded).count();
    let executions: u64 = outcomes.iter().map(|outcome| outcome.executions).sum();
    format!("fuzz targets: {passed} passed; {} failed; {executions} executions", outcomes.len() - passed)
}

/// One `cargo test`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Run<'a> {
    arguments: Vec<&'a str>,
    environment: Option<(&'static str, &'static str)>,
    /// What to run of it where the user has not said it.
    tests: &'static [&'static str],
}

/// Each `cargo test` of a suite. Tests that need root share a kernel: one at a time.
fn runs<'a>(suite: &'a str, chosen: &[String]) -> Vec<Run<'a>> {
    let run = |words: &[&[&'a str]]| Run { arguments: words.concat(), ..Run::default() };
    let as_root = ["--", "--ignored", "--test-threads=1"];
    match suite {
        UNIT => vec![run(&[&["--lib", "--bins", "--tests", "--"]])],
        FUZZ => Vec::new(),
        PRIVILEGED => vec![run(&[&["--lib", "--bins"], &as_root])],
        // Named without `unit`, a suite brings along those of its tests that need no root.
        binary => {
            let named = ["--test", binary];
            let plain = (!chosen.iter().any(|name| name == UNIT)).then(|| run(&[&named, &["--"]]));
            let mut runs: Vec<Run<'a>> = plain.into_iter().chain([run(&[&named, &as_root])]).collect();
            if binary == "netns" {
                runs.push(Run { environment: Some(GUARD_HOOK), tests: GUARDED, ..run(&[&named, &as_root]) });
            }
            runs
        }
    }
}

/// Prints what every runner said, then the sum on the last line.
fn summarise(reports: &[Report], started: Instant) -> Result<()> {
    println!("\n==> summary ({})", process::seconds(started.elapsed()));
    for report in reports {
        println!("{} ({}){}", report.suite, report.seconds, if report.succeeded { "" } else { ": FAILED" });
        for result in &report.results {
            println!("    {result}");
        }
    }
    let results = || reports.iter().flat_map(|report| &report.results);
    let (passed, failed) =
        results().filter_map(|line| counts(line)).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    println!("total: {passed} passed, {failed} failed");
    let bad: Vec<&str> = reports.iter().filter(|r| !r.succeeded).map(|r| r.suite.as_str()).collect();
    if !bad.is_empty() {
        bail!("these suites failed: {}", bad.join(", "));
    }
    if !reports.is_empty() && passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// Passed and failed of libtest's "test result:" line.
fn counts(line: &str) -> Option<(u32, u32)> {
    let number_before =
        |what: &str| line.split(what).next()?.rsplit(' ').find(|word| !word.is_empty())?.parse().ok();
    Some((number_before(" passed;")?, number_before(" failed;")?))
}

#[cfg(test)]
mod tests {
    use super::{GUARD_HOOK, GUARDED, Run, choose, counts, runs, test_binaries};

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn reads_the_counts_of_a_result_line() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(counts(line), Some((12, 3)));
        assert_eq!(counts("test result: garbled"), None);
    }

    #[test]
    fn finds_the_test_binaries() {
        let metadata = r#"{"packages": [
            {"name": "ztunnel", "targets": [{"name": "inproc", "kind": ["test"]}, {"name": "ztunnel", "kind": ["bin"]}]},
            {"name": "mesh-tests", "targets": [{"name": "e2e", "kind": ["test"]}, {"name": "inproc", "kind": ["test"]}]}
        ]}"#;
        assert_eq!(test_binaries(metadata).unwrap(), ["e2e", "inproc"]);
    }

    #[test]
    fn suites_keep_their_order_and_an_unknown_one_is_refused() {
        let known = names(&["static", "unit", "ebpf", "e2e"]);
        assert_eq!(choose(&known, &[]).unwrap(), known);
        assert_eq!(choose(&known, &names(&["e2e", "unit"])).unwrap(), ["unit", "e2e"]);
        let refused = choose(&known, &names(&["e3e"])).unwrap_err().to_string();
        assert!(refused.contains("e3e") && refused.contains("ebpf"), "{refused}");
    }

    #[test]
    fn each_test_runs_once() {
        let all = names(&["unit", "e2e", "netns"]);
        let run = |arguments: &[&'static str]| Run { arguments: arguments.to_vec(), ..Run::default() };
        let ignored = || run(&["--test", "e2e", "--", "--ignored", "--test-threads=1"]);
        assert_eq!(runs("e2e", &all), [ignored()]);
        assert_eq!(runs("e2e", &names(&["e2e"])), [run(&["--test", "e2e", "--"]), ignored()]);
        let guards = runs("netns", &all);
        assert_eq!((guards.len(), guards[0].environment), (2, None));
        assert_eq!((guards[1].environment, guards[1].tests), (Some(GUARD_HOOK), GUARDED));
    }
}
