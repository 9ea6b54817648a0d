//! The claim about addresses that are used again.

use super::Scene;
use crate::reuse;

/// How often in the demo; `ambit-lab reuse` does it a thousand times.
const CYCLES: usize = 10;

/// Pods of three Services take two addresses from each other while clients call each by its Service.
pub(super) fn safe(scene: &Scene<'_>) -> anyhow::Result<String> {
    let tally = reuse::churn(scene.lab, "reuse", reuse::LATE, |cycles, _| cycles >= CYCLES)?;
    anyhow::ensure!(tally.wrong.is_empty(), "{tally}: {}", tally.wrong.join("; "));
    anyhow::ensure!(tally.right > 0 && tally.refused > 0, "the wrong pod was never met: {tally}");
    Ok(tally.to_string())
}
