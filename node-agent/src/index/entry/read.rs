//! What a ServiceEntry and a WorkloadEntry say, as far as layer 4 goes, and what of it cannot be done.

mod made_up;

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_core::identity::Identity;
use mesh_core::proto::workload as proto;
use proto::load_balancing::{Mode, Scope};
use serde::Deserialize;

pub(super) use self::made_up::MadeUp;
use super::super::Config;
use super::super::event::{Custom, ObjectName};
use super::super::pod::{Labels, REDIRECTION_ANNOTATION, REDIRECTION_ENABLED};
use super::allocate::is_made_up;
use super::budget;

/// What the model keeps of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq)]
pub(in super::super) struct ServiceEntry {
    /// Seconds since 1970: of several with one host the oldest says what it is.
    pub(super) created: i64,
    pub(super) hosts: Vec<String>,
    /// With their prefix length where it is not the whole address.
    pub(super) addresses: Vec<(IpAddr, Option<u8>)>,
    /// Those of them that could be made up for others.
    pub(super) reserved: Vec<IpAddr>,
    pub(super) made_up: MadeUp,
    pub(super) ports: Vec<Port>,
    pub(super) resolution: Resolution,
    /// Pods and WorkloadEntries that are its endpoints.
    pub(super) selector: Option<Labels>,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) own_namespace_only: bool,
    pub(super) identities: Vec<String>,
    pub(super) balancing: Option<proto::LoadBalancing>,
    /// Its hosts are looked up: neither are endpoints named, nor selected.
    pub(super) is_its_own_endpoint: bool,
    /// See [`budget::bound`].
    pub(super) cost: usize,
}

/// What the model keeps of a WorkloadEntry.
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) struct WorkloadEntry {
    /// Seconds since 1970.
    pub(super) created: i64,
    pub(super) endpoint: Endpoint,
    /// See [`budget::bound_workload`].
    pub(super) cost: usize,
}

/// A WorkloadEntry's, or one that a ServiceEntry lists.
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) struct Endpoint {
    pub(super) place: Place,
    /// By the names of the services' ports.
    pub(super) ports: BTreeMap<String, u16>,
    pub(super) labels: Labels,
    pub(super) network: String,
    pub(super) locality: Option<proto::Locality>,
    /// 0: as others.
    pub(super) weight: u32,
    pub(super) service_account: String,
    /// It speaks HBONE, by annotation.
    pub(super) captured: bool,
    pub(super) healthy: bool,
}

impl Endpoint {
    /// A host name and no more.
    pub(super) fn named(host: &str) -> Self {
        Self {
            place: Place::Name(host.to_owned()),
            ports: BTreeMap::new(),
            labels: Labels::new(),
            network: String::new(),
            locality: None,
            weight: 0,
            service_account: String::new(),
            captured: false,
            healthy: true,
        }
    }
}

/// Where an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Address(IpAddr),
    /// A host name, which each proxy looks up.
    Name(String),
}

/// One port; all are TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) number: u16,
    pub(super) target: u16,
    pub(super) protocol: proto::AppProtocol,
}

/// How the endpoints are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Resolution {
    /// The address that was dialled.
    #[default]
    None,
    /// The endpoints' addresses.
    Static,
    /// Names, by DNS.
    Dns,
}

