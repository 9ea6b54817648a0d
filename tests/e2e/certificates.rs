//! Certificates that live for seconds, in a lab of their own: renewed, and signed by another key, under load.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::ConfigMap;
use mesh_tests::cluster::Kind;
use mesh_tests::lab::{Background, PATIENCE};
use mesh_tests::peer::{self, Authority, Outcome};
use mesh_tests::stack::Family;
use mesh_tests::upgrades::{Stage, counted};
use mesh_tests::workload::{self, Workload};
use mesh_tests::{Lab, eventually};
use serde_json::Value;

use crate::fixture::{HBONE, SOON};

const NAMESPACE: &str = "rotation";
const PORT: u16 = 7000;
/// Nobody it knows.
const STRANGER: &str = "spiffe://cluster.local/ns/elsewhere/sa/stranger";
/// Of a certificate, in seconds; it is renewed a quarter of this after it was made.
const LIFETIME: &str = "8";
/// Less than the kubelet's five seconds until a changed ConfigMap is there would still be too little for both together.
const SKEW: &str = "3";

fn start() -> anyhow::Result<Lab> {
    Lab::new()
        .nodes(2)
        .mesh_with("Deployment/ambit-ca", "AMBIT_CERT_LIFETIME", LIFETIME)
        .mesh_with("Deployment/ambit-ca", "AMBIT_CLOCK_SKEW", SKEW)
        // So that a client that dials now and then has a handshake each time.
        .mesh_with("DaemonSet/ztunnel", "POOL_UNUSED_RELEASE_TIMEOUT", "1")
        .start()
}

/// What a ztunnel has of one identity.
#[derive(Debug)]
struct Certificate {
    serial: String,
    /// Common name of who signed it.
    issuer: String,
    /// PEM each, without line ends.
    roots: BTreeSet<String>,
}

/// The certificates of both ztunnels, by node and identity.
fn certificates(lab: &Lab) -> anyhow::Result<BTreeMap<(u8, String), Certificate>> {
    let mut all = BTreeMap::new();
    for node in [1, 2] {
        let dump: Value = serde_json::from_str(&lab.scrape(node, 15000, "/config_dump")?)?;
        for one in dump["certificates"].as_array().context("no certificates")? {
            let text = |field: &str| one[field].as_str().with_context(|| format!("no {field}: {one}"));
            let chain = pem::parse(text("chain")?)?;
            let (_, leaf) = x509_parser::parse_x509_certificate(chain.contents())?;
            let issuer = leaf.issuer().iter_common_name().next().context("no name")?.as_str()?.to_owned();
            let (serial, roots) = (text("serial")?.to_owned(), roots(text("roots")?)?);
            all.insert((node, text("identity")?.to_owned()), Certificate { serial, issuer, roots });
        }
    }
    anyhow::ensure!(all.len() > 3, "{all:?}");
    Ok(all)
}

fn roots(pem: &str) -> anyhow::Result<BTreeSet<String>> {
    Ok(pem::parse_many(pem)?.iter().map(|root| pem::encode(root).split_whitespace().collect()).collect())
}

fn published(lab: &Lab) -> anyhow::Result<BTreeSet<String>> {
    let map: ConfigMap = lab.cluster().get(Kind::ConfigMap, "ambit-system", "ambit-ca-root-cert")?;
    roots(map.data.unwrap_or_default().get("root-cert.pem").context("no roots")?)
}

/// Pods that connect so seldom that each connection has a handshake.
fn seldom(lab: &Lab) -> anyhow::Result<Vec<Background>> {
    let mut load = Vec::new();
    for node in [1, 2] {
        let client = lab.pod(&format!("{NAMESPACE}/seldom-{node}"));
        let far = lab.pod(&format!("{NAMESPACE}/echo-{}", 3 - node));
        // One after the other: each of them has its turn after three seconds.
        let targets = [
            format!("{}:{PORT}", far.address_of(Family::V4)?),
            format!("[{}]:{PORT}", far.address_of(Family::V6)?),
        ];
        let line = ["ambit-example", "dial", "--parallel=1", "--every-ms=1500"];
        load.push(client.spawn(line.into_iter().chain(targets.iter().map(String::as_str)))?);
    }
    for one in &load {
        one.wait_for("answered", SOON)?;
    }
    Ok(load)
}

/// Whether a client with a certificate of this authority is believed.
fn believed(lab: &Lab, authority: &Authority) -> anyhow::Result<bool> {
    let far = lab.pod(&format!("{NAMESPACE}/echo-2")).address()?;
    let credentials = authority.issue(STRANGER)?;
    let client = lab.pod("plain/client");
    let target = SocketAddr::new(far, PORT).to_string();
    match peer::connect(lab, &client, SocketAddr::new(far, HBONE), &target, &credentials)? {
        Outcome::Status(200) => Ok(true),
        Outcome::Refused(_) => Ok(false),
        other => anyhow::bail!("{other:?}"),
    }
}

