//! What a client asks the agent for: the requests of a delta xDS stream.

use mesh_core::proto::discovery::DeltaDiscoveryRequest;
use mesh_core::proto::workload::{self as wire, Address, address::Type as Kind};
use mesh_core::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use node_agent::xds::scope::Scope;
use node_agent::xds::session::Session;
use node_agent::xds::snapshot::{Snapshot, Type};
use prost::Message;

/// A client of one namespace is told nothing of another, whatever it says it has; and each type waits for one answer.
pub fn run(data: &[u8]) {
    let mut snapshot = snapshot();
    let [own, root] = ["shop", "istio-system"].map(Into::into);
    let mut session = Session::new(Scope::Namespace { own, root });
    let mut unanswered = Vec::new();
    for (number, request) in requests(data).into_iter().enumerate() {
        unanswered.retain(|(_, nonce)| *nonce != request.response_nonce);
        if session.receive(request, &snapshot).is_err() {
            return;
        }
        if number % 2 == 1 {
            let change = service("shop", &format!("new-{number}"));
            let name = snapshot.put(Type::Address, &format!("shop/new-{number}"), Some(&change));
            session.changed(Type::Address, name, &snapshot);
        }
        while let Some(response) = session.next(&snapshot) {
            assert!(
                unanswered.iter().all(|(type_url, _)| *type_url != response.type_url),
                "two responses wait for an answer"
            );
            for resource in &response.resources {
                assert!(resource.name.starts_with("shop/"), "told of {}", resource.name);
            }
            unanswered.push((response.type_url, response.nonce));
        }
    }
}

fn requests(mut data: &[u8]) -> Vec<DeltaDiscoveryRequest> {
    let next = || DeltaDiscoveryRequest::decode_length_delimited(&mut data).ok();
    std::iter::from_fn(next).take(16).collect()
}

fn snapshot() -> Snapshot {
    let mut snapshot = Snapshot::default();
    for (namespace, name) in [("shop", "web"), ("shop", "db"), ("bank", "vault")] {
        snapshot.put(Type::Address, &format!("{namespace}/{name}"), Some(&service(namespace, name)));
    }
    snapshot
}

fn service(namespace: &str, name: &str) -> Address {
    let service = wire::Service {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        hostname: format!("{name}.{namespace}.svc.cluster.local"),
        ..Default::default()
    };
    Address { r#type: Some(Kind::Service(service)) }
}

/// Subscriptions with and without what is there already, answers, and a request for single names.
pub fn seeds() -> Vec<Vec<u8>> {
    let ask = |type_url: &str| DeltaDiscoveryRequest { type_url: type_url.to_owned(), ..Default::default() };
    let both = [ask(ADDRESS_TYPE), ask(AUTHORIZATION_TYPE)];
    let answers = ["1", "2", "3"]
        .map(|nonce| DeltaDiscoveryRequest { response_nonce: nonce.to_owned(), ..ask(ADDRESS_TYPE) });
    let held = ["shop/web", "bank/vault", "gone"].map(|name| (name.to_owned(), "0".to_owned()));
    let again = DeltaDiscoveryRequest { initial_resource_versions: held.into(), ..ask(ADDRESS_TYPE) };
    let named = DeltaDiscoveryRequest {
        resource_names_subscribe: vec!["bank/vault".to_owned()],
        ..ask(ADDRESS_TYPE)
    };
    let encoded = |requests: &[DeltaDiscoveryRequest]| {
        requests.iter().flat_map(DeltaDiscoveryRequest::encode_length_delimited_to_vec).collect()
    };
    vec![
        encoded(&[&both[..], &answers].concat()),
        encoded(&[&[again], &answers[..]].concat()),
        encoded(&[both[0].clone(), named]),
    ]
}
