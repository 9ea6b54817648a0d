//! Services as their authors mean them: which endpoint a client gets, and what becomes of those that are not as they
//! should be. All are asked from node 1.

use std::collections::BTreeSet;

use mesh_tests::lab::PodRef;
use mesh_tests::workload::{self, Workload};
use mesh_tests::{Lab, eventually, stack::Family};
use serde_json::{Value, json};

use crate::fixture::{HTTP, SOON, ask, log_end, log_line, service_of};
use crate::shared::scenario;

const NAMESPACE: &str = "offers";

/// The namespace, gone at the end.
struct Offers<'a> {
    lab: &'a Lab,
    client: PodRef<'a>,
}

impl<'a> Offers<'a> {
    fn new(lab: &'a Lab) -> anyhow::Result<Self> {
        lab.namespace(NAMESPACE, &[("istio.io/dataplane-mode", "ambient")])?;
        Ok(Self { lab, client: lab.pod("mesh/client") })
    }

    /// A captured pod with the label `app`, as it is ready.
    fn pod(&self, workload: Workload, app: &str, node: u8) -> anyhow::Result<PodRef<'a>> {
        let pod = workload.label("app", app).on_node(node).start(self.lab)?;
        pod.captured()?;
        Ok(pod)
    }

    /// A Service for the pods with the label `app`, with more in its spec.
    fn service(&self, name: &str, app: &str, more: &Value) -> anyhow::Result<()> {
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": NAMESPACE },
            "spec": {
                "selector": { "app": app }, "ipFamilyPolicy": "PreferDualStack",
                "ports": [{ "port": 80, "targetPort": HTTP }],
            },
        });
        for (field, value) in more.as_object().into_iter().flatten() {
            service["spec"][field] = value.clone();
        }
        self.lab.cluster().create(service)
    }

    fn url(&self, service: &str) -> anyhow::Result<String> {
        Ok(format!("http://{}/", self.lab.service_address_of(Family::V4, NAMESPACE, service)?))
    }

    /// Who answers, of many connections.
    fn answers(&self, service: &str) -> anyhow::Result<BTreeSet<String>> {
        let url = self.url(service)?;
        (0..12).map(|_| service_of(&self.client, &url)).collect()
    }

    /// Whoever is to answer does, alone, once the news has come round.
    fn is_served_by(&self, service: &str, expected: &[&str]) -> anyhow::Result<()> {
        eventually(&format!("{service} is served by {expected:?}"), SOON, || {
            let answers = self.answers(service)?;
            anyhow::ensure!(answers.iter().map(String::as_str).eq(expected.iter().copied()), "{answers:?}");
            Ok(())
        })
    }

    /// A connection is refused, for this reason.
    fn is_refused(&self, service: &str, reason: &str) -> anyhow::Result<()> {
        let url = self.url(service)?;
        eventually(&format!("{service} is refused"), SOON, || {
            let end = log_end(self.lab, 1)?;
            let answer = self.client.exec(["curl", "-sS", "--max-time", "5", &url])?;
            anyhow::ensure!(!answer.success(), "{answer:?}");
            // The first ones may come before the service's endpoints are known.
            let log = self.lab.daemon("ztunnel", 1).logs()?;
            let new = log.get(end..).unwrap_or_default();
            let told = new.lines().any(|line| line.contains("outbound") && line.contains(reason));
            anyhow::ensure!(told, "new in the log:\n{new}");
            Ok(())
        })
    }
}