/// Annotation of a ServiceEntry, as `trafficDistribution` of a Service.
const DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    hosts: Vec<String>,
    addresses: Vec<String>,
    ports: Vec<PortSpec>,
    resolution: String,
    endpoints: Vec<EndpointSpec>,
    workload_selector: Option<Selector>,
    export_to: Vec<String>,
    subject_alt_names: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PortSpec {
    number: u32,
    name: String,
    protocol: String,
    target_port: u32,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Selector {
    labels: Labels,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct EndpointSpec {
    address: String,
    ports: BTreeMap<String, u32>,
    labels: Labels,
    network: String,
    locality: String,
    weight: u32,
    service_account: String,
}

/// Reads what can be read, and says what cannot.
pub(super) fn service_entry(
    config: &Config,
    name: &ObjectName,
    object: &Custom,
) -> (ServiceEntry, Vec<String>) {
    let mut faults = Vec::new();
    let spec: ServiceSpec = spec(object, &mut faults);
    let resolution = resolution(&spec.resolution, &mut faults);
    let hosts = hosts(config, &spec.hosts, &mut faults);
    let ports: Vec<Port> = spec.ports.iter().filter_map(|port| read_port(port, &mut faults)).collect();
    let selector = spec.workload_selector.as_ref().map(|selector| selector.labels.clone());
    let mut endpoints: Vec<Endpoint> = spec
        .endpoints
        .iter()
        .filter_map(|endpoint| read_endpoint(endpoint, resolution == Resolution::Dns, &mut faults))
        .collect();
    if selector.is_some() && !endpoints.is_empty() {
        faults.push("spec.endpoints is left out, for there is a spec.workloadSelector".to_owned());
        endpoints.clear();
    }
    if resolution == Resolution::None {
        endpoints.clear();
    }
    let is_its_own_endpoint =
        resolution == Resolution::Dns && spec.endpoints.is_empty() && selector.is_none();
    for host in hosts.iter().filter(|host| is_its_own_endpoint && host.starts_with('*')) {
        faults.push(format!("{host} cannot be looked up: spec.endpoints has to name hosts"));
    }
    let addresses: Vec<_> = spec.addresses.iter().filter_map(|text| address(text, &mut faults)).collect();
    let whole = addresses.iter().filter(|(_, length)| length.is_none()).map(|(ip, _)| *ip);
    let mut entry = ServiceEntry {
        created: created(object),
        hosts,
        reserved: whole.filter(|ip| is_made_up(*ip)).collect(),
        addresses,
        made_up: made_up::made_up(&spec, object, !ports.is_empty()),
        ports,
        resolution,
        selector,
        endpoints,
        own_namespace_only: own_namespace_only(&spec.export_to, &name.namespace, &mut faults),
        identities: spec.subject_alt_names,
        balancing: balancing(resolution, object),
        is_its_own_endpoint,
        cost: 0,
    };
    budget::bound(name, &mut entry, &mut faults);
    (entry, faults)
}

/// The same of a WorkloadEntry. None: it is nowhere.
pub(super) fn workload_entry(name: &ObjectName, object: &Custom) -> (Option<WorkloadEntry>, Vec<String>) {
    let mut faults = Vec::new();
    let spec: EndpointSpec = spec(object, &mut faults);
    let annotations = object.metadata.annotations.as_ref();
    let captured = annotations.and_then(|all| all.get(REDIRECTION_ANNOTATION));
    let conditions = object.status["conditions"].as_array();
    let sick =
        conditions.into_iter().flatten().any(|one| one["type"] == "Healthy" && one["status"] == "False");
    let entry = read_endpoint(&spec, true, &mut faults).map(|endpoint| {
        // Selectors look at those of the object, too.
        let own = object.metadata.labels.clone().unwrap_or_default();
        let labels = own.into_iter().chain(endpoint.labels).collect();
        let captured = captured.is_some_and(|value| value == REDIRECTION_ENABLED);
        let mut endpoint = Endpoint { labels, captured, healthy: !sick, ..endpoint };
        let cost = budget::bound_workload(name, &mut endpoint, &mut faults);
        WorkloadEntry { created: created(object), endpoint, cost }
    });
    (entry, faults)
}

fn created(object: &Custom) -> i64 {
    object.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second())
}

fn spec<T: serde::de::DeserializeOwned + Default>(object: &Custom, faults: &mut Vec<String>) -> T {
    T::deserialize(&object.spec).unwrap_or_else(|error| {
        faults.push(format!("spec cannot be read, and nothing of it is in force: {error}"));
        T::default()
    })
}

fn resolution(text: &str, faults: &mut Vec<String>) -> Resolution {
    match text {
        "" | "NONE" => Resolution::None,
        "STATIC" => Resolution::Static,
        "DNS" | "DNS_ROUND_ROBIN" => Resolution::Dns,
        other => {
            faults.push(format!("spec.resolution {other} is not supported: it has no endpoints"));
            Resolution::Static
        }
    }
}

/// Names of Kubernetes' own services are theirs, in every namespace: also those that no Service has yet, and those of
/// pods. So are short forms of them, which clients complete.
fn hosts(config: &Config, all: &[String], faults: &mut Vec<String>) -> Vec<String> {
    let services = format!(".svc.{}", config.cluster_domain);
    let is_services = |host: &str| {
        let within = host.strip_prefix('*').unwrap_or(host);
        within.ends_with(&services)
            || within.ends_with(".svc")
            || services.ends_with(within) && within.starts_with('.')
    };
    let mut hosts = Vec::new();
    for host in all.iter().map(|host| host.to_ascii_lowercase()) {
        if is_services(&host) {
            faults.push(format!("{host} in spec.hosts is left out: it is a name of Services"));
        } else if !host.is_empty() && !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    hosts
}

fn address(text: &str, faults: &mut Vec<String>) -> Option<(IpAddr, Option<u8>)> {
    let (ip, length) = match text.split_once('/') {
        Some((ip, length)) => (ip, Some(length)),
        None => (text, None),
    };
    let read = || {
        let written: IpAddr = ip.parse().ok()?;
        // IPv4-mapped ones are IPv4 for the proxies, too.
        let ip = written.to_canonical();
        let mapped = if ip.is_ipv4() && written.is_ipv6() { 96 } else { 0 };
        let length = match length {
            Some(length) => Some(length.parse::<u8>().ok()?.checked_sub(mapped)?),
            None => None,
        };
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        let sensible = length.is_none_or(|length| length <= bits);
        sensible.then_some((ip, length.filter(|length| *length < bits)))
    };
    let found = read();
    if found.is_none() {
        faults.push(format!("{text} in spec.addresses is left out: it is no address or prefix"));
    }
    found
}

/// None of UDP, which is not captured.
fn read_port(port: &PortSpec, faults: &mut Vec<String>) -> Option<Port> {
    let protocol = port.protocol.to_ascii_uppercase();
    if protocol == "UDP" {
        return None;
    }
    let target = if port.target_port == 0 { port.number } else { port.target_port };
    let (Some(number), Some(target)) = (port_number(port.number), port_number(target)) else {
        faults.push(format!("port {} to {target} in spec.ports is left out: it is none", port.number));
        return None;
    };
    let protocol = match protocol.as_str() {
        "HTTP" | "HTTP_PROXY" => proto::AppProtocol::Http11,
        "HTTP2" => proto::AppProtocol::Http2,
        "GRPC" | "GRPC-WEB" => proto::AppProtocol::Grpc,
        "TCP" => proto::AppProtocol::Tcp,
        "HTTPS" | "TLS" => proto::AppProtocol::Tls,
        _ => proto::AppProtocol::Unknown,
    };
    Some(Port { name: port.name.clone(), number, target, protocol })
}

fn port_number(number: u32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number > 0)
}

fn read_endpoint(spec: &EndpointSpec, named: bool, faults: &mut Vec<String>) -> Option<Endpoint> {
    let address = &spec.address;
    let place = match address.parse() {
        Ok(ip) => Place::Address(ip),
        Err(_) if named && !address.is_empty() && !address.contains(['/', ':']) => {
            Place::Name(address.clone())
        }
        Err(_) => {
            faults.push(format!("the endpoint {address:?} is left out: it cannot be reached by that"));
            return None;
        }
    };
    if !may_be_account(&spec.service_account) {
        let account = &spec.service_account;
        faults
            .push(format!("the endpoint {address:?} is left out: {account:?} is no service account's name"));
        return None;
    }
    let mut ports = BTreeMap::new();
    for (name, number) in &spec.ports {
        match port_number(*number).filter(|_| name.len() <= LONGEST_PORT_NAME) {
            Some(number) => drop(ports.insert(name.clone(), number)),
            None => {
                faults.push(format!("port {name} of the endpoint {address} is left out: {number} is none"))
            }
        }
    }
    Some(Endpoint {
        place,
        ports,
        labels: budget::labels(&spec.labels, address, faults),
        network: spec.network.clone(),
        locality: locality(&spec.locality),
        weight: spec.weight,
        service_account: spec.service_account.clone(),
        ..Endpoint::named("")
    })
}

/// As the schema has it for the ports that these refer to.
const LONGEST_PORT_NAME: usize = 256;

/// Whether there is an identity with it, or it is not said.
fn may_be_account(name: &str) -> bool {
    name.is_empty() || format!("spiffe://cluster.local/ns/default/sa/{name}").parse::<Identity>().is_ok()
}

/// `region/zone/subzone`.
fn locality(text: &str) -> Option<proto::Locality> {
    let mut parts = text.splitn(3, '/').map(str::to_owned);
    let mut part = || parts.next().unwrap_or_default();
    let locality = proto::Locality { region: part(), zone: part(), subzone: part() };
    (locality != proto::Locality::default()).then_some(locality)
}

/// Visible to all, or to its own namespace; between the two there is nothing at layer 4.
fn own_namespace_only(export_to: &[String], namespace: &str, faults: &mut Vec<String>) -> bool {
    if export_to.is_empty() || export_to.iter().any(|to| to == "*") {
        return false;
    }
    if export_to.iter().any(|to| to != "." && to != namespace) {
        faults.push("spec.exportTo names other namespaces: it is visible to its own only".to_owned());
    }
    true
}

fn balancing(resolution: Resolution, object: &Custom) -> Option<proto::LoadBalancing> {
    let annotations = object.metadata.annotations.as_ref();
    let distribution = annotations.and_then(|all| all.get(DISTRIBUTION)).map(String::as_str);
    let (mode, scopes): (Mode, &[Scope]) = match (resolution, distribution) {
        (Resolution::None, _) => (Mode::Passthrough, &[]),
        (_, distribution) => super::super::service::distribution(distribution)?,
    };
    Some(proto::LoadBalancing {
        routing_preference: scopes.iter().map(|scope| i32::from(*scope)).collect(),
        mode: mode.into(),
        ..Default::default()
    })
}
