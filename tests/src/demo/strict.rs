//! The claim about STRICT, which refuses what the claim about PERMISSIVE lets in.

use std::time::Duration;

use super::Scene;
use crate::eventually;

/// As users of Istio have it in their repositories.
const STRICT: &str = "\
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata:
  name: default
  namespace: payments
spec:
  mtls:
    mode: STRICT
";

const SOON: Duration = Duration::from_secs(10);

/// Payments from outside the mesh are refused and the gateway's are not, until the policy is gone.
pub(super) fn refused(scene: &Scene<'_>) -> anyhow::Result<String> {
    let outside = scene.lab.pod("legacy/client");
    let marker = scene.marker(12);
    scene.pay(&outside, &marker, 1)?;
    scene.lab.apply(STRICT)?;
    let result = strict(scene, &marker);
    scene.lab.kubectl(["delete", "-n", "payments", "peerauthentication", "default"])?;
    eventually("without the policy the pod outside is served again", SOON, || {
        scene.pay(&outside, &marker, 1)
    })?;
    result
}

fn strict(scene: &Scene<'_>, marker: &str) -> anyhow::Result<String> {
    let outside = scene.lab.pod("legacy/client");
    let refusal = eventually("the pod outside is refused", SOON, || match scene.pay(&outside, marker, 1) {
        Ok(answers) => anyhow::bail!("it was answered: {answers:?}"),
        Err(error) => Ok(format!("{error:#}")),
    })?;
    // A reset may be there before connect() returns, which curl calls a failure to connect (exit code 7).
    let reset = refusal.contains("reset by peer") || refusal.contains("failed with 7:");
    anyhow::ensure!(reset, "it was not a reset: {refusal}");
    let inside = scene.pay(&scene.gateway(), marker, 5)?.len();
    let address = outside.address()?.to_string();
    let line = eventually("a log says why", SOON, || {
        for node in [1, 2] {
            let log = scene.access_log(node)?;
            let why = |line: &&str| line.contains(&address) && line.contains("did not use mutual TLS");
            if let Some(line) = log.lines().rev().find(why) {
                return Ok(format!("n{node}: {line}"));
            }
        }
        anyhow::bail!("no line with {address}")
    })?;
    Ok(format!("{inside} payments by the gateway served, one by {address} reset\n{line}"))
}
