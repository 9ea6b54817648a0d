//! Command line of the node agent: which role, with which settings.

use clap::{Parser, Subcommand};
use node_agent::{app, config};

/// Ambit's node agent: puts the pods of a node into the mesh.
#[derive(Debug, Parser)]
#[command(name = "node-agent", version)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Serve this node: watch the API server, configure its ztunnel, capture its pods' traffic.
    Run(config::Config),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().role {
        Role::Run(config) => app::run(config),
    }
}
