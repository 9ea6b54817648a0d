//! Which endpoint a pod's connections to a service go to again (`sessionAffinity: ClientIP`).
//!
//! One table for each pod and each of its addresses: the client of a service is an address, as for kube-proxy. Pods do
//! not wait for one another, and only connections to services that ask for it look here.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_core::service::{Service, ServiceName};
use mesh_core::workload::WorkloadUid;

/// Services and ports that one pod's endpoints are remembered of; of more, those that end soonest are forgotten.
const MOST: usize = 1024;

/// One pod's endpoints.
#[derive(Debug, Default)]
pub struct Affinities(Mutex<HashMap<Client, Kept>>);

/// Who dials what. Each port has an endpoint of its own, as for kube-proxy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Client {
    address: IpAddr,
    service: ServiceName,
    port: u16,
}

#[derive(Debug)]
struct Kept {
    endpoint: WorkloadUid,
    until: Instant,
}

impl Affinities {
    /// The endpoint that `address` has for the port of the service, if its last connection there is not too old.
    pub fn find(&self, address: IpAddr, service: &Service, port: u16, now: Instant) -> Option<WorkloadUid> {
        service.affinity?;
        let client = Client { address, service: service.key.clone(), port };
        let table = self.lock();
        table.get(&client).filter(|kept| kept.until > now).map(|kept| kept.endpoint.clone())
    }

    /// A connection goes to `endpoint`, and the next ones are to follow.
    pub fn keep(&self, address: IpAddr, service: &Service, port: u16, endpoint: &WorkloadUid, now: Instant) {
        let Some(affinity) = service.affinity else { return };
        let client = Client { address, service: service.key.clone(), port };
        let mut table = self.lock();
        if table.len() >= MOST && !table.contains_key(&client) {
            make_room(&mut table, now);
        }
        table.insert(client, Kept { endpoint: endpoint.clone(), until: now + affinity });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Client, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn make_room(table: &mut HashMap<Client, Kept>, now: Instant) {
    table.retain(|_, kept| kept.until > now);
    if table.len() >= MOST
        && let Some(soonest) =
            table.iter().min_by_key(|(_, kept)| kept.until).map(|(client, _)| client.clone())
    {
        table.remove(&soonest);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_core::convert::Names;
    use mesh_core::proto::workload as wire;

    use super::*;

    fn service(hostname: &str, seconds: u32) -> Service {
        let service = wire::Service {
            namespace: "shop".into(),
            hostname: hostname.into(),
            session_affinity_seconds: seconds,
            ..Default::default()
        };
        mesh_core::convert::service::convert(&service, &mut Names::default()).unwrap()
    }

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn each_connection_renews_it() {
        let (table, web, now) = (Affinities::default(), service("web", 60), Instant::now());
        let after = |seconds| now + Duration::from_secs(seconds);
        let (a, b) = (WorkloadUid::from("a"), WorkloadUid::from("b"));
        assert_eq!(table.find(ip(1), &web, 80, now), None);
        table.keep(ip(1), &web, 80, &a, now);
        assert_eq!(table.find(ip(1), &web, 80, after(59)), Some(a.clone()));
        table.keep(ip(1), &web, 80, &a, after(59));
        assert_eq!(table.find(ip(1), &web, 80, after(100)), Some(a.clone()));
        assert_eq!(table.find(ip(1), &web, 80, after(119)), None, "it was too long ago");
        table.keep(ip(1), &web, 80, &b, after(119));
        assert_eq!(table.find(ip(1), &web, 80, after(120)), Some(b));
        for (what, address, service, port) in [
            ("another client", ip(2), &web, 80),
            ("another service", ip(1), &service("db", 60), 80),
            ("another port", ip(1), &web, 81),
            ("no affinity any more", ip(1), &service("web", 0), 80),
        ] {
            assert_eq!(table.find(address, service, port, after(120)), None, "{what}");
        }
    }

    #[test]
    fn it_is_bounded() {
        let (table, now) = (Affinities::default(), Instant::now());
        let (long, short) = (service("long", 3600), service("short", 60));
        let endpoint = WorkloadUid::from("a");
        table.keep(ip(1), &long, 1, &endpoint, now);
        table.keep(ip(1), &short, 1, &endpoint, now);
        for port in 2..=2_000 {
            table.keep(ip(1), &long, port, &endpoint, now + Duration::from_secs(port.into()));
        }
        assert_eq!(table.lock().len(), MOST);
        assert_eq!(table.find(ip(1), &short, 1, now), None, "the first to end is the first to go");
        assert_eq!(table.find(ip(1), &long, 2_000, now), Some(endpoint));
    }
}
