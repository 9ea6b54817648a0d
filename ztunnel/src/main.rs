//! Entry: reads the command line and runs the proxy.

use anyhow::Context;
use clap::Parser;
use mesh_core::{drain, telemetry};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use ztunnel::app::{self, Surroundings};
use ztunnel::config::Config;

/// Memory of connections that have ended goes back to the system; glibc's allocator keeps it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    let levels = telemetry::init(&config.telemetry)?;
    raise_descriptor_limit();
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

/// Each connection needs two descriptors; the usual soft limit of 1024 is meant for select(2), which nobody uses here.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    match raised {
        Ok(limit) => tracing::debug!(limit, "descriptors"),
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open descriptors to its hard limit"),
    }
}
