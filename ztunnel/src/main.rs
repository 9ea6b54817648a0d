//! Entry: reads the command line and runs the proxy.

use anyhow::Context;
use clap::Parser;
use mesh_core::{drain, limits, telemetry};
use ztunnel::app::{self, Surroundings};
use ztunnel::config::Config;

/// Memory of connections that have ended goes back to the system; glibc's allocator keeps it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    let levels = telemetry::init(&config.telemetry)?;
    // Each connection needs two.
    limits::raise_descriptors();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.worker_threads())
        .enable_all()
        .build()
        .context("starting threads")?;
    runtime.block_on(async {
        let shutdown = drain::terminated().context("installing signal handlers")?;
        let surroundings = Surroundings::real(&config, levels)?;
        Box::pin(app::run(config, surroundings, shutdown)).await
    })
}