/// Wait until the CA says that its rotation is there.
fn phase(lab: &Lab, phase: &str) -> anyhow::Result<()> {
    eventually(&format!("the rotation is {phase}"), PATIENCE, || {
        let metrics = lab.pod("ambit-system/ambit-ca").scrape(15014, "/metrics")?;
        let is = format!("ambit_ca_rotation_phase{{phase=\"{phase}\"}} 1");
        anyhow::ensure!(metrics.contains(&is), "{metrics}");
        Ok(())
    })
}

/// Each certificate is another one, so many times.
fn renewed(lab: &Lab, times: u32) -> anyhow::Result<()> {
    for time in 1..=times {
        let before = certificates(lab)?;
        eventually(&format!("all certificates are renewed, {time}"), SOON, || {
            let now = certificates(lab)?;
            let same = before
                .iter()
                .find(|(whose, cert)| now.get(whose).is_none_or(|now| now.serial == cert.serial));
            anyhow::ensure!(same.is_none(), "not {same:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// From the CA's own root to one that a user brings.
fn rotated(lab: &Lab) -> anyhow::Result<()> {
    let (old, new) = (Authority::of_the_mesh(lab)?, Authority::foreign()?);
    let [old_root, new_root] = [&old, &new].map(|authority| roots(&authority.pem()));
    let (old_root, new_root) = (old_root?, new_root?);
    let both: BTreeSet<String> = old_root.union(&new_root).cloned().collect();
    anyhow::ensure!(believed(lab, &old)? && !believed(lab, &new)?, "before");
    let signed_by = |common_name: &str, trusted: &BTreeSet<String>| {
        eventually(&format!("all certificates are of {common_name:?}"), PATIENCE, || {
            let all = certificates(lab)?;
            let other = all.iter().find(|(_, cert)| cert.issuer != common_name || cert.roots != *trusted);
            anyhow::ensure!(other.is_none(), "not {other:?}");
            Ok(())
        })
    };
    new.install(lab)?;
    phase(lab, "overlap")?;
    signed_by("Ambit root", &both)?;
    anyhow::ensure!(published(lab)? == both, "both are published");
    anyhow::ensure!(believed(lab, &old)? && believed(lab, &new)?, "while the old key signs");

    phase(lab, "retiring")?;
    signed_by("a root of somebody else", &both)?;
    anyhow::ensure!(believed(lab, &old)? && believed(lab, &new)?, "while the old root retires");

    phase(lab, "steady")?;
    signed_by("a root of somebody else", &new_root)?;
    anyhow::ensure!(published(lab)? == new_root, "the new one alone is published");
    anyhow::ensure!(!believed(lab, &old)? && believed(lab, &new)?, "after it");
    Ok(())
}

/// Without a CA a pod is told how its certificate comes to its end; once the CA is back there is another.
fn told(lab: &Lab) -> anyhow::Result<()> {
    let replicas = |count: &str| {
        lab.kubectl(["scale", "-n", "ambit-system", "deployment/ambit-ca", &format!("--replicas={count}")])
    };
    replicas("0")?;
    for (reason, kind) in [("CertificateRenewalLate", "Normal"), ("CertificateExpiring", "Warning")] {
        let fields = format!("--field-selector=involvedObject.name=echo-2,reason={reason},type={kind}");
        eventually(&format!("an Event {reason}"), SOON, || {
            let events = lab.kubectl(["get", "events", "-n", NAMESPACE, &fields, "-o", "name"])?;
            anyhow::ensure!(!events.is_empty(), "there is none");
            Ok(())
        })?;
    }
    replicas("2")?;
    lab.wait_ready("ambit-system")?;
    renewed(lab, 1)
}

/// Short connections, long ones, and those with a handshake each: none is refused, reset or lost.
fn unnoticed(lab: &Lab, stage: &Stage<'_>, work: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let seldom = seldom(lab)?;
    let toll = stage.suffer(1, |_| work())?;
    let seldom = counted(seldom)?;
    anyhow::ensure!(toll.is_nothing() && seldom.failed() == 0, "{toll}\nwith a handshake each: {seldom:?}");
    Ok(())
}

/// Certificates are renewed three times, then there is another key and root: nobody notices either. Then there is no CA.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn nobody_notices_renewals_and_another_root_and_all_are_told_without_a_ca() {
    let lab = start().unwrap();
    let work = || -> anyhow::Result<()> {
        lab.namespace("plain", &[])?;
        Workload::new("plain", "client").on_node(1).start(&lab)?;
        let stage = Stage::set(&lab, NAMESPACE)?;
        for node in [1, 2] {
            let name = format!("seldom-{node}");
            workload::service_account(&lab, NAMESPACE, &name)?;
            Workload::new(NAMESPACE, &name).service_account(&name).on_node(node).start(&lab)?.captured()?;
        }
        unnoticed(&lab, &stage, || renewed(&lab, 3)).context("renewals")?;
        unnoticed(&lab, &stage, || rotated(&lab)).context("another root")?;
        told(&lab).context("no CA")
    };
    work().map_err(|error| error.context(lab.story("ambit-system"))).unwrap();
}
