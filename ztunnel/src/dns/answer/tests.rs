mod families;

use std::net::IpAddr;

use hickory_proto::op::{Message, Query as Question, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use mesh_core::addr::NetworkAddress;
use mesh_core::convert::Names;
use mesh_core::service::{Balancing, Families, Service, ServiceName, ServicePort, Vip};
use mesh_core::store::{self, Reader, Writer};
use mesh_core::workload::{Health, Locality, Membership, Tunnel, Workload, WorkloadType};

use super::*;

fn service(namespace: &str, hostname: &str, vips: &[&str]) -> Service {
    let vip = |text: &&str| {
        let (network, ip) = text.split_once('/').unwrap_or(("", text));
        Vip::Address(NetworkAddress::new(network.into(), ip.parse().unwrap()))
    };
    Service {
        key: ServiceName { namespace: namespace.into(), hostname: hostname.into() },
        name: "name".into(),
        vips: vips.iter().map(vip).collect(),
        ports: [].into(),
        port_names: [].into(),
        identities: [].into(),
        waypoints: [].into(),
        balancing: Balancing::default(),
        families: Families::Any,
        created: 0,
        canonical: hostname.ends_with(".svc.cluster.local"),
        namespace_only: false,
        affinity: None,
    }
}

fn pod(name: &str, namespace: &str, ips: &[&str], hostname: &str) -> Workload {
    let service = ServiceName { namespace: namespace.into(), hostname: hostname.into() };
    Workload {
        uid: format!("c//Pod/{namespace}/{name}").as_str().into(),
        name: name.into(),
        namespace: namespace.into(),
        addresses: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        network: Network::default(),
        tunnel: Tunnel::Hbone,
        identity: Names::default().identity("cluster.local", namespace, "default").unwrap(),
        waypoint: None,
        node: "node-1".into(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        workload_name: name.into(),
        workload_type: WorkloadType::Pod,
        authorization_policies: [].into(),
        health: Health::Healthy,
        cluster: "Kubernetes".into(),
        network_gateway: None,
        hostname: "".into(),
        services: [Membership { service, ports: [].into() }].into(),
        application_tunnel: None,
        locality: Locality::default(),
        host_network: false,
        capacity: 1,
        shortcut: false,
    }
}

fn mesh(fill: impl FnOnce(&mut Writer)) -> Reader {
    let (mut writer, reader) = store::new();
    fill(&mut writer);
    writer.commit();
    reader
}

/// A cluster with services of every kind.
fn cluster() -> Reader {
    mesh(|mesh| {
        let domain = |name: &str| format!("{name}.svc.cluster.local");
        mesh.put_service(service("shop", &domain("web.shop"), &["10.96.0.7", "fd00:96::7", "198.51.100.1"]));
        let v4 = service("pay", &domain("api.pay"), &["10.96.0.8", "2001:db8::8"]);
        mesh.put_service(Service { families: Families::V4Only, ..v4 });
        mesh.put_service(service("shop", &domain("db.shop"), &[]));
        mesh.put_service(service("shop", &domain("empty.shop"), &[]));
        mesh.put_service(service("shop", &domain("far.shop"), &["network-2/10.96.0.9"]));
        mesh.put_service(service("shop", "api.example.com", &["240.240.0.1"]));
        mesh.put_service(service("shop", "no-address.example.com", &[]));
        mesh.put_service(service("pay", "*.example.net", &["240.240.0.2"]));
        mesh.put_service(service("pay", "*.deep.example.net", &["240.240.0.3"]));
        let private = service("pay", "private.example.com", &["240.240.0.4"]);
        mesh.put_service(Service { namespace_only: true, ..private });
        mesh.put_service(service("dev", &domain("payments.dev"), &["10.96.0.10"]));
        // Who claims names of the cluster's services, or what clients complete to them.
        for host in [&*domain("db-0.db.shop"), &*domain("gone.shop"), "api.pay", "web.shop.svc"] {
            let claimed = service("evil", host, &["240.240.6.6"]);
            mesh.put_service(Service { canonical: false, ..claimed });
        }
        let db = domain("db.shop");
        mesh.put_workload(pod("db-0", "shop", &["10.244.1.2", "fd00:244::2"], &db));
        mesh.put_workload(pod("db-1", "shop", &["10.244.1.3"], &db));
        let sick = pod("db-2", "shop", &["10.244.1.4"], &db);
        mesh.put_workload(Workload { health: Health::Unhealthy, ..sick });
        let remote = pod("db-3", "shop", &["10.244.9.9"], &db);
        mesh.put_workload(Workload { network: "network-2".into(), ..remote });
        mesh.put_workload(pod("web-0", "shop", &["10.244.1.5"], &domain("web.shop")));
    })
}

fn query(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::query();
    message.queries.push(Question::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

/// What a client of the namespace is answered: records' data, sorted; none if the server is to answer.
fn ask(mesh: &Reader, namespace: &str, name: &str, kind: RecordType) -> Option<String> {
    let network = Network::default();
    let client = Client { namespace, network: &network, addresses: &[] };
    let zone = Zone::from("cluster.local");
    match answer(mesh, &zone, client, &query(name, kind), Transport::Udp, 1) {
        Answer::Reply(bytes) => {
            let reply = Message::from_vec(&bytes).unwrap();
            assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
            assert!(reply.answers.iter().all(|record| record.ttl == TTL));
            let addresses = reply.answers.iter().filter(|record| record.record_type() == kind).count();
            assert_eq!(addresses == 0, !reply.authorities.is_empty(), "{name}");
            let mut data: Vec<_> = reply.answers.iter().map(|record| record.data.to_string()).collect();
            data.sort();
            Some(data.join(" "))
        }
        Answer::Forward => None,
        Answer::Drop => panic!("{name} is dropped"),
    }
}

#[test]
fn names_of_the_mesh_and_of_others() {
    let mesh = cluster();
    for (name, v4, v6) in [
        // Services of the cluster: their own address of each family, not the load balancer's.
        ("web.shop.svc.cluster.local.", Some("10.96.0.7"), Some("fd00:96::7")),
        ("WEB.shop.SVC.cluster.local.", Some("10.96.0.7"), Some("fd00:96::7")),
        ("api.pay.svc.cluster.local.", Some("10.96.0.8"), Some("")),
        ("far.shop.svc.cluster.local.", None, None),
        ("gone.shop.svc.cluster.local.", None, None),
        // Headless ones: what is ready and can be reached.
        ("db.shop.svc.cluster.local.", Some("10.244.1.2 10.244.1.3"), Some("fd00:244::2")),
        ("db-0.db.shop.svc.cluster.local.", Some("10.244.1.2"), Some("fd00:244::2")),
        ("db-1.db.shop.svc.cluster.local.", Some("10.244.1.3"), Some("")),
        ("db-2.db.shop.svc.cluster.local.", None, None),
        ("db-3.db.shop.svc.cluster.local.", None, None),
        ("10-244-1-2.db.shop.svc.cluster.local.", None, None),
        ("empty.shop.svc.cluster.local.", None, None),
        ("web-0.web.shop.svc.cluster.local.", None, None),
        // Hosts of the mesh.
        ("api.example.com.", Some("240.240.0.1"), Some("")),
        ("no-address.example.com.", None, None),
        ("private.example.com.", None, None),
        ("example.net.", None, None),
        ("a.example.net.", Some("240.240.0.2"), Some("")),
        ("a.b.example.net.", Some("240.240.0.2"), Some("")),
        ("a.deep.example.net.", Some("240.240.0.3"), Some("")),
        // Search domains.
        (
            "api.example.com.shop.svc.cluster.local.",
            Some("240.240.0.1 api.example.com."),
            Some("api.example.com."),
        ),
        (
            "api.example.com.svc.cluster.local.",
            Some("240.240.0.1 api.example.com."),
            Some("api.example.com."),
        ),
        ("api.example.com.cluster.local.", Some("240.240.0.1 api.example.com."), Some("api.example.com.")),
        ("api.example.com.pay.svc.cluster.local.", None, None),
        ("a.example.net.shop.svc.cluster.local.", Some("240.240.0.2 a.example.net."), Some("a.example.net.")),
        (
            "api.pay.shop.svc.cluster.local.",
            Some("10.96.0.8 api.pay.svc.cluster.local."),
            Some("api.pay.svc.cluster.local."),
        ),
        (
            "api.pay.svc.cluster.local.shop.svc.cluster.local.",
            Some("10.96.0.8 api.pay.svc.cluster.local."),
            Some("api.pay.svc.cluster.local."),
        ),
        ("web.cluster.local.", None, None),
        ("web.svc.cluster.local.", None, None),
        ("cluster.local.", None, None),
        // What is below a service is that service's, whatever else it could mean with a search domain less.
        ("example.db.shop.svc.cluster.local.", None, None),
        ("_grpc._tcp.web.shop.svc.cluster.local.", None, None),
        // Clients without search domains.
        ("web.", Some("10.96.0.7"), Some("fd00:96::7")),
        ("web.shop.svc.", Some("10.96.0.7"), Some("fd00:96::7")),
        ("db-0.db.shop.svc.", Some("10.244.1.2"), Some("fd00:244::2")),
        ("payments.dev.", None, None),
        ("db.shop.", None, None),
        ("example.org.", None, None),
    ] {
        for (kind, expected) in [(RecordType::A, v4), (RecordType::AAAA, v6)] {
            assert_eq!(ask(&mesh, "shop", name, kind).as_deref(), expected, "{name} {kind}");
        }
    }
    assert_eq!(ask(&mesh, "pay", "private.example.com.", RecordType::A).as_deref(), Some("240.240.0.4"));
    let alias = "10.96.0.7 web.shop.svc.cluster.local.";
    assert_eq!(ask(&mesh, "pay", "web.shop.pay.svc.cluster.local.", RecordType::A).as_deref(), Some(alias));
}

#[test]
fn other_types_and_other_messages_go_to_the_server() {
    let mesh = cluster();
    for kind in [RecordType::SRV, RecordType::TXT, RecordType::HTTPS, RecordType::ANY, RecordType::CNAME] {
        for name in ["web.shop.svc.cluster.local.", "api.example.com."] {
            assert_eq!(ask(&mesh, "shop", name, kind), None, "{kind}");
        }
    }
    let network = Network::default();
    let client = Client { namespace: "shop", network: &network, addresses: &[] };
    let zone = Zone::from("cluster.local.");
    let judged = |bytes: &[u8]| answer(&mesh, &zone, client, bytes, Transport::Udp, 0);
    let mut bytes = query("web.shop.svc.cluster.local.", RecordType::A);
    assert!(matches!(judged(&bytes), Answer::Reply(_)));
    bytes[2] |= 0x28; // UPDATE
    assert_eq!(judged(&bytes), Answer::Forward);
    bytes[2] |= 0x80; // a response
    assert_eq!(judged(&bytes), Answer::Drop);
    assert_eq!(judged(b"not a query"), Answer::Drop);
}

#[test]
fn ports_of_the_clusters_services() {
    let named = |service: Service, ports: &[(&str, u16, Option<u16>)]| Service {
        ports: ports.iter().map(|(_, port, target)| ServicePort { port: *port, target: *target }).collect(),
        port_names: ports.iter().map(|(name, port, _)| ((*name).into(), *port)).collect(),
        ..service
    };
    let (web, db, mixed) =
        ("web.shop.svc.cluster.local", "db.shop.svc.cluster.local", "mixed.shop.svc.cluster.local");
    let mesh = mesh(|mesh| {
        let vips = &["10.96.0.7", "fd00:96::7", "198.51.100.1"];
        mesh.put_service(named(service("shop", web, vips), &[("http", 80, Some(8080)), ("api", 81, None)]));
        for host in [db, mixed] {
            mesh.put_service(named(service("shop", host, &[]), &[("sql", 5432, None)]));
        }
        mesh.put_service(named(service("shop", "ext.example.com", &["240.0.0.1"]), &[("http", 80, None)]));
        let with_port = |pod: Workload, target| {
            let service = pod.services[0].service.clone();
            Workload { services: [Membership { service, ports: [(5432, target)].into() }].into(), ..pod }
        };
        mesh.put_workload(with_port(pod("db-0", "shop", &["10.244.1.2", "fd00:244::2"], db), 15432));
        mesh.put_workload(with_port(pod("db-1", "shop", &["10.244.1.3"], db), 5432));
        mesh.put_workload(with_port(pod("mixed-0", "shop", &["10.244.1.4"], mixed), 5432));
        let machine = with_port(pod("machine", "shop", &["10.9.9.9"], mixed), 5432);
        mesh.put_workload(Workload {
            uid: "c/discovery.k8s.io/EndpointSlice/shop/m/10.9.9.9".into(),
            ..machine
        });
    });
    for (name, expected) in [
        ("_http._tcp.web.shop.svc.cluster.local.", Some("0 100 80 web.shop.svc.cluster.local.")),
        ("_API._TCP.web.shop.svc.cluster.local.", Some("0 100 81 web.shop.svc.cluster.local.")),
        (
            "_sql._tcp.db.shop.svc.cluster.local.",
            Some("0 50 15432 db-0.db.shop.svc.cluster.local. 0 50 5432 db-1.db.shop.svc.cluster.local."),
        ),
        ("_sql._tcp.mixed.shop.svc.cluster.local.", None),
        ("_sql._udp.db.shop.svc.cluster.local.", None),
        ("_no._tcp.db.shop.svc.cluster.local.", None),
        ("_http._tcp.ext.example.com.", None),
        ("web.shop.svc.cluster.local.", None),
    ] {
        assert_eq!(ask(&mesh, "shop", name, RecordType::SRV).as_deref(), expected, "{name}");
    }
    let network = Network::default();
    let client = Client { namespace: "shop", network: &network, addresses: &[] };
    for (name, beside) in [
        (
            "_http._tcp.web.shop.svc.cluster.local.",
            "web.shop.svc.cluster.local. 10.96.0.7, web.shop.svc.cluster.local. fd00:96::7",
        ),
        (
            "_sql._tcp.db.shop.svc.cluster.local.",
            "db-0.db.shop.svc.cluster.local. 10.244.1.2, db-0.db.shop.svc.cluster.local. fd00:244::2, \
             db-1.db.shop.svc.cluster.local. 10.244.1.3",
        ),
    ] {
        let bytes = query(name, RecordType::SRV);
        let zone = Zone::from("cluster.local");
        let Answer::Reply(bytes) = answer(&mesh, &zone, client, &bytes, Transport::Tcp, 0) else {
            panic!("{name}: no answer")
        };
        let reply = Message::from_vec(&bytes).unwrap();
        let mut glue: Vec<_> =
            reply.additionals.iter().map(|record| format!("{} {}", record.name, record.data)).collect();
        glue.sort();
        assert_eq!(glue.join(", "), beside, "addresses are beside the answer, not in it");
    }
}

#[test]
fn another_address_is_the_first_each_time() {
    let mesh =
        mesh(|mesh| mesh.put_service(service("shop", "a.b", &["240.0.0.1", "240.0.0.2", "240.0.0.3"])));
    let network = Network::default();
    let client = Client { namespace: "shop", network: &network, addresses: &[] };
    let first = |random| {
        let bytes = query("a.b.", RecordType::A);
        let zone = Zone::from("cluster.local");
        let Answer::Reply(bytes) = answer(&mesh, &zone, client, &bytes, Transport::Tcp, random) else {
            panic!()
        };
        let reply = Message::from_vec(&bytes).unwrap();
        assert_eq!(reply.answers.len(), 3);
        reply.answers[0].data.to_string().parse::<IpAddr>().unwrap()
    };
    let all: std::collections::BTreeSet<_> = (0..3).map(first).collect();
    assert_eq!(all.len(), 3);
    assert_eq!(first(usize::MAX), first(usize::MAX % 3));
}

#[test]
fn a_short_name_is_the_clusters_before_it_is_a_hosts() {
    let mesh = mesh(|mesh| {
        mesh.put_service(service("shop", "web.shop.svc.cluster.local", &["10.96.0.7"]));
        mesh.put_service(service("evil", "web", &["240.240.6.6"]));
    });
    assert_eq!(ask(&mesh, "shop", "web.", RecordType::A).as_deref(), Some("10.96.0.7"));
    assert_eq!(ask(&mesh, "bank", "web.", RecordType::A).as_deref(), Some("240.240.6.6"));
}

#[test]
fn another_cluster_domain() {
    let web = Service { canonical: true, ..service("shop", "web.shop.svc.corp.example", &["10.96.0.7"]) };
    let mesh = mesh(|mesh| mesh.put_service(web));
    let network = Network::default();
    let client = Client { namespace: "shop", network: &network, addresses: &[] };
    let zone = Zone::from("Corp.Example");
    for name in ["web.shop.svc.corp.example.", "web.", "web.shop.shop.svc.corp.example."] {
        let reply = answer(&mesh, &zone, client, &query(name, RecordType::A), Transport::Udp, 0);
        assert!(matches!(reply, Answer::Reply(_)), "{name}");
    }
}

/// A datagram that asks for ten thousand pods costs what fits into the answer.
#[test]
fn the_number_of_a_services_pods_is_not_the_price_of_a_question() {
    let host = "big.shop.svc.cluster.local";
    let of = |count: u32| {
        mesh(|mesh| {
            let ports = [ServicePort { port: 80, target: Some(8080) }].into();
            let port_names = [("http".into(), 80)].into();
            mesh.put_service(Service { ports, port_names, ..service("shop", host, &[]) });
            for number in 0..count {
                let ip = std::net::Ipv4Addr::from(0x0a00_0000 + number).to_string();
                mesh.put_workload(pod(&format!("big-{number}"), "shop", &[&ip], host));
            }
        })
    };
    let (small, big) = (of(200), of(10_000));
    let network = Network::default();
    let client = Client { namespace: "shop", network: &network, addresses: &[] };
    let zone = Zone::from("cluster.local");
    for (name, kind, transport, some) in [
        (format!("{host}."), RecordType::A, Transport::Udp, 20..100),
        (format!("{host}."), RecordType::A, Transport::Tcp, 200..5000),
        (format!("_http._tcp.{host}."), RecordType::SRV, Transport::Udp, 3..100),
        (format!("big-7.{host}."), RecordType::A, Transport::Udp, 1..2),
    ] {
        let bytes = query(&name, kind);
        let asked = |mesh: &Reader, random| match answer(mesh, &zone, client, &bytes, transport, random) {
            Answer::Reply(bytes) => Message::from_vec(&bytes).unwrap(),
            other => panic!("{name}: {other:?}"),
        };
        let first = asked(&big, 0);
        assert!(some.contains(&first.answers.len()), "{name}: {}", first.answers.len());
        if some.start > 1 {
            assert_ne!(first.answers[0].data, asked(&big, 5000).answers[0].data, "others have their turn");
        }
        let quickest = |mesh: &Reader| {
            let once = |random| {
                let begun = std::time::Instant::now();
                std::hint::black_box(answer(mesh, &zone, client, &bytes, transport, random));
                begun.elapsed()
            };
            (0..50).map(once).min().unwrap()
        };
        if transport == Transport::Udp {
            let (few, many) = (quickest(&small), quickest(&big));
            println!("{name} {kind}: {few:?} of 200 pods, {many:?} of 10,000");
            assert!(many < 8 * few, "{name}: {few:?} of 200 pods, {many:?} of 10,000");
        }
    }
}
