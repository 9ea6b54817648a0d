//! An object that somebody may write who has rights in one namespace, as JSON after a byte that says of which kind it is.

use std::collections::HashSet;

use mesh_core::proto::discovery::{DeltaDiscoveryResponse, Node, Resource};
use mesh_core::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use mesh_core::store;
use mesh_core::xds::mesh::Mesh;
use mesh_core::xds::stream::Session;
use node_agent::index::event::{Event, Kind, Object, ObjectName};
use node_agent::index::{Changes, Config, Index};
use prost::Message;
use serde_json::{Value, json};

const KINDS: [Kind; 6] = [
    Kind::AuthorizationPolicy,
    Kind::PeerAuthentication,
    Kind::ServiceEntry,
    Kind::WorkloadEntry,
    Kind::Service,
    Kind::EndpointSlice,
];

/// What the agent makes of it is what a proxy takes; once the object is gone, so is all that it brought.
pub fn run(data: &[u8]) {
    let Some((first, text)) = data.split_first() else { return };
    let kind = KINDS[usize::from(*first) % KINDS.len()];
    let Ok(Value::Object(mut object)) = serde_json::from_slice(text) else { return };
    // The API server has seen to these.
    let namespace = if first / 8 % 2 == 0 { "shop" } else { "istio-system" };
    let mut metadata = json!({"namespace": namespace, "name": "fuzzed"});
    for field in ["labels", "annotations", "creationTimestamp"] {
        metadata[field] = object.get("metadata").map(|own| own[field].clone()).unwrap_or_default();
    }
    object.insert("metadata".to_owned(), metadata);
    let Some(object) = decoded(kind, Value::Object(object)) else { return };

    let mut index = world();
    let (writer, reader) = store::new();
    let mut proxy = Proxy {
        mesh: Mesh::new(writer, "istio-system", |_: &store::Changes| {}),
        session: Session::new(Node::default(), &[ADDRESS_TYPE, AUTHORIZATION_TYPE]),
    };
    let changes = index.handle(Event::Applied(object));
    let told: usize = changes
        .keys
        .iter()
        .filter_map(|key| index.resource(key))
        .map(|resource| resource.encoded_len())
        .sum();
    assert!(told <= 8 * text.len() + (2 << 20), "{} bytes are made into {told}", text.len());
    proxy.tell(&index, &changes);
    let changes = index.handle(Event::Deleted(kind, ObjectName::new(namespace, "fuzzed")));
    proxy.tell(&index, &changes);
    let left: Vec<_> = reader.services().iter().map(|service| service.service.key.to_string()).collect();
    assert!(left.iter().all(|name| name == "shop/cart.shop.svc.cluster.local"), "left: {left:?}");
    assert_eq!(reader.size().authorizations, 0, "a policy is left");
}

/// What the agent serves, and a proxy that believes it.
struct Proxy<Told> {
    mesh: Mesh<Told>,
    session: Session,
}

impl<Told: FnMut(&store::Changes)> Proxy<Told> {
    fn tell(&mut self, index: &Index, changes: &Changes) {
        let addresses = changes.keys.iter().map(|key| {
            let body = index.resource(key).map(|resource| resource.encode_to_vec());
            (index.resource_name(key), body)
        });
        self.send(ADDRESS_TYPE, addresses.collect());
        let policies = changes.policies.iter().map(|key| {
            let body = index.policy(key).map(|policy| policy.encode_to_vec());
            (index.policy_name(key), body)
        });
        // The one that is always there.
        let policies = policies.filter(|(name, _)| !name.contains("istio_converted_static_strict"));
        self.send(AUTHORIZATION_TYPE, policies.collect());
    }

    fn send(&mut self, type_url: &str, resources: Vec<(String, Option<Vec<u8>>)>) {
        let mut names = HashSet::new();
        let mut response = DeltaDiscoveryResponse { type_url: type_url.to_owned(), ..Default::default() };
        for (name, body) in resources {
            assert!(names.insert(name.clone()), "two resources have the name {name}");
            let Some(value) = body else {
                response.removed_resources.push(name);
                continue;
            };
            let body = prost_types::Any { type_url: type_url.to_owned(), value };
            response.resources.push(Resource { name, resource: Some(body), ..Default::default() });
        }
        let reply = self.session.receive(response, &mut self.mesh);
        assert!(reply.rejected.is_empty(), "our own proxy refuses it: {:?}", reply.rejected);
    }
}

