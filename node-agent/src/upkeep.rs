//! Looks after what keeps pods captured without the agent: the pins in bpffs, which somebody may unmount.

use std::time::Duration;

use mesh_core::readiness::Gate;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::enrol::kernel::Handle;

/// Puts pins back each `period` until `shutdown`. `pinned` is open while all are there, and else says why not: capture
/// would then end with this process.
pub async fn run(kernel: Handle, period: Duration, pinned: Gate, shutdown: CancellationToken) {
    let mut told = String::new();
    loop {
        match kernel.run(|kernel| kernel.keep_pins()).await {
            Ok(Ok(restored)) => {
                if restored > 0 {
                    info!(restored, "what bpffs had lost is pinned again");
                }
                told.clear();
                pinned.open();
            }
            Ok(Err(error)) => {
                let reason = format!("capture would end with this agent, bpffs holds no pins: {error}");
                if told != reason {
                    warn!("{reason}");
                    pinned.close(reason.clone());
                    told = reason;
                }
            }
            // Liveness tells.
            Err(_) => pinned.close("the datapath thread has died"),
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(period) => {}
        }
    }
}

/// A look is one call for each pin.
pub const PERIOD: Duration = Duration::from_secs(5);
