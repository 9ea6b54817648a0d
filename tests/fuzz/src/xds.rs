//! Resources from whoever configures a proxy: the responses of a delta xDS stream, one after the other.

use std::collections::HashMap;

use mesh_core::proto::discovery::{DeltaDiscoveryResponse, Node, Resource};
use mesh_core::proto::workload::{self as wire, Address, address::Type};
use mesh_core::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, security};
use mesh_core::store::{self, Reader};
use mesh_core::xds::mesh::Mesh;
use mesh_core::xds::stream::Session;
use prost::Message;

/// Each response is acknowledged or refused, once; said twice it means the same; and nothing is left of what is taken
/// back.
pub fn run(data: &[u8]) {
    let responses = responses(data);
    let (writer, reader) = store::new();
    let mut mesh = Mesh::new(writer, "istio-system", |_: &store::Changes| {});
    let mut session = Session::new(Node::default(), &[ADDRESS_TYPE, AUTHORIZATION_TYPE]);
    for response in &responses {
        for _ in 0..2 {
            let reply = session.receive(response.clone(), &mut mesh);
            assert_eq!(reply.request.response_nonce, response.nonce);
            assert_eq!(reply.request.error_detail.is_none(), reply.rejected.is_empty());
        }
    }
    for type_url in [ADDRESS_TYPE, AUTHORIZATION_TYPE] {
        let of_type = responses.iter().filter(|response| response.type_url == type_url);
        let named = of_type.flat_map(|response| &response.resources).map(|resource| resource.name.clone());
        let (removed_resources, type_url) = (named.collect(), type_url.to_owned());
        session
            .receive(DeltaDiscoveryResponse { type_url, removed_resources, ..Default::default() }, &mut mesh);
    }
    assert_eq!(reader.size(), store::Size::default(), "something is left");
    assert!(reader.workloads().is_empty() && reader.services().is_empty());
}

/// As many as there are, each after its length; what is no response ends them.
fn responses(mut data: &[u8]) -> Vec<DeltaDiscoveryResponse> {
    let next = || DeltaDiscoveryResponse::decode_length_delimited(&mut data).ok();
    std::iter::from_fn(next).take(8).collect()
}

/// A mesh with a service, a headless one with two pods, and a host outside.
pub fn world() -> Reader {
    let (writer, reader) = store::new();
    let mut mesh = Mesh::new(writer, "istio-system", |_: &store::Changes| {});
    let mut session = Session::new(Node::default(), &[ADDRESS_TYPE]);
    session.receive(addresses(), &mut mesh);
    reader
}

fn addresses() -> DeltaDiscoveryResponse {
    let domain = |name: &str| format!("{name}.shop.svc.cluster.local");
    let services = [
        service(&domain("web"), &[&[10, 96, 0, 7], &[0xfd; 16]]),
        service(&domain("db"), &[]),
        service("api.example.com", &[&[240, 240, 0, 1]]),
    ];
    let workloads =
        [pod("db-0", 2, &domain("db")), pod("db-1", 3, &domain("db")), pod("web-0", 4, &domain("web"))];
    let services = services.map(|service| (format!("shop/{}", service.hostname), Type::Service(service)));
    let workloads = workloads.map(|workload| (workload.uid.clone(), Type::Workload(workload)));
    let resources = services.into_iter().chain(workloads).map(|(name, address)| {
        let address = Address { r#type: Some(address) };
        resource(name, ADDRESS_TYPE, &address)
    });
    response(ADDRESS_TYPE, resources.collect())
}

fn service(hostname: &str, vips: &[&[u8]]) -> wire::Service {
    let address = |ip: &&[u8]| wire::NetworkAddress { address: ip.to_vec(), ..Default::default() };
    let port = wire::Port { service_port: 5432, target_port: 8080, app_protocol: 0 };
    wire::Service {
        name: "name".to_owned(),
        namespace: "shop".to_owned(),
        hostname: hostname.to_owned(),
        addresses: vips.iter().map(address).collect(),
        ports: vec![port],
        canonical: hostname.ends_with(".svc.cluster.local"),
        port_names: HashMap::from([("sql".to_owned(), 5432)]).into_iter().collect(),
        ..Default::default()
    }
}

fn pod(name: &str, last: u8, service: &str) -> wire::Workload {
    let port = wire::Port { service_port: 5432, target_port: 8080, app_protocol: 0 };
    let mut v6 = vec![0xfd; 16];
    v6[15] = last;
    wire::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 244, 1, last], v6],
        trust_domain: "cluster.local".to_owned(),
        service_account: "web".to_owned(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        node: "node-1".to_owned(),
        cluster_id: "Kubernetes".to_owned(),
        authorization_policies: vec!["shop/p".to_owned()],
        services: [(format!("shop/{service}"), wire::PortList { ports: vec![port] })].into(),
        ..Default::default()
    }
}

fn policies() -> DeltaDiscoveryResponse {
    let exact = |text: &str| security::StringMatch {
        match_type: Some(security::string_match::MatchType::Exact(text.to_owned())),
    };
    let who = security::Match {
        principals: vec![exact("spiffe://cluster.local/ns/shop/sa/web")],
        not_namespaces: vec![exact("dev")],
        source_ips: vec![security::Address { address: vec![10, 0, 0, 0], length: 8 }],
        destination_ports: vec![8080],
        ..Default::default()
    };
    let rule = security::Rule { clauses: vec![security::Clause { matches: vec![who] }] };
    let policy = security::Authorization {
        name: "p".to_owned(),
        namespace: "shop".to_owned(),
        scope: security::Scope::WorkloadSelector.into(),
        rules: vec![rule],
        ..Default::default()
    };
    response(AUTHORIZATION_TYPE, vec![resource("shop/p".to_owned(), AUTHORIZATION_TYPE, &policy)])
}

fn resource(name: String, type_url: &str, body: &impl Message) -> Resource {
    let body = prost_types::Any { type_url: type_url.to_owned(), value: body.encode_to_vec() };
    Resource { name, version: "1".to_owned(), resource: Some(body), ..Default::default() }
}

fn response(type_url: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    let (type_url, nonce) = (type_url.to_owned(), "n".to_owned());
    DeltaDiscoveryResponse { type_url, nonce, resources, ..Default::default() }
}

/// The whole mesh, each resource by itself, a policy, and one resource after another.
pub fn seeds() -> Vec<Vec<u8>> {
    let all = addresses();
    let single: Vec<_> =
        all.resources.iter().map(|resource| response(ADDRESS_TYPE, vec![resource.clone()])).collect();
    let together = single.iter().take(4).chain([&policies(), &all]).map(encoded).collect::<Vec<_>>().concat();
    single.iter().chain([&all, &policies()]).map(encoded).chain([together]).collect()
}

fn encoded(response: &DeltaDiscoveryResponse) -> Vec<u8> {
    response.encode_length_delimited_to_vec()
}
