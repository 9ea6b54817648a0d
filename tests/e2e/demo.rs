//! The demo as its users run it: every claim holds, what it says one can try works, and Ctrl-C ends it.

use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use mesh_tests::run::remains;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::fixture::SOON;
use crate::program::Program;

#[test]
#[ignore = "needs root: cargo xtask test"]
fn every_claim_holds_and_the_lab_stays_until_it_is_interrupted() -> anyhow::Result<()> {
    let mut demo = Program::lab(&["demo", "--keep", "--json"])?;
    let run = demo.run.clone();
    let result = demo.wait_for(Duration::from_secs(300), |line| line.starts_with('{'))?;
    let result: Value = serde_json::from_str(&result).context("stdout is one JSON object")?;
    let claims = result["claims"].as_array().context("no claims")?;
    anyhow::ensure!(claims.len() >= 7, "only {} claims", claims.len());
    let failed: Vec<&Value> = claims.iter().filter(|claim| claim["pass"] != true).collect();
    anyhow::ensure!(failed.is_empty(), "{failed:#?}\n{}", demo.said().join("\n"));

    // What it says is what a shell can do.
    demo.wait_for(SOON, |line| line.contains(":15020/metrics"))?;
    // Its lines are the indented ones; what goes to stdout may come in between.
    let lines = demo.said().iter().filter_map(|line| line.strip_prefix("  "));
    let script = lines.filter(|line| !line.contains("tcpdump")).map(|line| format!("{line}\n"));
    let script = format!("set -ex\n{}", script.collect::<String>());
    let mut shell = Command::new("bash");
    let output = shell.args(["-c", &script]).env("HOME", format!("/run/ambit-lab/{run}")).output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    anyhow::ensure!(output.status.success(), "{err}");
    for word in ["payment-service-v1", "istio_tcp_connections_opened_total", "namespace/payments"] {
        anyhow::ensure!(out.contains(word), "no {word} in {out}\nof {script}");
    }

    let status = demo.end(Signal::SIGINT)?;
    anyhow::ensure!(status.code() == Some(130), "{status}");
    let left = remains(&run)?;
    anyhow::ensure!(left.is_empty(), "left of {run}: {left:#?}");
    Ok(())
}
