//! Labs that are interrupted, killed, or not alone.

use std::time::Duration;

use mesh_tests::run::remains;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};
use nix::sys::signal::Signal;

use crate::fixture::{HTTP, SOON, service_of};
use crate::program::Program;

/// Waits until a lab is so far.
type Moment = fn(&mut Program) -> anyhow::Result<()>;

/// Long enough for a lab to come up.
const START: Duration = Duration::from_secs(60);

/// A part of the run is there.
fn there(run: &str, part: &str) -> anyhow::Result<()> {
    eventually(&format!("{part} is there"), SOON, || {
        let there = remains(run)?;
        anyhow::ensure!(there.iter().any(|line| line.contains(part)), "only {there:?}");
        Ok(())
    })
}

fn nothing_left(run: &str) -> anyhow::Result<()> {
    let left = remains(run)?;
    anyhow::ensure!(left.is_empty(), "left of {run}: {left:#?}");
    Ok(())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_interrupted_lab_leaves_nothing_behind() -> anyhow::Result<()> {
    let moments: [(Signal, i32, Moment); 4] = [
        (Signal::SIGINT, 130, |_| Ok(())),
        (Signal::SIGTERM, 143, |program| there(&program.run, "-n1")),
        (Signal::SIGINT, 130, |program| there(&program.run, "process ")),
        (Signal::SIGHUP, 129, |program| {
            program.wait_for(START, |line| line.contains("the mesh is ready")).map(drop)
        }),
    ];
    for (signal, code, moment) in moments {
        let mut program = Program::lab(&["demo"])?;
        moment(&mut program)?;
        ends(program, signal, code)?;
    }
    Ok(())
}

/// Also while a test waits for the lab that the suite shares, and what that has for its own end would wait for the test.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_interrupted_suite_leaves_nothing_behind() -> anyhow::Result<()> {
    let suite = Program::suite("ca::tokens_that_prove_nothing_get_nothing")?;
    there(&suite.run, "process ")?;
    ends(suite, Signal::SIGINT, 130)
}

/// The signal ends the program, with this exit code, and with all that there is of its lab.
fn ends(program: Program, signal: Signal, code: i32) -> anyhow::Result<()> {
    let run = program.run.clone();
    let status = program.end(signal)?;
    anyhow::ensure!(status.code() == Some(code), "{signal}: {status}");
    nothing_left(&run)
}

/// A lab that had no chance to clean up is removed by the next, and labs that live leave each other alone: the same
/// names and addresses in both, the end of one is nothing to the other.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn labs_live_side_by_side_and_remove_dead_ones() -> anyhow::Result<()> {
    let mut killed = Program::lab(&["demo"])?;
    let dead = killed.run.clone();
    killed.wait_for(START, |line| line.contains("applying manifests"))?;
    killed.end(Signal::SIGKILL)?;
    anyhow::ensure!(!remains(&dead)?.is_empty(), "a killed lab left nothing, so its removal proves nothing");

    let one = Lab::new().nodes(1).start()?;
    nothing_left(&dead)?;
    let other = Lab::new().nodes(1).start()?;
    anyhow::ensure!(one.name() != other.name(), "both are called {}", one.name());
    let mut addresses = Vec::new();
    for (lab, name) in [(&one, "one"), (&other, "other")] {
        lab.namespace("shop", &[])?;
        // One after the other, so that the second of either lab gets the same address.
        Workload::new("shop", "client").start(lab)?;
        let listening =
            serde_json::json!(["ambit-example", "serve", "--listen=0.0.0.0:8080", &format!("--name={name}")]);
        Workload::new("shop", "server").serve().with("/spec/containers/0/command", listening).start(lab)?;
        addresses.push(lab.pod("shop/server").address()?);
    }
    anyhow::ensure!(
        addresses[0] == addresses[1],
        "with other addresses they would never meet: {addresses:?}"
    );
    let url = format!("http://{}:{HTTP}/", addresses[0]);
    for (lab, name) in [(&one, "one"), (&other, "other")] {
        anyhow::ensure!(service_of(&lab.pod("shop/client"), &url)? == name, "the other lab answered");
    }
    let gone = other.name().to_owned();
    drop(other);
    nothing_left(&gone)?;
    anyhow::ensure!(service_of(&one.pod("shop/client"), &url)? == "one");
    Ok(())
}
