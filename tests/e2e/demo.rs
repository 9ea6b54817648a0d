//! The claims of the demo, as the suite's first word.

use mesh_tests::Lab;
use mesh_tests::demo::{self, Scene};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn every_claim_holds() -> anyhow::Result<()> {
    let lab = Lab::new().nodes(2).start()?;
    let scene = Scene::set(&lab)?;
    let failed: Vec<_> = demo::check_all(&scene).into_iter().filter(|claim| !claim.pass).collect();
    anyhow::ensure!(failed.is_empty(), "{failed:#?}\n{}", lab.story("ambit-system"));
    Ok(())
}
