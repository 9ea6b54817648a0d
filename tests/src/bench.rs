//! What the mesh costs: the same pods, on two nodes and on one, in the mesh and outside of it, in one run.
//!
//! The machine is noisy, so every round measures both, in turns, and what counts is the median of the rounds' ratios;
//! absolute numbers are printed for orientation only.

use std::num::NonZero;
use std::process::ExitCode;

use serde::Serialize;

use crate::Lab;
use crate::demo::progress;

mod machine;
mod memory;
mod pair;
mod statistics;

use memory::Memory;
use pair::{Pair, Sample};
use statistics::Comparison;

#[derive(Debug, clap::Args)]
pub struct Config {
    /// Rounds; each measures both sides once.
    #[arg(long, default_value = "5")]
    rounds: NonZero<usize>,
    /// Seconds of each throughput measurement.
    #[arg(long, default_value = "5")]
    seconds: NonZero<u32>,
    /// New connections in each latency measurement.
    #[arg(long, default_value = "500")]
    connections: NonZero<usize>,
    /// Idle connections of the memory measurement.
    #[arg(long, default_value_t = 1000)]
    parked: usize,
    /// Print the result as one JSON object; progress goes to stderr.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Outcome {
    /// Of mesh to no mesh across nodes, in the order measured.
    comparisons: Vec<Comparison>,
    /// The same between two pods of one node.
    same_node: Vec<Comparison>,
    memory: Vec<Memory>,
}

pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    progress("starting a cluster of two nodes with the mesh");
    let lab = Lab::new().nodes(2).mesh().start()?;
    let plain = Pair::start(&lab, "plain", false, 2)?;
    let mesh = Pair::start(&lab, "mesh", true, 2)?;
    let (plain_near, mesh_near) =
        (Pair::start(&lab, "plain-near", false, 1)?, Pair::start(&lab, "mesh-near", true, 1)?);
    // Tunnels, certificates and caches are warm in all.
    for pair in [&plain, &mesh, &plain_near, &mesh_near] {
        pair.measure(1, (config.connections.get() / 5).max(1))?;
    }
    let (mut samples, mut near) = (Vec::new(), Vec::new());
    for round in 0..config.rounds.get() {
        progress(&format!("round {} of {}", round + 1, config.rounds.get()));
        samples.push(both(config, round, &plain, &mesh)?);
        near.push(both(config, round, &plain_near, &mesh_near)?);
    }
    progress(&format!("memory, idle and with {} connections", config.parked));
    let memory = memory::measure(&lab, &mesh, config.parked)?;
    let outcome = Outcome { comparisons: compare(&samples), same_node: compare(&near), memory };
    if config.json {
        println!("{}", serde_json::to_string(&outcome)?);
    } else {
        print(&outcome);
    }
    Ok(ExitCode::SUCCESS)
}

/// One sample of each, now the one first, now the other.
fn both(
    config: &Config,
    round: usize,
    plain: &Pair<'_>,
    mesh: &Pair<'_>,
) -> anyhow::Result<(Sample, Sample)> {
    let measure = |pair: &Pair<'_>| pair.measure(config.seconds.get(), config.connections.get());
    Ok(if round.is_multiple_of(2) {
        let plain = measure(plain)?;
        (plain, measure(mesh)?)
    } else {
        let mesh = measure(mesh)?;
        (measure(plain)?, mesh)
    })
}

fn compare(samples: &[(Sample, Sample)]) -> Vec<Comparison> {
    let metric = |name, unit, value: fn(&Sample) -> f64| {
        let pairs: Vec<(f64, f64)> =
            samples.iter().map(|(plain, mesh)| (value(plain), value(mesh))).collect();
        Comparison::new(name, unit, &pairs)
    };
    vec![
        metric("throughput, 1 stream", "Gbit/s", |sample| sample.gigabits),
        metric("CPU of the machine for each GB", "s", |sample| sample.cpu_per_gigabyte),
        metric("connect, p50", "us", |sample| sample.connect_p50),
        metric("connect, p99", "us", |sample| sample.connect_p99),
        metric("connect to first byte, p50", "us", |sample| sample.first_byte_p50),
        metric("connect to first byte, p99", "us", |sample| sample.first_byte_p99),
        metric("refusal of a closed port, p50", "us", |sample| sample.refused_p50),
        metric("refusal of a closed port, p99", "us", |sample| sample.refused_p99),
    ]
}

fn print(outcome: &Outcome) {
    for (which, rows) in [("across nodes", &outcome.comparisons), ("on one node", &outcome.same_node)] {
        println!(
            "{:<32} {:>8} {:>10}   ratio (median of rounds, min..max)",
            format!("pod to pod {which}"),
            "no mesh",
            "mesh"
        );
        for row in rows {
            println!(
                "{:<32} {:>8.2} {:>10.2}   {:.2} ({:.2}..{:.2}) {}",
                row.name, row.plain, row.mesh, row.ratio, row.lowest, row.highest, row.unit
            );
        }
    }
    for row in &outcome.memory {
        println!(
            "memory of {} on {}: {:.1} MiB idle, {:.1} MiB with {} connections ({:.1} KiB each)",
            row.daemon, row.node, row.idle_mib, row.loaded_mib, row.connections, row.kib_per_connection
        );
    }
}
