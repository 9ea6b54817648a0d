//! The embedded object, and the one that logs, loaded with maps of their own.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, MapData, PerCpuArray};
use aya::{Ebpf, EbpfLoader};
use mesh_ebpf_abi::event::Counter;
use mesh_ebpf_abi::{Address, PodAddress, map};

/// Parses the object and makes its maps; `slot` is the constant in the pod's own program.
pub(crate) fn open(slot: u32) -> Result<Ebpf> {
    ensure!(!node_agent::datapath::OBJECT.is_empty(), "no programs embedded; run `cargo xtask ebpf` first");
    Ok(EbpfLoader::new().override_global("SLOT", &slot, true).load(node_agent::datapath::OBJECT)?)
}

/// The same of the build that logs (`cargo xtask ebpf --debug` would embed it): it is beside the embedded one.
pub(crate) fn open_logging() -> Result<Ebpf> {
    let binary = std::env::current_exe()?;
    // <target>/<profile>/deps/<binary>
    let target = binary.ancestors().nth(3).context("where is the target directory?")?;
    let path = target.join("ebpf").join("mesh-ebpf-log");
    let bytes =
        fs::read(&path).with_context(|| format!("{}: run `cargo xtask ebpf` first", path.display()))?;
    Ok(EbpfLoader::new().override_global("SLOT", &0_u32, true).load(&bytes)?)
}

/// Gives a pod an address.
pub(crate) fn enrol(object: &mut Ebpf, slot: u32, address: &str) -> Result<()> {
    let map = object.map_mut(map::PODIP).ok_or_else(|| anyhow::anyhow!("no PODIP"))?;
    let mut addresses: HashMap<_, Address, PodAddress> = HashMap::try_from(map)?;
    Ok(addresses.insert(
        Address::from(address.parse::<std::net::IpAddr>()?),
        PodAddress { slot, flags: 0 },
        0,
    )?)
}

/// A counter's value over all CPUs.
pub(crate) fn count(object: &Ebpf, counter: Counter) -> Result<u64> {
    let map = object.map(map::COUNTS).ok_or_else(|| anyhow::anyhow!("no COUNTS"))?;
    let counts: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(map)?;
    Ok(counts.get(&(counter as u32), 0)?.iter().sum())
}
