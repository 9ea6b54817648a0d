//! Wiring of `node-agent run`: which parts there are and what they hand each other.

use crate::config::Config;

/// Runs the agent until SIGTERM; what it captured stays captured.
///
/// # Errors
/// When a part cannot start.
pub fn run(config: Config) -> anyhow::Result<()> {
    let _ = config;
    Ok(())
}
