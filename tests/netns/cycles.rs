//! Many pods that join and leave: nothing of them is left, not of one in a thousand.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use mesh_ebpf_abi::{PodRecord, map};
use mesh_tests::netns::{self, Netns};
use node_agent::datapath::{Datapath, PodSpec};

use crate::lifecycle::{Traces, nothing_pinned};
use crate::world::{PATIENCE, PORT, World, converse, enrol};

/// Of each pod; more of them with `AMBIT_CYCLES=1000 cargo xtask test netns -- cycles`.
const CYCLES: usize = 50;
/// Each so manieth pod dies instead of leaving.
const DIES: usize = 10;

/// What a process and its kernel hold. A link, or a network namespace, is held by a descriptor, a pin or a name.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    pins: BTreeSet<String>,
    records: usize,
    namespaces: BTreeSet<String>,
    interfaces: BTreeSet<String>,
    threads: usize,
}

impl Holdings {
    fn of(world: &World) -> Result<Self> {
        let mut pins = BTreeSet::new();
        list(&world.bpffs, &mut pins)?;
        let records = MapData::from_pin(world.version().join("maps").join(map::PODS))?;
        let records: HashMap<_, u32, PodRecord> = Map::HashMap(records).try_into()?;
        let count = |path: &str| -> Result<usize> { Ok(fs::read_dir(path)?.count()) };
        let namespaces = fs::read_dir(netns::NAMED)?;
        let interfaces = mesh_tests::shell::run("ip", ["-n", world.router.name(), "-br", "link", "list"])?;
        let own = format!("dp{}-", std::process::id());
        Ok(Self {
            records: records.keys().count(),
            // After the map's own descriptor is closed.
            descriptors: {
                drop(records);
                count("/proc/self/fd")?
            },
            pins,
            namespaces: namespaces
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<Result<BTreeSet<_>>>()?
                .into_iter()
                .filter(|name| name.starts_with(&own))
                .collect(),
            // Without their states.
            interfaces: interfaces
                .lines()
                .filter_map(|line| line.split_whitespace().next())
                .map(str::to_owned)
                .collect(),
            threads: count("/proc/self/task")?,
        })
    }
}

fn list(directory: &Path, names: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, names)?;
        }
        names.insert(path.display().to_string());
    }
    Ok(())
}

/// A pod that dies while it is enrolled: its network namespace goes when nothing of the agent holds it.
fn dies(world: &World, datapath: &mut Datapath, number: usize) -> Result<()> {
    let name = format!("dp{}-d{number}", std::process::id());
    let netns = Netns::create(&name)?;
    netns.ip(&format!(
        "link add eth0 type veth peer name d{number} netns {}\naddr add 10.98.3.2/24 dev eth0\nlink set eth0 up\n",
        world.router.name()
    ))?;
    let spec = PodSpec {
        uid: name.clone(),
        netns: netns.descriptor()?,
        addresses: vec!["10.98.3.2".parse()?],
        probe_ports: [PORT].into(),
        dns: true,
    };
    let listeners = datapath.prepare(&spec, None)?;
    datapath.capture(&name)?;
    drop((spec, netns, listeners));
    netns::remove(&name);
    datapath.leave(&name)?;
    Ok(())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn cycles_of_joining_and_leaving_leave_nothing_behind() -> Result<()> {
    let cycles = match std::env::var("AMBIT_CYCLES") {
        Ok(number) => number.parse().context("AMBIT_CYCLES")?,
        Err(_) => CYCLES,
    };
    let world = World::new()?;
    let traces = [Traces::of(&world.a)?, Traces::of(&world.b)?];
    let mut datapath = world.open()?;
    let before = Holdings::of(&world)?;
    for number in 0..cycles {
        let listeners = [enrol(&mut datapath, &world.a)?, enrol(&mut datapath, &world.b)?];
        drop(listeners);
        datapath.leave(&world.a.uid)?;
        datapath.leave(&world.b.uid)?;
        if number % DIES == 0 {
            dies(&world, &mut datapath, number)?;
        }
    }
    // A network namespace ends some time after the last hold on it is gone, and its interface with it.
    mesh_tests::eventually("nothing is left", PATIENCE, || {
        let after = Holdings::of(&world)?;
        ensure!(after == before, "after {cycles} cycles: {after:#?}\nbefore: {before:#?}");
        Ok(())
    })?;
    ensure!([Traces::of(&world.a)?, Traces::of(&world.b)?] == traces, "rules, routes or sysctls are left");
    let app = world.b.serve()?;
    let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
    converse(&client, &app.accept()?.0)?;
    ensure!(datapath.surviving().is_empty());
    nothing_pinned(&world)
}
