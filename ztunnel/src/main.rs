//! Entry: reads the command line and runs the proxy.

use clap::Parser;

fn main() -> anyhow::Result<()> {
    let _config = ztunnel::config::Config::parse();
    anyhow::bail!("the proxy is not wired yet")
}
