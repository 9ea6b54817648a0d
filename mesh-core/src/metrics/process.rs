//! What the process costs, under the names that Prometheus' client libraries agree on (`process_*`), read from /proc when
//! it is scraped.

use std::fmt;
use std::fs;

use nix::sys::resource::{Resource, getrlimit};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// Clock ticks a second in /proc (`USER_HZ`): 100 on every architecture that Linux still gets new users on.
const TICKS: f64 = 100.0;

/// The collector of this process' own numbers; what /proc does not tell is left out.
#[derive(Clone, Copy, Debug)]
pub struct Process;

/// What /proc tells; times in seconds, sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Usage {
    cpu: f64,
    /// Since the machine's start.
    started: f64,
    resident: u64,
    virtual_: u64,
    threads: u64,
}

impl Usage {
    /// From the texts of /proc/self/stat and /proc/self/status (proc(5)).
    fn parse(stat: &str, status: &str) -> Option<Self> {
        // The name, in brackets, may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok().map(|ticks| ticks / TICKS);
        let line = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?.strip_prefix(':')?;
            value.split_ascii_whitespace().next()?.parse::<u64>().ok()
        };
        Some(Self {
            cpu: ticks(14)? + ticks(15)?,
            started: ticks(22)?,
            resident: line("VmRSS")? * 1024,
            virtual_: line("VmSize")? * 1024,
            threads: line("Threads")?,
        })
    }

    fn read() -> Option<Self> {
        let text = |name: &str| fs::read_to_string(format!("/proc/self/{name}")).ok();
        Self::parse(&text("stat")?, &text("status")?)
    }
}

/// When the machine started, in seconds since the epoch (`btime` of /proc/stat).
fn booted() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn open_descriptors() -> Option<u64> {
    let open = fs::read_dir("/proc/self/fd").ok()?.count();
    // Reading the directory takes one.
    u64::try_from(open).ok()?.checked_sub(1)
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut put = |name: &str, help: &str, metric: &dyn Metric| metric.put(name, help, &mut encoder);
        if let Some(usage) = Usage::read() {
            put(
                "process_cpu_seconds",
                "Time that the process had of all processors.",
                &ConstCounter::new(usage.cpu),
            )?;
            put("process_resident_memory_bytes", "Memory in use.", &ConstGauge::new(usage.resident))?;
            put("process_virtual_memory_bytes", "Address space in use.", &ConstGauge::new(usage.virtual_))?;
            put("process_threads", "Threads.", &ConstGauge::new(usage.threads))?;
            if let Some(booted) = booted() {
                let started = ConstGauge::new(booted + usage.started);
                put("process_start_time_seconds", "Start, in seconds since the epoch.", &started)?;
            }
        }
        if let Some(open) = open_descriptors() {
            put("process_open_fds", "File descriptors that are open.", &ConstGauge::new(open))?;
        }
        if let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            put("process_max_fds", "File descriptors that may be open.", &ConstGauge::new(limit))?;
        }
        Ok(())
    }
}

/// `EncodeMetric` as an object, for the list above.
trait Metric {
    fn put(&self, name: &str, help: &str, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error>;
}

impl<M: EncodeMetric> Metric for M {
    fn put(&self, name: &str, help: &str, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        self.encode(encoder.encode_descriptor(name, help, None, self.metric_type())?)
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn reads_what_proc_says() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 9 8 7 6 250 150 0 0 20 0 5 0 12345 99 88 0 0";
        let status = "Name:\ta) b\nVmSize:\t    2048 kB\nVmRSS:\t     512 kB\nThreads:\t5\n";
        let usage =
            Usage { cpu: 4.0, started: 123.45, resident: 512 << 10, virtual_: 2048 << 10, threads: 5 };
        assert_eq!(Usage::parse(stat, status), Some(usage));
        assert_eq!(Usage::parse(stat, "Name:\tx\n"), None);
        assert_eq!(Usage::parse("7 (a) S 1", status), None);
    }

    #[test]
    fn tells_of_this_process() {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for (name, least) in [
            ("process_cpu_seconds_total", 0.0),
            ("process_resident_memory_bytes", 100_000.0),
            ("process_virtual_memory_bytes", 100_000.0),
            ("process_threads", 1.0),
            ("process_start_time_seconds", 1.7e9),
            ("process_open_fds", 3.0),
            ("process_max_fds", 3.0),
        ] {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            let value: f64 = line.unwrap_or_else(|| panic!("{name} is missing in {text}")).parse().unwrap();
            assert!(value >= least, "{name} {value}");
        }
    }
}
