//! Daemons replaced by rolling updates under load. `ambit-lab upgrades` does it a hundred times.

use mesh_tests::upgrades::Stage;
use serde_json::json;

use crate::shared::scenario;

/// Both ztunnels, five times: the successor takes what comes, what is open goes on in the old one until it ends, which
/// its dump tells.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn nobody_notices_an_upgrade_of_ztunnel() {
    scenario(|lab| {
        let stage = Stage::set(lab, "upgrades")?;
        let toll = stage.suffer(5, |_| {
            stage.roll("ztunnel", json!({}))?;
            let draining = stage.draining()?;
            let states = draining.iter().map(|dump| &dump["process"]["state"]);
            let open = draining.iter().flat_map(|dump| dump["connections"].as_array().into_iter().flatten());
            let told = open.filter(|one| {
                let hour = one["since"].as_u64().map(|since| since + 3600);
                one["state"] == "draining" && hour.is_some() && hour == one["deadline"].as_u64()
            });
            anyhow::ensure!(states.into_iter().all(|state| state == "draining"), "{draining:#?}");
            anyhow::ensure!(told.count() > 0, "no connection is told to drain: {draining:#?}");
            Ok(())
        })?;
        anyhow::ensure!(toll.is_nothing(), "{toll}");
        stage.nobody_drains("ztunnel")
    });
}
