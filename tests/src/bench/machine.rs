//! Busy time of the whole machine: on veth pairs the kernel's work is done on whoever's time it happens to be, so the
//! processes' own times mislead.

use anyhow::Context as _;

/// Seconds that all CPUs together were busy since boot.
pub(super) fn busy_seconds() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let ticks = busy_ticks(&stat).context("/proc/stat has no line for all CPUs")?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock tick")?;
    #[expect(clippy::cast_precision_loss, reason = "ticks of years fit")]
    let seconds = ticks as f64 / per_second as f64;
    Ok(seconds)
}

/// user, nice, system, irq, softirq of proc_stat(5)'s first line; idle, iowait and what others stole are not work.
fn busy_ticks(stat: &str) -> Option<u64> {
    let fields: Vec<u64> = stat
        .lines()
        .find_map(|line| line.strip_prefix("cpu "))?
        .split_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    [0, 1, 2, 5, 6].iter().map(|&index| fields.get(index).copied()).sum()
}

#[cfg(test)]
mod tests {
    #[test]
    fn idle_and_stolen_time_is_not_busy() {
        let stat = "cpu  10 1 20 500 40 3 5 70 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(super::busy_ticks(stat), Some(39));
        assert_eq!(super::busy_ticks("intr 5"), None);
    }
}
