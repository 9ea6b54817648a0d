//! What is there of a run, or left of one that has ended.

use std::fs;
use std::path::Path;

use super::RUNS;
use crate::{cgroup, netns};

/// Everything on this machine that carries the run's name: its directory, network namespaces, cgroups, processes and
/// mounts, each as one line. Empty once it has ended.
pub fn remains(run: &str) -> anyhow::Result<Vec<String>> {
    let directory = Path::new(RUNS).join(run);
    let cgroup = cgroup::mount_point()?.join(format!("ambit-{run}"));
    let paths = [directory, cgroup];
    let mut found: Vec<String> =
        paths.iter().filter(|path| path.exists()).map(|path| path.display().to_string()).collect();
    found.extend(entries(netns::NAMED).filter(|name| name.starts_with(&format!("{run}-"))));
    for process in entries("/proc").filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
        // One that has ended may wait for a parent to take note, as after the death of its own.
        if !Path::new(&format!("/proc/{process}/exe")).exists() {
            continue;
        }
        let read = |file: &str| fs::read_to_string(format!("/proc/{process}/{file}")).unwrap_or_default();
        if read("cgroup").contains(&format!("/ambit-{run}")) {
            found.push(format!("process {process}: {}", read("comm").trim()));
        } else if read("mountinfo").contains(&format!("{RUNS}/{run}")) {
            found.push(format!("mounts of process {process}: {}", read("comm").trim()));
        }
    }
    Ok(found)
}

fn entries(directory: &str) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}
