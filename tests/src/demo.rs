//! The demo: claims about the mesh, each checked on a running cluster, with the evidence.

use std::process::ExitCode;
use std::time::Instant;

use serde::Serialize;

use crate::Lab;

mod claims;
mod crashes;
mod keep;
mod probes;
mod reuse;
mod scene;
mod strict;

use scene::Scene;

#[derive(Debug, clap::Args)]
pub struct Config {
    /// Leave the lab running until Ctrl-C, and say how to use it.
    #[arg(long)]
    keep: bool,
    /// Print the result as one JSON object; progress goes to stderr.
    #[arg(long)]
    json: bool,
}

/// What became of one claim.
#[derive(Clone, Debug, Serialize)]
pub struct Claim {
    pub id: u8,
    pub title: &'static str,
    pub pass: bool,
    /// What was seen; when it failed, what was missing.
    pub evidence: String,
}

#[derive(Debug, Serialize)]
struct Outcome {
    claims: Vec<Claim>,
    seconds: f64,
}

/// Exit code 1 if any claim fails.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    progress("starting a cluster of two nodes");
    let lab = Lab::new().nodes(2).start()?;
    progress(&format!("lab {} runs; applying manifests/base and manifests/examples/payments", lab.name()));
    let scene = Scene::set(&lab)?;
    let mut claims = Vec::new();
    for &(id, title, check) in claims::ALL {
        progress(&format!("claim {id}: {title}"));
        let claim = judge(id, title, check(&scene));
        if !config.json {
            print(&claim);
        }
        claims.push(claim);
    }
    let passed = claims.iter().all(|claim| claim.pass);
    let outcome = Outcome { claims, seconds: began.elapsed().as_secs_f64() };
    if !passed {
        eprintln!("{}", lab.story("ambit-system"));
    }
    if config.json {
        println!("{}", serde_json::to_string(&outcome)?);
    } else {
        println!("{} in {:.0} s", if passed { "all claims hold" } else { "a claim FAILED" }, outcome.seconds);
    }
    if config.keep {
        keep::until_interrupted(&lab);
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn judge(id: u8, title: &'static str, result: anyhow::Result<String>) -> Claim {
    match result {
        Ok(evidence) => Claim { id, title, pass: true, evidence },
        Err(error) => Claim { id, title, pass: false, evidence: format!("{error:#}") },
    }
}

fn print(claim: &Claim) {
    let verdict = if claim.pass { "pass" } else { "FAIL" };
    println!("{verdict}  {}. {}", claim.id, claim.title);
    for line in claim.evidence.lines() {
        println!("        {line}");
    }
}

/// Long steps are told, where they disturb nobody who reads the result.
pub(crate) fn progress(text: &str) {
    eprintln!("... {text}");
}
