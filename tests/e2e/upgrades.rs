//! Daemons replaced by rolling updates under load. `ambit-lab upgrades` does it a hundred times.

use anyhow::Context as _;
use mesh_tests::lab::PATIENCE;
use mesh_tests::upgrades::{OTHER_AGENT, Stage};
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};
use serde_json::{Value, json};

use crate::fixture::{ECHO, SOON, ask};
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

/// What the agents of both nodes agreed on with the ztunnels that take new connections.
fn agreed(lab: &Lab, version: u32) -> anyhow::Result<()> {
    for node in [1, 2] {
        eventually(&format!("version {version} is spoken on n{node}"), SOON, || {
            let log = lab.daemon("node-agent", node).logs()?;
            let hello = |line: &&str| line.contains("ztunnel says hello") && line.contains("draining=false");
            let last = log.lines().rfind(hello).context("no ztunnel")?;
            anyhow::ensure!(last.contains(&format!("version={version}")), "{last}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Either side may be the older one, forward and back: of the agent, of ztunnel, and while two ztunnels are side by side.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn nobody_notices_a_change_of_the_pod_protocol() {
    scenario(|lab| {
        let stage = Stage::set(lab, "protocols")?;
        let change = |daemon: &str, protocol: u32, both: u32| -> anyhow::Result<()> {
            stage.roll(daemon, stage.variant(daemon, daemon, protocol)?)?;
            agreed(lab, both).with_context(|| format!("{daemon} speaks {protocol}"))
        };
        let toll = stage.suffer(1, |_| {
            change("ztunnel", 2, 2)?;
            change("ztunnel", 3, 3)?;
            change("node-agent", 2, 2)?;
            change("ztunnel", 2, 2)?;
            change("node-agent", 3, 2)?;
            change("ztunnel", 3, 3)
        })?;
        anyhow::ensure!(toll.is_nothing(), "{toll}");
        stage.nobody_drains("ztunnel")
    });
}

/// The versions of map layouts that have something pinned on both nodes.
fn layouts(lab: &Lab) -> anyhow::Result<Vec<Vec<String>>> {
    let of = |node: u8| {
        lab.node(node).inside(|| {
            let entries = std::fs::read_dir("/sys/fs/bpf/ambit")?;
            let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
            names.collect::<anyhow::Result<Vec<String>>>()
        })
    };
    [1, 2].map(of).into_iter().collect()
}

/// To an agent whose maps look otherwise, and back: each pod is captured anew, with nothing in between.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn nobody_notices_a_change_of_the_map_layout() {
    scenario(|lab| {
        let stage = Stage::set(lab, "layouts")?;
        let change = |program: &str| -> anyhow::Result<Vec<Vec<String>>> {
            let before = layouts(lab)?;
            stage.roll("node-agent", stage.variant("node-agent", program, 3)?)?;
            eventually("each pod is taken over", PATIENCE, || {
                let now = layouts(lab)?;
                let one = now.iter().zip(&before).all(|(now, before)| now.len() == 1 && now != before);
                anyhow::ensure!(one, "{before:?}, then {now:?}");
                Ok(now)
            })
        };
        let before = layouts(lab)?;
        let toll = stage.suffer(2, |_| {
            let changed = change(OTHER_AGENT);
            let back = change("node-agent")?;
            changed?;
            anyhow::ensure!(back == before, "{back:?}");
            Ok(())
        })?;
        anyhow::ensure!(toll.is_nothing(), "{toll}");
        Ok(())
    });
}

/// Nobody comes in the place of a deleted pod before it has ended: until nothing is open it serves on, new pods too.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_ztunnel_that_is_deleted_serves_until_nothing_is_open() {
    scenario(|lab| {
        let client = lab.pod("mesh/client");
        let echo = format!("{}:{ECHO}", lab.pod("mesh/echo").address()?);
        let mut held = client.spawn(["ambit-example", "hold", &echo])?;
        held.wait_for("ok 3", SOON)?;
        let name = lab.daemon("ztunnel", 1).name()?;
        lab.kubectl(["-n", "ambit-system", "delete", "pod", &name, "--wait=false"])?;
        let old = lab.pod(&format!("ambit-system/{name}"));
        eventually("it drains", SOON, || {
            let dump: Value = serde_json::from_str(&old.scrape(15000, "/config_dump")?)?;
            anyhow::ensure!(dump["process"]["state"] == "draining", "{}", dump["process"]);
            Ok(())
        })?;
        ask(&client, "http://web/")?;
        Workload::new("mesh", "after-the-deletion").on_node(1).start(lab)?.captured()?;
        ask(&lab.pod("mesh/after-the-deletion"), "http://web/")?;
        anyhow::ensure!(lab.daemon("ztunnel", 1).name()? == name, "another one has come already");
        anyhow::ensure!(held.runs()?, "the open connection broke: {}", held.output());
        held.finish()?;
        eventually("another one is there", PATIENCE, || {
            let now = lab.daemon("ztunnel", 1).name()?;
            anyhow::ensure!(now != name, "the old one has not ended");
            Ok(())
        })?;
        lab.daemon("ztunnel", 1).ready()?;
        ask(&client, "http://web/").map(drop)
    });
}