/// Two pods and a service.
fn world() -> Index {
    let mut index = Index::new(Config {
        cluster_id: "Kubernetes".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        node_name: "node-1".to_owned(),
        system_namespace: "ambit-system".to_owned(),
        root_namespace: "istio-system".to_owned(),
        dns_capture: true,
        excluded_namespaces: HashSet::new(),
    });
    let pod = |name: &str, ip: &str| {
        json!({
            "metadata": {"namespace": "shop", "name": name, "uid": name, "labels": {"app": "cart"}},
            "spec": {"nodeName": "node-1", "serviceAccountName": "cart", "containers": [{"name": "app"}]},
            "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                       "conditions": [{"type": "Ready", "status": "True"}]},
        })
    };
    let service = json!({
        "metadata": {"namespace": "shop", "name": "cart"},
        "spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "ipFamilies": ["IPv4"],
                 "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    });
    let objects =
        [(Kind::Pod, pod("a", "10.0.0.1")), (Kind::Pod, pod("b", "10.0.0.2")), (Kind::Service, service)];
    for (kind, object) in objects {
        let object = decoded(kind, object).expect("an object of the world");
        index.handle(Event::Applied(object));
    }
    for kind in Kind::ALL {
        index.handle(Event::Listed(kind));
    }
    index
}

fn decoded(kind: Kind, value: Value) -> Option<Object> {
    fn of<T: serde::de::DeserializeOwned>(value: Value) -> Option<Box<T>> {
        serde_json::from_value(value).ok().map(Box::new)
    }
    Some(match kind {
        Kind::Pod => Object::Pod(of(value)?),
        Kind::Service => Object::Service(of(value)?),
        Kind::EndpointSlice => Object::EndpointSlice(of(value)?),
        Kind::PeerAuthentication => Object::PeerAuthentication(of(value)?),
        Kind::AuthorizationPolicy => Object::AuthorizationPolicy(of(value)?),
        Kind::ServiceEntry => Object::ServiceEntry(of(value)?),
        Kind::WorkloadEntry => Object::WorkloadEntry(of(value)?),
        Kind::Namespace | Kind::Node | Kind::NetworkPolicy => return None,
    })
}

/// One of each kind, with most of its fields.
pub fn seeds() -> Vec<Vec<u8>> {
    let ports = json!([{"number": 443, "name": "tls", "protocol": "TLS", "targetPort": 8443}]);
    // A few kilobytes whose product is megabytes.
    let hosts: Vec<String> = (0..48).map(|number| format!("h{number}.example")).collect();
    let numbers: Vec<Value> = (1..96).map(|number| json!({"number": number})).collect();
    let endpoints: Vec<Value> =
        (1..96).map(|number| json!({"address": format!("10.9.0.{number}")})).collect();
    let objects = [
        (
            0,
            json!({"apiVersion": "security.istio.io/v1", "spec": {
                "selector": {"matchLabels": {"app": "cart"}}, "action": "DENY",
                "rules": [{
                    "from": [{"source": {"principals": ["cluster.local/ns/shop/sa/*"], "notNamespaces": ["dev"],
                                         "ipBlocks": ["10.0.0.0/8"], "serviceAccounts": ["shop/cart"]}}],
                    "to": [{"operation": {"ports": ["8080"], "methods": ["GET"], "paths": ["/*"]}}],
                    "when": [{"key": "source.ip", "notValues": ["fd00::/8"]},
                             {"key": "request.headers[x]", "values": ["y"]}],
                }],
            }}),
        ),
        (
            8,
            json!({"apiVersion": "security.istio.io/v1beta1", "metadata": {"annotations": {"istio.io/dry-run": "true"}},
            "spec": {"action": "ALLOW", "rules": [{}]}}),
        ),
        (
            1,
            json!({"spec": {"selector": {"matchLabels": {"app": "cart"}}, "mtls": {"mode": "STRICT"},
            "portLevelMtls": {"8080": {"mode": "DISABLE"}}}}),
        ),
        (
            2,
            json!({"spec": {"hosts": ["api.example.com", "*.example.net"], "addresses": ["240.1.0.0/16", "240.0.0.1"],
            "ports": ports, "resolution": "STATIC", "location": "MESH_EXTERNAL", "exportTo": ["."],
            "subjectAltNames": ["spiffe://cluster.local/ns/x/sa/y"],
            "endpoints": [{"address": "192.0.2.1", "ports": {"tls": 9443}, "locality": "r/z/s", "weight": 3},
                          {"address": "fd00::1"}]}}),
        ),
        (
            2,
            json!({"spec": {"hosts": ["db.example.com"], "addresses": ["240.0.0.2"], "ports": ports,
            "resolution": "DNS", "endpoints": [{"address": "db.example.org"}]}}),
        ),
        (
            2,
            json!({"spec": {"hosts": ["w.example.com"], "addresses": ["240.0.0.3"], "ports": ports,
            "resolution": "STATIC", "workloadSelector": {"labels": {"app": "cart"}}}}),
        ),
        (
            2,
            json!({"metadata": {"labels": {"networking.istio.io/enable-autoallocate-ip": "true"}},
            "spec": {"hosts": ["a.example.com", "b.example.com"], "ports": ports, "resolution": "DNS"},
            "status": {"addresses": [{"host": "a.example.com", "value": "240.240.0.9"},
                                     {"host": "A.example.com", "value": "2001:2::9"}, {"value": "240.240.0.8"}]}}),
        ),
        (
            2,
            json!({"spec": {"hosts": hosts, "ports": numbers, "resolution": "STATIC", "endpoints": endpoints,
            "subjectAltNames": vec!["spiffe://cluster.local/ns/x/sa/y"; 64]}}),
        ),
        (
            3,
            json!({"spec": {"address": "192.0.2.9", "labels": {"app": "cart"}, "serviceAccount": "cart",
            "network": "", "locality": "r/z", "weight": 2, "ports": {"tls": 8443}}}),
        ),
        (
            4,
            json!({"spec": {"clusterIP": "10.96.0.8", "clusterIPs": ["10.96.0.8", "fd00:96::8"],
            "ipFamilies": ["IPv4", "IPv6"], "sessionAffinity": "ClientIP", "internalTrafficPolicy": "Local",
            "trafficDistribution": "PreferClose", "publishNotReadyAddresses": true,
            "ports": [{"name": "http", "port": 80, "targetPort": "web"}, {"name": "dns", "port": 53, "protocol": "UDP"}]}}),
        ),
        (
            5,
            json!({"metadata": {"labels": {"kubernetes.io/service-name": "cart"}}, "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": true, "serving": true, "terminating": false},
                           "targetRef": {"kind": "Pod", "name": "a", "namespace": "shop", "uid": "a"}},
                          {"addresses": ["192.0.2.7"], "conditions": {}, "nodeName": "node-2", "zone": "z"}]}),
        ),
    ];
    objects.map(|(first, object)| [&[first], object.to_string().as_bytes()].concat()).into()
}
