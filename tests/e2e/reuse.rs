//! One address, many pods: as often as fits. `ambit-lab reuse` does it a thousand times.

use std::time::Duration;

use mesh_tests::reuse;

use crate::shared::scenario;

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_address_that_goes_to_another_pod_takes_no_traffic_along() {
    scenario(|lab| {
        let limit = Duration::from_secs(12);
        let tally = reuse::churn(lab, "reuse", reuse::LATE, |_, elapsed| elapsed > limit)?;
        anyhow::ensure!(tally.wrong.is_empty(), "{tally}\n{:#?}", tally.wrong);
        anyhow::ensure!(
            tally.cycles >= 4 && tally.right > 50 && tally.refused > 10,
            "too little to say anything: {tally}"
        );
        Ok(())
    });
}
