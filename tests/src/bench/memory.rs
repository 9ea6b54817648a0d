//! Memory of the daemons, idle and with many connections: proportional set size, since binaries are shared.

use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;

use super::pair::Pair;
use crate::lab::Lab;

#[derive(Clone, Debug, Serialize)]
pub(super) struct Memory {
    pub(super) daemon: &'static str,
    pub(super) node: u8,
    pub(super) idle_mib: f64,
    pub(super) loaded_mib: f64,
    pub(super) connections: usize,
    /// Difference over connections; each is one accepted and one tunnelled or local socket here.
    pub(super) kib_per_connection: f64,
}

/// Of both daemons on both nodes; the client's is node 1, the server's node 2.
pub(super) fn measure(lab: &Lab, pair: &Pair<'_>, connections: usize) -> anyhow::Result<Vec<Memory>> {
    let daemons = [("node-agent", 1), ("node-agent", 2), ("ztunnel", 1), ("ztunnel", 2)];
    let weigh = || daemons.map(|(daemon, node)| resident_kib(lab, daemon, node));
    let idle = weigh();
    let count = format!("--count={connections}");
    let mut parked = pair.client.spawn(["ambit-example", "park", &pair.echo, &count])?;
    parked.wait_for("connections are open", Duration::from_secs(60))?;
    anyhow::ensure!(parked.runs()?, "the connections were not kept: {}", parked.output());
    let rows = daemons.into_iter().zip(idle.into_iter().zip(weigh()));
    rows.map(|((daemon, node), (idle, loaded))| {
        let (idle, loaded) = (idle?, loaded?);
        Ok(Memory {
            daemon,
            node,
            idle_mib: idle / 1024.0,
            loaded_mib: loaded / 1024.0,
            connections,
            #[expect(clippy::cast_precision_loss, reason = "a count of connections")]
            kib_per_connection: (loaded - idle) / connections.max(1) as f64,
        })
    })
    .collect()
}

fn resident_kib(lab: &Lab, daemon: &str, node: u8) -> anyhow::Result<f64> {
    let pid = lab.daemon(daemon, node).live()?.pid(None).with_context(|| format!("{daemon} does not run"))?;
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    proportional_kib(&smaps).with_context(|| format!("no Pss of process {pid}"))
}

/// The `Pss:` line of proc_pid_smaps(5).
fn proportional_kib(smaps: &str) -> Option<f64> {
    let line = smaps.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_total_not_a_part_of_it() {
        let smaps = "Rss:  9000 kB\nPss:  4100 kB\nPss_Anon:  77 kB\n";
        assert_eq!(super::proportional_kib(smaps), Some(4100.0));
    }
}
