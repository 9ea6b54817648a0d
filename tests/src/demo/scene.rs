//! What the claims look at: a lab with the mesh and the payments example, and one pod outside of both.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;

use crate::eventually;
use crate::lab::{Lab, PATIENCE, PodRef};
use crate::stack::Family;
use crate::workload::Workload;

/// The example's Deployments.
const EXAMPLE: [&str; 5] =
    ["api-gateway", "payment-service-v1", "payment-service-v2", "account-service", "validation-service"];

/// The stage of the demo.
pub(super) struct Scene<'a> {
    pub(super) lab: &'a Lab,
}

impl<'a> Scene<'a> {
    /// Install the mesh and the examples, outside of the mesh for now.
    pub(super) fn set(lab: &'a Lab) -> anyhow::Result<Self> {
        lab.apply_manifests("base")?;
        lab.apply_manifests("examples/payments")?;
        lab.wait_ready("ambit-system")?;
        super::progress("the mesh is ready on both nodes");
        lab.wait_ready("payments")?;
        super::progress("the payments example is ready, and not in the mesh yet");
        lab.namespace("legacy", &[])?;
        Workload::new("legacy", "client").on_node(1).start(lab)?;
        let scene = Self { lab };
        // Readiness has to get around: through EndpointSlices to the Service's rules on each node.
        for pod in [scene.gateway(), lab.pod("legacy/client")] {
            for family in Family::ALL {
                eventually("a payment is made", PATIENCE, || scene.pay_over(family, &pod, "rehearsal", 3))?;
            }
        }
        Ok(scene)
    }

    #[must_use]
    pub(super) fn gateway(&self) -> PodRef<'a> {
        self.lab.pod("payments/api-gateway")
    }

    /// The pod of one version of the payment service.
    #[must_use]
    pub(super) fn payment(&self, version: &str) -> PodRef<'a> {
        self.lab.pod(&format!("payments/payment-service-{version}"))
    }

    /// A text that appears nowhere by chance.
    #[must_use]
    pub(super) fn marker(&self, claim: u8) -> String {
        format!("ambit-marker-{claim}-{:016x}", rand::random::<u64>())
    }

    /// Make `count` payments from a pod over IPv4, each marked; what the payment service answered.
    pub(super) fn pay(&self, from: &PodRef<'_>, marker: &str, count: usize) -> anyhow::Result<Vec<Value>> {
        self.pay_over(Family::V4, from, marker, count)
    }

    /// The same over one IP family.
    pub(super) fn pay_over(
        &self,
        family: Family,
        from: &PodRef<'_>,
        marker: &str,
        count: usize,
    ) -> anyhow::Result<Vec<Value>> {
        let header = format!("x-note: {marker}");
        let url = "http://payment-service.payments/payments";
        let option = if family == Family::V4 { "-4" } else { "-6" };
        let line = ["curl", option, "-sS", "--fail", "--max-time", "10", "-H", &header, url];
        (0..count).map(|_| Ok(serde_json::from_str(&from.exec_ok(line)?)?)).collect()
    }

    /// Put the namespace into the mesh and wait until each of its pods is captured.
    pub(super) fn enrol(&self) -> anyhow::Result<()> {
        self.lab.label_namespace("payments", "istio.io/dataplane-mode=ambient")?;
        let captured =
            || EXAMPLE.iter().try_for_each(|name| self.lab.pod(&format!("payments/{name}")).captured());
        captured().map_err(|error| error.context(self.lab.story("ambit-system")))
    }

    /// Uid and restarts of each pod of the example: unchanged means none was restarted.
    pub(super) fn incarnations(&self) -> anyhow::Result<BTreeSet<(String, i32)>> {
        EXAMPLE
            .iter()
            .map(|name| {
                let live = self.lab.pod(&format!("payments/{name}")).live()?;
                Ok((live.uid().to_owned(), live.restarts(None)))
            })
            .collect()
    }

    /// The access log of the ztunnel of a node.
    pub(super) fn access_log(&self, node: u8) -> anyhow::Result<String> {
        self.lab.daemon("ztunnel", node).logs()
    }

    /// The addresses of the payment service's pods.
    pub(super) fn payment_addresses(&self, family: Family) -> anyhow::Result<Vec<IpAddr>> {
        ["v1", "v2"].iter().map(|version| self.payment(version).address_of(family)).collect()
    }
}