impl Drop for Offers<'_> {
    fn drop(&mut self) {
        let _ = self.lab.kubectl(["delete", "namespace", NAMESPACE, "--wait=true"]);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn near_ones_the_same_one_or_only_those_of_the_node() {
    scenario(|lab| {
        let offers = Offers::new(lab)?;
        offers.pod(Workload::new(NAMESPACE, "here").serve(), "web", 1)?;
        offers.pod(Workload::new(NAMESPACE, "there").serve().label("far", "yes"), "web", 2)?;
        offers.service("any", "web", &json!({}))?;
        offers.is_served_by("any", &["here", "there"])?;
        offers.service("local", "web", &json!({ "internalTrafficPolicy": "Local" }))?;
        offers.is_served_by("local", &["here"])?;
        offers.service("near", "web", &json!({ "trafficDistribution": "PreferSameNode" }))?;
        offers.is_served_by("near", &["here"])?;
        offers.service("sticky", "web", &json!({ "sessionAffinity": "ClientIP" }))?;
        let kept = eventually("one of them serves", SOON, || offers.answers("sticky"))?;
        assert_eq!(kept.len(), 1, "{kept:?}");
        assert_eq!(offers.answers("sticky")?, kept);
        let far = json!({ "internalTrafficPolicy": "Local", "selector": { "far": "yes" } });
        offers.service("elsewhere", "web", &far)?;
        offers.is_refused("elsewhere", "no endpoint of the service is ready in the client's node")?;
        // What is preferred is not required.
        lab.kubectl(["delete", "pod", "-n", NAMESPACE, "here"])?;
        offers.is_served_by("near", &["there"])?;
        offers.is_served_by("sticky", &["there"])?;
        offers.is_refused("local", "no endpoint of the service is ready in the client's node")
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_endpoint_that_does_not_listen_is_given_up_for_one_that_does() {
    scenario(|lab| {
        let offers = Offers::new(lab)?;
        offers.pod(Workload::new(NAMESPACE, "serves").serve(), "half", 2)?;
        offers.pod(Workload::new(NAMESPACE, "idles"), "half", 2)?;
        offers.service("half", "half", &json!({}))?;
        offers.is_served_by("half", &["serves"])?;
        let end = log_end(lab, 1)?;
        for _ in 0..3 {
            assert_eq!(offers.answers("half")?.into_iter().collect::<Vec<_>>(), ["serves"]);
        }
        log_line(lab, 1, end, &["outbound", "connection complete", "half.offers", "tried=2"])?;
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_endpoint_that_somebody_wrote_is_the_pod_at_its_address() {
    scenario(|lab| {
        let offers = Offers::new(lab)?;
        let pod = offers.pod(Workload::new(NAMESPACE, "pod").serve(), "pod", 2)?;
        let address = pod.address_of(Family::V4)?;
        offers.service("manual", "", &json!({ "selector": null }))?;
        lab.cluster().create(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": "manual-1", "namespace": NAMESPACE,
                "labels": { "kubernetes.io/service-name": "manual" },
            },
            "ports": [{ "name": "", "port": HTTP, "protocol": "TCP" }],
            "endpoints": [{ "addresses": [address.to_string()] }],
        }))?;
        let end = log_end(lab, 1)?;
        offers.is_served_by("manual", &["pod"])?;
        let tunnel = format!("dst.hbone_addr={address}:{HTTP}");
        log_line(lab, 1, end, &["outbound", "connection complete", "manual.offers", &tunnel])?;
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_is_not_ready_or_being_ended_serves_where_it_is_asked_to() {
    scenario(|lab| {
        let offers = Offers::new(lab)?;
        let never = json!({ "tcpSocket": { "port": 9 }, "periodSeconds": 1 });
        let unready = Workload::new(NAMESPACE, "unready").serve().readiness(never).label("app", "unready");
        unready.on_node(2).create(lab)?.captured()?;
        offers.service("published", "unready", &json!({ "publishNotReadyAddresses": true }))?;
        offers.is_served_by("published", &["unready"])?;
        offers.service("unpublished", "unready", &json!({}))?;
        offers.is_refused("unpublished", "no endpoint of the service is ready")?;

        // It is told to end, and does not yet: the shell does not listen, and its child is not told.
        let stays = "trap '' TERM; ambit-example serve --listen=[::]:8080 --name=ending; exit 1";
        let ending = Workload::new(NAMESPACE, "ending")
            .serve()
            .command(&["/usr/bin/sh", "-c", stays])
            .with("/spec/terminationGracePeriodSeconds", json!(60));
        offers.pod(ending, "ending", 2)?;
        offers.service("ending", "ending", &json!({}))?;
        offers.is_served_by("ending", &["ending"])?;
        lab.kubectl(["delete", "pod", "-n", NAMESPACE, "ending", "--wait=false"])?;
        let object = || lab.pod("offers/ending").object();
        eventually("it is being ended", SOON, || {
            anyhow::ensure!(object()?.metadata.deletion_timestamp.is_some());
            Ok(())
        })?;
        for _ in 0..5 {
            assert_eq!(offers.answers("ending")?.into_iter().collect::<Vec<_>>(), ["ending"]);
        }
        assert!(object()?.metadata.deletion_timestamp.is_some(), "it is there still");
        offers.pod(Workload::new(NAMESPACE, "successor").serve(), "ending", 2)?;
        offers.is_served_by("ending", &["successor"])?;
        lab.kubectl(["delete", "pod", "-n", NAMESPACE, "ending", "--force", "--grace-period=0"]).map(drop)
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_endpoint_is_reached_over_the_family_that_answers() {
    scenario(|lab| {
        let offers = Offers::new(lab)?;
        let pod = offers.pod(Workload::new(NAMESPACE, "twice").serve(), "twice", 2)?;
        workload::service(lab, NAMESPACE, "twice", 80, HTTP)?;
        let (v4, v6) = (pod.address_of(Family::V4)?, pod.address_of(Family::V6)?);
        let route = |action: &str| -> anyhow::Result<()> {
            let line = [action, "blackhole", &format!("{v4}/32")].map(str::to_owned);
            let status = lab.node(1).command("ip")?.args(["route"]).args(line).status()?;
            anyhow::ensure!(status.success(), "ip route {action}: {status}");
            Ok(())
        };
        route("add")?;
        let end = log_end(lab, 1)?;
        let asked = (|| {
            let url = offers.url("twice")?;
            eventually("it answers", SOON, || ask(&offers.client, &url))?;
            let tunnel = format!("dst.hbone_addr=[{v6}]:{HTTP}");
            log_line(lab, 1, end, &["outbound", "connection complete", "twice.offers", &tunnel])
        })();
        route("del")?;
        asked.map(drop)
    });
}
