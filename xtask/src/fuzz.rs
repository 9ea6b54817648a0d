//! `cargo xtask fuzz`: the targets of tests/fuzz under libFuzzer.
//!
//! Only this workspace's code is instrumented: a wrapper of rustc, which cargo uses for workspace members alone, adds the
//! flags. So dependencies are those of any other build, and no nightly toolchain is needed. libFuzzer guides itself by
//! the coverage of what is ours.
//!
//! What is found is kept in target/fuzz: the corpus, for the next run, and in artifacts/ the input of each failure.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{self, step};
use crate::setup::{self, Need};
use crate::workspace::Workspace;

/// In the way of cargo-fuzz: edge coverage in counters, and comparisons, which lead to magic values.
const WRAPPER: &str = r#"#!/bin/sh
# Build scripts are no targets, and have no libFuzzer to be linked with.
case " $* " in *" --crate-name build_script_"*) exec "$@" ;; esac
exec "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
"#;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Targets to run; all of them when none is named.
    targets: Vec<String>,
    /// How long each one runs.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// How long one target runs.
#[derive(Clone, Copy)]
pub(crate) struct Bound {
    /// At most.
    pub(crate) seconds: u32,
    /// At most; 0 is no bound.
    pub(crate) executions: u32,
    /// Of the random numbers; 0 is another one each time.
    pub(crate) seed: u32,
}

/// What became of one target.
pub(crate) struct Outcome {
    pub(crate) target: String,
    pub(crate) executions: u64,
    pub(crate) succeeded: bool,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<()> {
    setup::ensure(workspace, &[Need::Build, Need::Fuzz])?;
    let known = prepare(workspace)?;
    if let Some(unknown) = args.targets.iter().find(|name| !known.contains(name)) {
        bail!("no target `{unknown}`; there are: {}", known.join(", "));
    }
    let chosen = known.into_iter().filter(|name| args.targets.is_empty() || args.targets.contains(name));
    let bound = Bound { seconds: args.seconds, executions: 0, seed: 0 };
    let outcomes = chosen.map(|target| fuzz(workspace, &target, bound)).collect::<Result<Vec<_>>>()?;
    for Outcome { target, executions, succeeded } in &outcomes {
        println!("{target:<12} {executions:>12} executions  {}", if *succeeded { "ok" } else { "FAILED" });
    }
    println!("total: {} executions", outcomes.iter().map(|outcome| outcome.executions).sum::<u64>());
    if outcomes.iter().any(|outcome| !outcome.succeeded) {
        bail!("some inputs fail; they are in {}", artifacts(workspace).display());
    }
    Ok(())
}

/// Builds the targets and writes their seeds. Returns their names.
pub(crate) fn prepare(workspace: &Workspace) -> Result<Vec<String>> {
    let targets = step("seeds of the fuzz targets", || seeds(workspace))?;
    step("fuzz targets, instrumented", || {
        let wrapper = directory(workspace).join("rustc");
        fs::write(&wrapper, WRAPPER).context("cannot write the wrapper of rustc")?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
        let mut build = workspace.cargo("build");
        build.args(["--locked", "--features=mesh-fuzz/libfuzzer"]);
        for target in &targets {
            build.arg(format!("--bin=fuzz-{target}"));
        }
        process::run(build.env("RUSTC_WORKSPACE_WRAPPER", wrapper))
    })?;
    Ok(targets)
}

fn seeds(workspace: &Workspace) -> Result<Vec<String>> {
    fs::create_dir_all(directory(workspace)).context("cannot make target/fuzz")?;
    process::run(workspace.cargo("build").args(["--locked", "--bin=fuzz-seeds"]))?;
    let mut write = Command::new(workspace.target.join("debug").join("fuzz-seeds"));
    let names = process::output(write.arg(corpus(workspace))).context("the seeds were not written")?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// Runs one target; what it says is shown only if it fails.
pub(crate) fn fuzz(workspace: &Workspace, target: &str, bound: Bound) -> Result<Outcome> {
    let log = directory(workspace).join(format!("{target}.log"));
    fs::create_dir_all(artifacts(workspace)).context("cannot make the directory of artifacts")?;
    let mut command = Command::new(workspace.target.join("debug").join(format!("fuzz-{target}")));
    command
        .arg(format!("-max_total_time={}", bound.seconds))
        .arg(format!("-runs={}", if bound.executions == 0 { -1 } else { i64::from(bound.executions) }))
        .arg(format!("-seed={}", bound.seed))
        .args(["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/{target}-", artifacts(workspace).display()))
        .arg(corpus(workspace).join(target));
    command.stdout(File::create(&log)?).stderr(File::options().append(true).open(&log)?);
    let succeeded = step(&format!("fuzzing {target}"), || process::run(&mut command)).is_ok();
    let said = fs::read(&log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    if process::interrupted().is_some() {
        bail!("interrupted");
    }
    if !succeeded {
        eprintln!("{}", tail(&said, 60));
    }
    Ok(Outcome { target: target.to_owned(), executions: executions(&said), succeeded })
}

/// Of libFuzzer's final statistics.
fn executions(said: &str) -> u64 {
    let line = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or_default()
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn directory(workspace: &Workspace) -> PathBuf {
    workspace.target.join("fuzz")
}

fn corpus(workspace: &Workspace) -> PathBuf {
    Path::new(&directory(workspace)).join("corpus")
}

fn artifacts(workspace: &Workspace) -> PathBuf {
    directory(workspace).join("artifacts")
}

#[cfg(test)]
mod tests {
    use super::{executions, tail};

    #[test]
    fn reads_the_number_of_executions() {
        assert_eq!(executions("Done\nstat::number_of_executed_units: 1234\nstat::x: 1"), 1234);
        assert_eq!(executions("nothing"), 0);
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
    }
}
