//! The readers' side of the store: lookups.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ipnet::IpNet;

use super::{Found, Reader, Refused, ServiceEntry, Size};
use crate::addr::NetworkAddress;
use crate::service::Vip;
use crate::workload::Workload;

impl Reader {
    /// What is at an address: services before workloads (as in Istio's ztunnel), exact addresses before prefixes, and
    /// what was refused only where there is nothing good. `client_namespace` decides between services that claim the same
    /// address, and hides those that are private to another namespace.
    ///
    /// What the API server vouches for is not what a namespace claims: a pod has its address before the services of other
    /// namespaces that are not canonical, and before any prefix.
    pub fn find(&self, address: &NetworkAddress, client_namespace: &str) -> Option<Found> {
        let exact = self.service_at(address, client_namespace);
        let (vouched, claimed) = match exact {
            Some(service) if service.service.canonical || is_of(&service, client_namespace) => {
                (Some(service), None)
            }
            other => (None, other),
        };
        if let Some(service) = vouched {
            return Some(Found::Service(service));
        }
        let workload = self.workload_at(address);
        if let Some(pod) = workload.clone().filter(|workload| workload.is_pod()) {
            return Some(Found::Workload(pod));
        }
        let service =
            claimed.map(Found::Service).or_else(|| self.refused_or_prefix(address, client_namespace));
        match service {
            service @ Some(Found::Service(_)) => service,
            other => workload.map(Found::Workload).or(other),
        }
    }

    /// The workload with an address.
    pub fn workload_at(&self, address: &NetworkAddress) -> Option<Arc<Workload>> {
        self.published.by_address.get(address)
    }

    /// The workload with a name.
    pub fn workload(&self, uid: &str) -> Option<Arc<Workload>> {
        self.published.by_uid.get(uid)
    }

    fn service_at(&self, address: &NetworkAddress, client_namespace: &str) -> Option<Arc<ServiceEntry>> {
        self.published.by_vip.get(address).and_then(|entries| preferred(&entries, client_namespace))
    }

    /// Longest match first: a refused address hides the prefix around it, as the resource itself would.
    fn refused_or_prefix(&self, address: &NetworkAddress, client_namespace: &str) -> Option<Found> {
        let published = &self.published;
        if let Some(refused) = published.refused.at(&Vip::Address(address.clone())) {
            return Some(Found::Refused(refused));
        }
        published.prefix_lengths.load().iter().find_map(|length| {
            let prefix = IpNet::new(address.address, *length).ok()?.trunc();
            let key = (address.network.clone(), prefix);
            let entries = published.by_prefix.get(&key);
            let good = entries.and_then(|entries| preferred(&entries, client_namespace));
            good.map(Found::Service)
                .or_else(|| published.refused.at(&Vip::Prefix(key.0, key.1)).map(Found::Refused))
        })
    }

    /// The resource of that name, if it was refused and no earlier form of it is known.
    pub fn refused(&self, name: &str) -> Option<Arc<Refused>> {
        self.published.refused.named(name)
    }

    /// The service of a namespace with a hostname.
    pub fn service(&self, namespace: &str, hostname: &str) -> Option<Arc<ServiceEntry>> {
        let entries = self.published.by_hostname.get(hostname)?;
        entries.iter().find(|entry| &*entry.service.key.namespace == namespace).cloned()
    }

    /// The service with a hostname that a client of that namespace means.
    pub fn service_named(&self, hostname: &str, client_namespace: &str) -> Option<Arc<ServiceEntry>> {
        preferred(&self.published.by_hostname.get(hostname)?, client_namespace)
    }

    /// Every workload, for the configuration dump; takes time in proportion to the mesh.
    pub fn workloads(&self) -> Vec<Arc<Workload>> {
        self.published.by_uid.values()
    }

    /// Every service, for the configuration dump; takes time in proportion to the mesh.
    pub fn services(&self) -> Vec<Arc<ServiceEntry>> {
        self.published.by_hostname.values().iter().flat_map(|entries| entries.iter().cloned()).collect()
    }

    /// How much is known.
    pub fn size(&self) -> Size {
        Size {
            workloads: self.published.workloads.load(Ordering::Relaxed),
            services: self.published.services.load(Ordering::Relaxed),
            authorizations: self.published.policies.count(),
            refused_authorizations: self.published.policies.refused(),
            refused: self.published.refused.count(),
            unreadable: self.published.refused.unreadable(),
        }
    }
}

fn is_of(entry: &ServiceEntry, namespace: &str) -> bool {
    &*entry.service.key.namespace == namespace
}

/// Among services that claim one name or address: the client's namespace, then the canonical one, then the oldest.
fn preferred(entries: &[Arc<ServiceEntry>], client_namespace: &str) -> Option<Arc<ServiceEntry>> {
    let own = |entry: &&Arc<ServiceEntry>| is_of(entry, client_namespace);
    let visible = || entries.iter().filter(|entry| !entry.service.namespace_only || own(entry));
    visible()
        .find(own)
        .or_else(|| visible().find(|e| e.service.canonical))
        .or_else(|| visible().next())
        .cloned()
}
