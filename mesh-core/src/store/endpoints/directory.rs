//! A service's endpoints by their names and addresses, for DNS: made for the first who asks after a change, so that a
//! question costs what its answer is long, however many endpoints there are.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::Endpoint;
use crate::addr::Network;
use crate::service::Service;

/// The endpoints that are ready.
#[derive(Debug, Default)]
pub struct Directory {
    networks: HashMap<Network, Here>,
}

/// Those of one network.
#[derive(Debug, Default)]
pub struct Here {
    /// In an order that is theirs, each once.
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    /// They have addresses, if only of families that the service does not have.
    have_addresses: bool,
    /// Each is a pod of the service's namespace that has an address.
    are_pods: bool,
    /// Ports of the service that each of them has a target for.
    ports: Vec<u16>,
    endpoints: Vec<Arc<Endpoint>>,
    /// Numbers of the pods of the service's namespace.
    pods: HashMap<Arc<str>, Vec<usize>>,
}

impl Directory {
    pub(super) fn new(service: &Service, ready: &[Arc<Endpoint>]) -> Self {
        let mut networks: HashMap<Network, Here> = HashMap::new();
        for endpoint in ready {
            let here = networks.entry(endpoint.workload.network.clone()).or_default();
            here.endpoints.push(endpoint.clone());
        }
        networks.values_mut().for_each(|here| here.arrange(service));
        Self { networks }
    }

    /// The endpoints of a network; none if there are none.
    pub fn here(&self, network: &Network) -> Option<&Here> {
        self.networks.get(network)
    }
}

impl Here {
    fn arrange(&mut self, service: &Service) {
        // Neighbours in the writer's map are in no order.
        self.endpoints.sort_unstable_by(|a, b| a.workload.uid.cmp(&b.workload.uid));
        let is_pod = |endpoint: &Endpoint| {
            endpoint.workload.is_pod() && endpoint.workload.namespace == service.key.namespace
        };
        let all = self.endpoints.iter().flat_map(|endpoint| endpoint.workload.addresses.iter().copied());
        (self.v4, self.v6) = all.clone().filter(|ip| service.families.allows(*ip)).partition(IpAddr::is_ipv4);
        self.have_addresses = all.clone().next().is_some();
        for addresses in [&mut self.v4, &mut self.v6] {
            addresses.sort_unstable();
            // One may be named by two slices.
            addresses.dedup();
        }
        self.are_pods = self.endpoints.iter().all(|of| is_pod(of) && !of.workload.addresses.is_empty());
        let has_target = |port: &u16| {
            let port = service.port(*port);
            port.is_some_and(|port| {
                self.endpoints.iter().all(|endpoint| endpoint.target_port(port).is_some())
            })
        };
        self.ports = service.ports.iter().map(|entry| entry.port).filter(has_target).collect();
        for (number, endpoint) in self.endpoints.iter().enumerate().filter(|(_, endpoint)| is_pod(endpoint)) {
            self.pods.entry(endpoint.workload.name.clone()).or_default().push(number);
        }
    }

    /// Their addresses of one family that the service has, in order; None if no address of theirs is known at all.
    pub fn addresses(&self, v4: bool) -> Option<&[IpAddr]> {
        self.have_addresses.then_some(if v4 { &self.v4 } else { &self.v6 })
    }

    /// The pods of that name.
    pub fn pods(&self, name: &str) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.pods.get(name).into_iter().flatten().map(|number| &self.endpoints[*number])
    }

    /// All, where each is a pod that can be told apart by its name and has a target for that port of the service.
    pub fn all_with_port(&self, port: u16) -> Option<&[Arc<Endpoint>]> {
        (self.are_pods && self.ports.contains(&port)).then_some(&self.endpoints)
    }
}
