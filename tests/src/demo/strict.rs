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
    let marker = scene.marker(12);
    scene.pay(&scene.lab.pod("legacy/client"), &marker, 1)?;
    under_it(scene, &marker, |refusal| {
        let inside = scene.pay(&scene.gateway(), &marker, 5)?.len();
        Ok(format!("{inside} payments by the gateway served\n{refusal}"))
    })
}

/// Does something while the policy is in force, which is seen by the refusal of a pod outside the mesh; then takes the
/// policy away.
pub(super) fn under_it(
    scene: &Scene<'_>,
    marker: &str,
    work: impl FnOnce(&str) -> anyhow::Result<String>,
) -> anyhow::Result<String> {
    scene.lab.apply(STRICT)?;
    let result = refusal(scene, marker).and_then(|refusal| work(&refusal));
    scene.lab.kubectl(["delete", "-n", "payments", "peerauthentication", "default"])?;
    eventually("without the policy the pod outside is served again", SOON, || {
        scene.pay(&scene.lab.pod("legacy/client"), marker, 1)
    })?;
    result
}

/// Waits until the pod outside is reset, and a log says that it is for the policy.
fn refusal(scene: &Scene<'_>, marker: &str) -> anyhow::Result<String> {
    let outside = scene.lab.pod("legacy/client");
    let ends = [scene.access_log(1)?.len(), scene.access_log(2)?.len()];
    let refusal = eventually("the pod outside is refused", SOON, || match scene.pay(&outside, marker, 1) {
        Ok(answers) => anyhow::bail!("it was answered: {answers:?}"),
        Err(error) => Ok(format!("{error:#}")),
    })?;
    // A reset may be there before connect() returns, which curl calls a failure to connect (exit code 7).
    let reset = refusal.contains("reset by peer") || refusal.contains("failed with 7:");
    anyhow::ensure!(reset, "it was not a reset: {refusal}");
    let address = outside.address()?.to_string();
    let line = eventually("a log says why", SOON, || {
        for (node, end) in (1..).zip(ends) {
            let log = scene.access_log(node)?;
            let why = |line: &&str| line.contains(&address) && line.contains("did not use mutual TLS");
            if let Some(line) = log.get(end..).unwrap_or_default().lines().rev().find(why) {
                return Ok(format!("n{node}: {line}"));
            }
        }
        anyhow::bail!("no line with {address}")
    })?;
    Ok(format!("one by {address} reset\n{line}"))
}
