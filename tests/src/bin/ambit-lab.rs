//! The lab on the command line: the demo, a lab to play with, and the removal of what dead runs left behind.

use clap::{Parser, Subcommand};
use mesh_tests::{abuse, bench, crash, crowd, demo, memory, picks, policies, reuse, upgrades};

/// A Kubernetes cluster of network namespaces, with the mesh in it. Needs root.
#[derive(Debug, Parser)]
#[command(name = "ambit-lab", version)]
struct Command {
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// Bring up a two-node mesh, check the claims, tear it down.
    Demo(demo::Config),
    /// Measure pods in the mesh against the same pods outside of it, in one run.
    Bench(bench::Config),
    /// Flood a pod's tunnel port in every way, and measure what it costs the proxy and other pods.
    Abuse(abuse::Config),
    /// Kill parts of the mesh under load, and count the connections that were refused, reset or lost.
    Crashes(crash::Config),
    /// Replace daemons by rolling updates under load, and count the connections that were refused, reset or lost.
    Upgrades(upgrades::Config),
    /// Pass an address on from pod to pod under load, and count the calls that reached the wrong one.
    Reuse(reuse::Config),
    /// Measure how long enrolment takes for each of many pods that are created at once.
    Crowd(crowd::Config),
    /// Measure what a workload costs the agent and a ztunnel in memory, and a change in time, by how many workloads there
    /// are. Needs no root.
    Memory(memory::Config),
    /// Measure how long a proxy takes to choose an endpoint, by how many there are. Needs no root.
    Picks(picks::Config),
    /// Measure how long a proxy takes to decide by policy, by how many policies there are. Needs no root.
    Policies(policies::Config),
    /// Remove what runs left behind whose process is gone.
    Sweep,
}

fn main() -> anyhow::Result<std::process::ExitCode> {
    match Command::parse().act {
        Act::Demo(config) => demo::run(&config),
        Act::Bench(config) => bench::run(&config),
        Act::Abuse(config) => abuse::run(&config),
        Act::Crashes(config) => crash::run(&config),
        Act::Upgrades(config) => upgrades::run(&config),
        Act::Reuse(config) => reuse::run(&config),
        Act::Crowd(config) => crowd::run(&config),
        Act::Memory(config) => memory::run(&config),
        Act::Picks(config) => picks::run(&config),
        Act::Policies(config) => policies::run(&config),
        Act::Sweep => {
            let swept = mesh_tests::run::sweep()?;
            println!("removed {} dead runs {}", swept.len(), swept.join(" "));
            Ok(std::process::ExitCode::SUCCESS)
        }
    }
}
