//! Tells what the datapath drops: a line the first time a pair of ends is hit, numbers for the metrics.
//!
//! **Invariant:** a pod that keeps sending what is dropped costs one log line a minute, not one a packet.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_ebpf_abi::canary::is_canary;
use mesh_ebpf_abi::event::{Counter, DropEvent};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::enrol::kernel::Handle;

/// The datapath's counters as last read.
#[derive(Clone, Debug, Default)]
pub struct Counts(Arc<Mutex<Vec<(Counter, u64)>>>);

impl Counts {
    /// Each counter with its value.
    pub fn read(&self) -> Vec<(Counter, u64)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Reads until `shutdown`.
pub async fn run(kernel: Handle, counts: Counts, shutdown: CancellationToken) {
    let mut told = Told::default();
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let Ok(drops) = kernel.run(|kernel| kernel.drops(MOST)).await else { return };
        *counts.0.lock().unwrap_or_else(PoisonError::into_inner) = drops.counts;
        let others =
            drops.events.iter().filter(|event| !is_canary(&event.source) && !is_canary(&event.destination));
        for event in others.filter(|event| told.is_news(event, Instant::now())) {
            tell(event);
        }
    }
}

fn tell(event: &DropEvent) {
    let counter = Counter::ALL.iter().find(|counter| **counter as u32 == event.reason);
    warn!(
        source = %std::net::SocketAddr::new(event.source.to_ip(), event.source_port),
        destination = %std::net::SocketAddr::new(event.destination.to_ip(), event.destination_port),
        reason = counter.map_or("unknown", |counter| counter.name()),
        "dropped TCP of a pod in the mesh that did not come by its proxy",
    );
}

/// What was told lately.
#[derive(Debug, Default)]
struct Told {
    last: HashMap<(IpAddr, IpAddr, u16, u32), Instant>,
}

impl Told {
    fn is_news(&mut self, event: &DropEvent, now: Instant) -> bool {
        let old = |last: &Instant| now.duration_since(*last) >= AGAIN;
        if self.last.len() >= REMEMBERED {
            self.last.retain(|_, last| !old(last));
        }
        let key = (event.source.to_ip(), event.destination.to_ip(), event.destination_port, event.reason);
        if self.last.get(&key).is_some_and(|last| !old(last)) || self.last.len() >= REMEMBERED {
            return false;
        }
        self.last.insert(key, now);
        true
    }
}

const PERIOD: Duration = Duration::from_secs(1);
/// Events taken at a time; the rest waits in the kernel, or is lost there. The counters lose nothing.
const MOST: usize = 256;
const AGAIN: Duration = Duration::from_secs(60);
/// Pairs of ends; a pod that scans the world fills this and is told of no more.
const REMEMBERED: usize = 1024;

#[cfg(test)]
mod tests {
    use mesh_ebpf_abi::addr::Address;

    use super::*;

    fn event(destination_port: u16, source_port: u16) -> DropEvent {
        DropEvent {
            source: Address::from(IpAddr::from([10, 0, 0, 1])),
            destination: Address::from(IpAddr::from([10, 0, 0, 2])),
            source_port,
            destination_port,
            reason: 6,
            ifindex: 2,
            slot: 0,
        }
    }

    #[test]
    fn tells_once_a_minute_for_each_pair_of_ends() {
        let (mut told, now) = (Told::default(), Instant::now());
        for (event, after, expect) in [
            (event(80, 1), 0, true),
            (event(80, 2), 1, false),
            (event(81, 3), 1, true),
            (event(80, 4), 59, false),
            (event(80, 5), 60, true),
        ] {
            assert_eq!(told.is_news(&event, now + Duration::from_secs(after)), expect, "{event:?} {after}");
        }
    }

    #[test]
    fn remembers_a_bounded_number() {
        let (mut told, now) = (Told::default(), Instant::now());
        let news = (0..5000).filter(|port| told.is_news(&event(*port, 1), now)).count();
        assert_eq!((news, told.last.len()), (REMEMBERED, REMEMBERED));
        assert!(told.is_news(&event(6000, 1), now + AGAIN));
    }
}
