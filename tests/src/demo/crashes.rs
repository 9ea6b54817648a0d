//! Claims about parts of the mesh that are killed under load.

use super::Scene;
use crate::crash::{Blow, Stage};

/// ztunnel on the client's node, then on the server's.
pub(super) fn ztunnel(scene: &Scene<'_>) -> anyhow::Result<String> {
    let stage = Stage::set(scene.lab, "crash-ztunnel")?;
    let mut evidence = Vec::new();
    for node in [1, 2] {
        let toll = stage.suffer(Blow::Ztunnel, node)?;
        anyhow::ensure!(toll.keeps_the_door_open(), "n{node}: {toll}");
        evidence.push(format!("n{node}: {toll}; served again"));
    }
    Ok(evidence.join("\n"))
}

/// The agents of both nodes, one after the other.
pub(super) fn agent(scene: &Scene<'_>) -> anyhow::Result<String> {
    let stage = Stage::set(scene.lab, "crash-agent")?;
    let mut evidence = Vec::new();
    for node in [1, 2] {
        let toll = stage.suffer(Blow::Agent, node)?;
        anyhow::ensure!(toll.is_nothing(), "n{node}: {toll}");
        evidence.push(format!("n{node}: {toll}"));
    }
    Ok(evidence.join("\n"))
}
