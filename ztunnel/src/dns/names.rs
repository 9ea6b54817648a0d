//! Which service a name means, as the client's resolver would have it: a decision over a snapshot, no I/O.
//!
//! A resolver with search domains asks for `api.example.com.shop.svc.cluster.local` before it asks for
//! `api.example.com`. Where the mesh has the latter, it is answered at once, as an alias, and the other questions need
//! not be asked.

use std::sync::Arc;

use mesh_core::addr::Network;
use mesh_core::service::ServicePort;
use mesh_core::store::{Reader, ServiceEntry};

use super::answer::Client;

/// The cluster's DNS suffix, below which all of its services are.
#[derive(Clone, Debug)]
pub struct Zone {
    /// `cluster.local`
    domain: String,
    /// `.svc.cluster.local`
    services: String,
}

impl From<&str> for Zone {
    fn from(domain: &str) -> Self {
        let domain = domain.trim_matches('.').to_ascii_lowercase();
        Self { services: format!(".svc.{domain}"), domain }
    }
}

/// What a name means.
#[derive(Debug)]
pub struct Meaning {
    /// The service.
    pub service: Arc<ServiceEntry>,
    /// One pod of it, by name.
    pub pod: Option<String>,
    /// The service is one of the cluster: the cluster's own DNS has its names, too.
    pub of_cluster: bool,
    /// What was asked for is only another name of this one.
    pub canonical: Option<String>,
}

impl Zone {
    /// What `name` (lower case, no last dot) means to a client; none if it is nothing of the mesh.
    ///
    /// First the name as it is, then without each of the client's search domains. Only a name that nobody can have
    /// outside of the cluster is completed as it is (`web`, `web.shop.svc`): `payments.dev` is somebody's on the internet,
    /// and who means the namespace `dev` has a resolver that asks for that first.
    pub fn find(
        &self,
        mesh: &Reader,
        Client { namespace, network, .. }: Client<'_>,
        name: &str,
    ) -> Option<Meaning> {
        let look = Look { zone: self, mesh, namespace, network };
        let Some(rest) = name.strip_suffix(&self.domain).and_then(|rest| rest.strip_suffix('.')) else {
            let completed = (!name.contains('.') || name.ends_with(".svc")).then(|| look.completed(name));
            return completed.flatten().or_else(|| look.exact(name)).or_else(|| look.wildcard(name));
        };
        if let Some(found) = look.exact(name) {
            return Some(found);
        }
        if look.is_part_of_service(name) {
            return None;
        }
        // The longest search domain first, as it is the first that resolvers append; whom a name would mean if it were
        // completed by another one had its answer then.
        let first = rest.strip_suffix(&format!(".{namespace}.svc"));
        // What the cluster has of that name before what a ServiceEntry calls so.
        let first = first.and_then(|meant| look.completed_search(meant).or_else(|| look.searched(meant)));
        let others = [rest.strip_suffix(".svc"), Some(rest)];
        first.or_else(|| others.into_iter().flatten().find_map(|meant| look.searched(meant)))
    }

    /// The port that `_http._tcp.web.shop.svc.cluster.local` names, and its service, which is one of the cluster.
    pub fn port(
        &self,
        mesh: &Reader,
        namespace: &str,
        name: &str,
    ) -> Option<(Arc<ServiceEntry>, ServicePort)> {
        let (port, rest) = name.strip_prefix('_')?.split_once('.')?;
        let host = rest.strip_prefix("_tcp.").filter(|host| host.ends_with(&self.services))?;
        let service = mesh.service_named(host, namespace)?;
        let port = service.service.named_port(port)?;
        Some((service, port))
    }
}

/// One look-up.
struct Look<'a> {
    zone: &'a Zone,
    mesh: &'a Reader,
    namespace: &'a str,
    network: &'a Network,
}

impl Look<'_> {
    /// The service of that host name, or a pod of a service of the cluster.
    fn exact(&self, name: &str) -> Option<Meaning> {
        let of_cluster = name.ends_with(&self.zone.services);
        // A name of the cluster's services is nobody else's, whoever claims it.
        let service = self.mesh.service_named(name, self.namespace);
        if let Some(service) = service.filter(|service| service.service.canonical || !of_cluster) {
            return Some(self.meaning(service, None));
        }
        if !of_cluster {
            return None;
        }
        let (pod, host) = name.split_once('.')?;
        let service = self.mesh.service_named(host, self.namespace)?;
        let pod = is_pod(&service, self.network, pod).then(|| pod.to_owned())?;
        Some(self.meaning(service, Some(pod)))
    }

    /// Whether a name is below that of a service of the cluster: a port of it, or an endpoint that is not known here.
    fn is_part_of_service(&self, name: &str) -> bool {
        let mut rest = name;
        while let Some((_, host)) = rest.split_once('.')
            && host.ends_with(&self.zone.services)
        {
            if self.mesh.service_named(host, self.namespace).is_some() {
                return true;
            }
            rest = host;
        }
        false
    }

    /// The service of a wildcard, the most specific one.
    fn wildcard(&self, name: &str) -> Option<Meaning> {
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(service) = self.mesh.service_named(&format!("*.{parent}"), self.namespace) {
                return Some(self.meaning(service, None));
            }
            rest = parent;
        }
        None
    }

    /// What a name means in the cluster: `web`, `web.shop`, `web.shop.svc`, and with a pod's name before it.
    fn completed(&self, name: &str) -> Option<Meaning> {
        let Zone { domain, services } = self.zone;
        let namespace = self.namespace;
        if name.ends_with(".svc") {
            return self.exact(&format!("{name}.{domain}"));
        }
        match name.matches('.').count() {
            0 => self.exact(&format!("{name}.{namespace}{services}")),
            1 => self
                .exact(&format!("{name}{services}"))
                .or_else(|| self.exact(&format!("{name}.{namespace}{services}"))),
            2 => self.exact(&format!("{name}{services}")),
            _ => None,
        }
    }

    /// What is left of a name without the search domain that the client's resolver appended.
    fn searched(&self, name: &str) -> Option<Meaning> {
        let meaning = self.exact(name).or_else(|| self.wildcard(name))?;
        Some(Meaning { canonical: Some(name.to_owned()), ..meaning })
    }

    /// The same of a name that needs another search domain.
    fn completed_search(&self, name: &str) -> Option<Meaning> {
        let meaning = self.completed(name)?;
        let host = &meaning.service.service.key.hostname;
        let canonical = match &meaning.pod {
            Some(pod) => format!("{pod}.{host}"),
            None => host.to_string(),
        };
        Some(Meaning { canonical: Some(canonical), ..meaning })
    }

    fn meaning(&self, service: Arc<ServiceEntry>, pod: Option<String>) -> Meaning {
        let of_cluster = service.service.key.hostname.ends_with(&self.zone.services);
        Meaning { service, pod, of_cluster, canonical: None }
    }
}

/// Whether a service that has no address of its own has a pod of that name that the client can reach.
fn is_pod(service: &ServiceEntry, network: &Network, pod: &str) -> bool {
    service.service.vips.is_empty()
        && service.directory().here(network).is_some_and(|here| here.pods(pod).next().is_some())
}
