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
    pub fn find(&self, address: &NetworkAddress, client_namespace: &str) -> Option<Found> {
        match self.service_or_refused(address, client_namespace) {
            service @ Some(Found::Service(_)) => service,
            other => self.workload_at(address).map(Found::Workload).or(other),
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

    /// Longest match first: a refused address hides the prefix around it, as the resource itself would.
    fn service_or_refused(&self, address: &NetworkAddress, client_namespace: &str) -> Option<Found> {
        let published = &self.published;
        let exact = published.by_vip.get(address).and_then(|entries| preferred(&entries, client_namespace));
        if let Some(entry) = exact {
            return Some(Found::Service(entry));
        }
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

/// Among services that claim one name or address: the client's namespace, then the canonical one, then the first.
fn preferred(entries: &[Arc<ServiceEntry>], client_namespace: &str) -> Option<Arc<ServiceEntry>> {
    let own = |entry: &&Arc<ServiceEntry>| &*entry.service.key.namespace == client_namespace;
    let visible = || entries.iter().filter(|entry| !entry.service.namespace_only || own(entry));
    visible()
        .find(own)
        .or_else(|| visible().find(|e| e.service.canonical))
        .or_else(|| visible().next())
        .cloned()
}
