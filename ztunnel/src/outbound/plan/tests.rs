//! The decision table: what a pod dials, what comes of it.

use mesh_core::convert::Names;
use mesh_core::proto::workload as wire;
use mesh_core::store;
use wire::gateway_address::Destination;

use super::*;

/// The first of equal ones.
const ANY: Choose<'static> = Choose { random: 0, tried: &[], looked_up: &|_| None, remembered: &|_, _| None };

/// The dialling pod.
const CLIENT: &str = "c//Pod/shop/client";

fn pod(name: &str, ip: &str) -> wire::Workload {
    wire::Workload {
        uid: format!("c//Pod/shop/{name}"),
        name: name.into(),
        namespace: "shop".into(),
        service_account: name.into(),
        addresses: ip.split(',').filter(|ip| !ip.is_empty()).map(octets).collect(),
        tunnel_protocol: wire::TunnelProtocol::Hbone as i32,
        ..Default::default()
    }
}

fn octets(ip: &str) -> Vec<u8> {
    match ip.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn member(mut workload: wire::Workload, service: &str) -> wire::Workload {
    workload.services.insert(format!("shop/{service}"), wire::PortList::default());
    workload
}

fn service(hostname: &str, vip: &str) -> wire::Service {
    wire::Service {
        name: hostname.into(),
        namespace: "shop".into(),
        hostname: hostname.into(),
        addresses: vec![wire::NetworkAddress { address: octets(vip), ..Default::default() }],
        ports: vec![wire::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        ..Default::default()
    }
}

fn waypoint() -> Option<wire::GatewayAddress> {
    let name = wire::NamespacedHostname { namespace: "shop".into(), hostname: "waypoint".into() };
    Some(wire::GatewayAddress { destination: Some(Destination::Hostname(name)), hbone_mtls_port: 15008 })
}

fn balancing(mode: wire::load_balancing::Mode) -> Option<wire::LoadBalancing> {
    Some(wire::LoadBalancing { mode: mode as i32, ..Default::default() })
}

fn mesh(workloads: Vec<wire::Workload>, services: Vec<wire::Service>) -> (Reader, Arc<Workload>) {
    let (mut writer, reader) = store::new();
    let mut names = Names::default();
    let client = member(pod("client", "10.0.0.1"), "self");
    for workload in workloads.into_iter().chain([client]) {
        writer.put_workload(mesh_core::convert::workload::convert(&workload, &mut names).unwrap());
    }
    for service in services {
        writer.put_service(mesh_core::convert::service::convert(&service, &mut names).unwrap());
    }
    writer.commit();
    let client = reader.workload(CLIENT).unwrap();
    (reader, client)
}

/// A mesh with one of each kind.
fn world() -> (Reader, Arc<Workload>) {
    let workloads = vec![
        member(pod("web", "10.0.0.2"), "web"),
        wire::Workload { tunnel_protocol: 0, ..member(pod("plain", "10.0.0.3"), "plain") },
        wire::Workload { waypoint: waypoint(), ..member(pod("guarded", "10.0.0.4"), "behind") },
        wire::Workload { network: "far".into(), ..member(pod("far", "10.0.0.5"), "far") },
        wire::Workload { network_mode: 1, ..member(pod("host", "10.0.0.6"), "host") },
        wire::Workload { status: 1, ..member(pod("sick", "10.0.0.7"), "sick") },
        wire::Workload { addresses: vec![], hostname: "ext.example".into(), ..member(pod("ext", ""), "ext") },
        member(pod("dual", "fd00::8,10.0.0.8"), "dual"),
        member(pod("six", "fd00::9"), "six"),
        member(pod("twin", "10.0.0.15,fd00::15"), "both"),
        member(pod("late", "10.0.0.16"), "only6"),
        wire::Workload { tunnel_protocol: 0, ..pod("clear6", "fd00::17") },
        wire::Workload {
            uid: "c/discovery/EndpointSlice/shop/api".into(),
            tunnel_protocol: 0,
            network_mode: 1,
            ..member(pod("api", "192.0.2.9"), "api")
        },
        wire::Workload {
            uid: "c/networking.istio.io/WorkloadEntry/evil/api".into(),
            namespace: "evil".into(),
            ..pod("evil", "192.0.2.9")
        },
        wire::Workload { network_mode: 1, ..pod("host6", "fd00::18") },
    ];
    let mut services: Vec<_> = [
        ("web", "10.96.0.2"),
        ("plain", "10.96.0.3"),
        ("behind", "10.96.0.4"),
        ("far", "10.96.0.5"),
        ("host", "10.96.0.6"),
        ("sick", "10.96.0.7"),
        ("dual", "10.96.0.8"),
        ("six", "10.96.0.9"),
        ("ext", "10.96.0.10"),
        ("self", "10.96.0.11"),
        ("empty", "10.96.0.12"),
    ]
    .into_iter()
    .map(|(name, vip)| service(name, vip))
    .collect();
    services.push(wire::Service { waypoint: waypoint(), ..service("waypointed", "10.96.0.13") });
    let passthrough = balancing(wire::load_balancing::Mode::Passthrough);
    services.push(wire::Service { load_balancing: passthrough.clone(), ..service("pass", "10.0.0.2") });
    services.push(wire::Service { load_balancing: passthrough, ..service("outside", "192.0.2.7") });
    services.push(service("api", "10.96.0.19"));
    let secret = wire::Visibility::Namespace as i32;
    services.push(wire::Service {
        namespace: "other".into(),
        visibility: secret,
        ..service("hidden", "10.96.0.14")
    });
    let mut only_v4 = service("only4", "fd00:96::1");
    only_v4.ip_families = wire::IpFamilies::Ipv4Only as i32;
    services.push(only_v4);
    let mut both = service("both", "10.96.0.15");
    both.addresses.push(wire::NetworkAddress { address: octets("fd00:96::15"), ..Default::default() });
    both.ip_families = wire::IpFamilies::Dual as i32;
    services.push(both);
    let mut only_v6 = service("only6", "fd00:96::16");
    only_v6.ip_families = wire::IpFamilies::Ipv6Only as i32;
    services.push(only_v6);
    mesh(workloads, services)
}

#[test]
fn an_address_of_a_refused_resource_is_not_the_outside() {
    let (mut writer, reader) = store::new();
    let mut names = Names::default();
    let client = mesh_core::convert::workload::convert(&pod("client", "10.0.0.1"), &mut names).unwrap();
    let claims = mesh_core::convert::workload::claims(&pod("bad", "10.0.0.20,fd00::20"), &mut names);
    writer.refuse("c//Pod/shop/bad", "it is odd", claims);
    writer.commit();
    for dst in ["10.0.0.20:80", "[::ffff:10.0.0.20]:80", "[fd00::20]:80"] {
        let dst = OrigDst::from(dst.parse::<std::net::SocketAddr>().unwrap());
        let error = outbound(&reader, &client, dst, &ANY).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("{dst} belongs to c//Pod/shop/bad, of which only an invalid form is known: it is odd")
        );
    }
}

/// The plan in one line.
fn plan(dst: &str) -> String {
    let (reader, client) = world();
    let dst = OrigDst::from(dst.parse::<std::net::SocketAddr>().unwrap());
    match outbound(&reader, &client, dst, &ANY) {
        Ok(plan) => {
            let who = plan.destination.map_or("-".into(), |workload| workload.name.to_string());
            match plan.route {
                Route::Hbone { next_hop, expected, near: _ } => {
                    let accounts: Vec<&str> = expected.iter().map(Identity::service_account).collect();
                    format!("hbone {who} {next_hop} for {} as {}", plan.target, accounts.join(","))
                }
                Route::Plain => format!("plain {who} {}", plan.target),
                Route::Own => format!("own {who} {}", plan.target),
            }
        }
        Err(error) => format!("error: {error}"),
    }
}

#[test]
fn table() {
    for (what, dst, expect) in [
        ("pod that speaks HBONE", "10.0.0.8:81", "hbone dual 10.0.0.8:15008 for 10.0.0.8:81 as dual"),
        ("mapped address", "[::ffff:10.0.0.8]:81", "hbone dual 10.0.0.8:15008 for 10.0.0.8:81 as dual"),
        ("pod out of the mesh", "10.0.0.3:81", "plain plain 10.0.0.3:81"),
        (
            "service: target port, not the VIP",
            "10.96.0.2:80",
            "hbone web 10.0.0.2:15008 for 10.0.0.2:8080 as web",
        ),
        ("service out of the mesh", "10.96.0.3:80", "plain plain 10.0.0.3:8080"),
        (
            "service ignores its endpoint's waypoint",
            "10.96.0.4:80",
            "hbone guarded 10.0.0.4:15008 for 10.0.0.4:8080 as guarded",
        ),
        ("host network by service", "10.96.0.6:80", "hbone host 10.0.0.6:15008 for 10.0.0.6:8080 as host"),
        ("host network by address", "10.0.0.6:80", "plain - 10.0.0.6:80"),
        ("unknown", "203.0.113.10:443", "plain - 203.0.113.10:443"),
        ("family as dialled", "10.96.0.8:80", "hbone dual 10.0.0.8:15008 for 10.0.0.8:8080 as dual"),
        ("other family if need be", "10.96.0.9:80", "hbone six [fd00::9]:15008 for [fd00::9]:8080 as six"),
        ("IPv6 pod that speaks HBONE", "[fd00::8]:81", "hbone dual [fd00::8]:15008 for [fd00::8]:81 as dual"),
        ("IPv6 pod out of the mesh", "[fd00::17]:81", "plain clear6 [fd00::17]:81"),
        ("IPv6 host network by address", "[fd00::18]:81", "plain - [fd00::18]:81"),
        ("unknown IPv6", "[2001:db8::10]:443", "plain - [2001:db8::10]:443"),
        ("both, dialled over IPv4", "10.96.0.15:80", "hbone twin 10.0.0.15:15008 for 10.0.0.15:8080 as twin"),
        (
            "both, dialled over IPv6",
            "[fd00:96::15]:80",
            "hbone twin [fd00::15]:15008 for [fd00::15]:8080 as twin",
        ),
        ("loop over IPv6", "[::1]:15008", "error: [::1]:15008 is the tunnel's own port on loopback"),
        ("itself by its service", "10.96.0.11:80", "own client 10.0.0.1:8080"),
        ("itself by its address", "10.0.0.1:81", "own client 10.0.0.1:81"),
        (
            "passthrough, and the address is a pod's",
            "10.0.0.2:81",
            "hbone web 10.0.0.2:15008 for 10.0.0.2:81 as web",
        ),
        ("passthrough", "192.0.2.7:81", "plain - 192.0.2.7:81"),
        ("an endpoint whose address another namespace claims", "10.96.0.19:80", "plain api 192.0.2.9:8080"),
        ("a service that another namespace hides", "10.96.0.14:80", "plain - 10.96.0.14:80"),
        ("loop", "127.0.0.1:15008", "error: 127.0.0.1:15008 is the tunnel's own port on loopback"),
    ] {
        assert_eq!(plan(dst), expect, "{what}");
    }
}

#[test]
fn refusals() {
    for (dst, expect) in [
        (
            "10.96.0.13:80",
            "traffic to shop/waypointed has to pass the waypoint shop/waypoint, which is not supported",
        ),
        ("10.0.0.4:80", "traffic to c//Pod/shop/guarded has to pass the waypoint shop/waypoint"),
        ("10.96.0.5:80", "endpoint c//Pod/shop/far is in network \"far\""),
        ("10.96.0.2:81", "service shop/web: the service has no port 81"),
        ("10.96.0.7:80", "service shop/sick: no endpoint of the service is ready"),
        ("10.96.0.12:80", "service shop/empty: no endpoint of the service is ready"),
        ("10.96.0.10:80", "the host name ext.example of the endpoint is not looked up yet"),
        ("[fd00:96::16]:80", "endpoint c//Pod/shop/late has no IP address"),
    ] {
        let plan = plan(dst);
        assert!(plan.starts_with("error: ") && plan.contains(expect), "{dst}: {plan}");
    }
}

#[test]
fn a_service_may_vouch_for_other_identities() {
    let mut web = service("web", "10.96.0.2");
    web.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/extra".into(), "not-spiffe".into()];
    let (reader, client) = mesh(vec![member(pod("web", "10.0.0.2"), "web")], vec![web]);
    let dst = OrigDst::from(std::net::SocketAddr::from(([10, 96, 0, 2], 80)));
    let Route::Hbone { expected, .. } = outbound(&reader, &client, dst, &ANY).unwrap().route else {
        panic!()
    };
    let names: Vec<&str> = expected.iter().map(Identity::service_account).collect();
    assert_eq!(names, ["extra", "web"]);
}

#[test]
fn near_is_one_node_without_network_policies() {
    let on = |name: &str, ip: &str, node: &str, shortcut: bool| wire::Workload {
        node: node.into(),
        shortcut,
        ..pod(name, ip)
    };
    for (source, destination, expected) in [
        (("n1", true), ("n1", true), true),
        (("n1", true), ("n2", true), false),
        (("", true), ("", true), false),
        (("n1", false), ("n1", true), false),
        (("n1", true), ("n1", false), false),
    ] {
        let workloads = vec![
            on("web", "10.0.0.2", destination.0, destination.1),
            on("source", "10.0.0.8", source.0, source.1),
        ];
        let (reader, _) = mesh(workloads, vec![]);
        let source = reader.workload("c//Pod/shop/source").unwrap();
        let dst = OrigDst::from("10.0.0.2:80".parse::<std::net::SocketAddr>().unwrap());
        let Route::Hbone { near, .. } = outbound(&reader, &source, dst, &ANY).unwrap().route else {
            panic!()
        };
        assert_eq!(near, expected, "{source:?} to {destination:?}");
    }
}

fn to_web(reader: &Reader, client: &Workload, choose: &Choose<'_>) -> Result<Plan, Unplanned> {
    outbound(reader, client, OrigDst::from(std::net::SocketAddr::from(([10, 96, 0, 2], 80))), choose)
}

#[test]
fn what_was_tried_is_not_tried_again() {
    let endpoints = ["a", "b", "c"].into_iter().zip(["10.0.0.2", "10.0.0.3", "10.0.0.4"]);
    let endpoints = endpoints.map(|(name, ip)| member(pod(name, ip), "web")).collect();
    let (reader, client) = mesh(endpoints, vec![service("web", "10.96.0.2")]);
    let dst = OrigDst::from(std::net::SocketAddr::from(([10, 96, 0, 2], 80)));
    let mut tried = Vec::new();
    for left in [2, 1, 0] {
        let plan = to_web(&reader, &client, &Choose { tried: &tried, ..ANY }).unwrap();
        let uid = plan.endpoint.clone().unwrap();
        assert_eq!(plan.destination.as_ref().unwrap().uid, uid);
        assert!(!tried.contains(&uid), "{uid} again");
        tried.push(uid);
        assert_eq!(plan.has_another(&client, dst, &tried), left > 0, "{left} are left");
    }
    let error = to_web(&reader, &client, &Choose { tried: &tried, ..ANY }).unwrap_err();
    assert!(matches!(error.error, PlanError::NoEndpoint { cause: PickError::NoneReady, .. }), "{error}");
    let direct = OrigDst::from(std::net::SocketAddr::from(([10, 0, 0, 2], 80)));
    let plan = outbound(&reader, &client, direct, &ANY).unwrap();
    assert!(!plan.has_another(&client, direct, &[]), "an address has no other endpoint");
}

#[test]
fn a_client_that_comes_back_gets_the_endpoint_that_it_had() {
    let endpoints = vec![member(pod("a", "10.0.0.2"), "web"), member(pod("b", "10.0.0.3"), "web")];
    let web = wire::Service { session_affinity_seconds: 60, ..service("web", "10.96.0.2") };
    let (reader, client) = mesh(endpoints, vec![web]);
    for name in ["a", "b"] {
        let uid = WorkloadUid::from(format!("c//Pod/shop/{name}").as_str());
        let remembered = |service: &Service, port: u16| {
            assert_eq!((&*service.name, port), ("web", 80));
            Some(uid.clone())
        };
        for random in 0..8 {
            let plan = to_web(&reader, &client, &Choose { random, remembered: &remembered, ..ANY });
            assert_eq!(plan.unwrap().endpoint, Some(uid.clone()));
        }
        let tried = [uid.clone()];
        let plan = to_web(&reader, &client, &Choose { tried: &tried, remembered: &remembered, ..ANY });
        assert_ne!(plan.unwrap().endpoint, Some(uid), "it did not answer");
    }
    let gone = |_: &Service, _: u16| Some(WorkloadUid::from("c//Pod/shop/gone"));
    let plan = to_web(&reader, &client, &Choose { remembered: &gone, ..ANY });
    assert!(plan.unwrap().endpoint.is_some(), "another takes the place of one that is gone");
}

#[test]
fn the_other_family_is_for_clients_that_have_it() {
    for (client, endpoint, families, other) in [
        ("10.0.0.1,fd00::1", "10.0.0.2,fd00::2", 3, Some("[fd00::2]:8080")),
        ("10.0.0.1,fd00::1", "fd00::2,10.0.0.2", 3, Some("[fd00::2]:8080")),
        ("10.0.0.1", "10.0.0.2,fd00::2", 3, None),
        ("10.0.0.1,fd00::1", "10.0.0.2", 3, None),
        ("10.0.0.1,fd00::1", "10.0.0.2,fd00::2", 1, None),
    ] {
        let web = wire::Service { ip_families: families, ..service("web", "10.96.0.2") };
        let (reader, _) = mesh(vec![member(pod("web", endpoint), "web"), pod("source", client)], vec![web]);
        let source = reader.workload("c//Pod/shop/source").unwrap();
        let plan = to_web(&reader, &source, &ANY).unwrap();
        assert_eq!(plan.target.to_string(), "10.0.0.2:8080");
        let found: Vec<String> = plan.others.iter().map(Target::to_string).collect();
        assert_eq!(found.first().map(String::as_str), other, "{client} to {endpoint}, families {families}");
    }
}

#[test]
fn an_endpoint_that_is_only_an_address_is_who_has_it() {
    let slice = |ip: &str| wire::Workload {
        uid: format!("c/discovery.k8s.io/EndpointSlice/shop/manual/{ip}"),
        tunnel_protocol: 0,
        network_mode: 1,
        ..member(pod("manual", ip), "web")
    };
    for (ip, expect) in [
        ("10.0.0.2", "c//Pod/shop/web"),
        ("10.0.0.9", "c/discovery.k8s.io/EndpointSlice/shop/manual/10.0.0.9"),
    ] {
        let (reader, client) =
            mesh(vec![slice(ip), pod("web", "10.0.0.2")], vec![service("web", "10.96.0.2")]);
        let plan = to_web(&reader, &client, &ANY).unwrap();
        assert_eq!(plan.destination.unwrap().uid.as_str(), expect);
        assert_eq!(matches!(plan.route, Route::Hbone { .. }), ip == "10.0.0.2");
    }
}

#[test]
fn an_endpoint_with_a_host_name_is_where_that_leads_to() {
    for (client, found, families, dst, expect) in [
        ("10.0.0.1", "192.0.2.1", 0, "10.96.0.2:80", "plain ext 192.0.2.1:8080"),
        ("10.0.0.1,fd00::1", "192.0.2.1,2001:db8::1", 0, "10.96.0.2:80", "plain ext 192.0.2.1:8080"),
        ("10.0.0.1,fd00::1", "2001:db8::1", 0, "10.96.0.2:80", "plain ext [2001:db8::1]:8080"),
        ("10.0.0.1", "2001:db8::1", 0, "10.96.0.2:80", "error: endpoint c//Pod/shop/ext has no IP address"),
        (
            "10.0.0.1,fd00::1",
            "192.0.2.1",
            2,
            "10.96.0.2:80",
            "error: endpoint c//Pod/shop/ext has no IP address",
        ),
        ("10.0.0.1", "10.0.0.8", 0, "10.96.0.2:80", "hbone pod 10.0.0.8:8080"),
    ] {
        let ext = wire::Workload {
            uid: "c//Entry/shop/ext".into(),
            hostname: "ext.example".into(),
            tunnel_protocol: 0,
            ..member(pod("ext", ""), "web")
        };
        let web = wire::Service { ip_families: families, ..service("web", "10.96.0.2") };
        let (reader, _) = mesh(vec![ext, pod("source", client), pod("pod", "10.0.0.8")], vec![web]);
        let source = reader.workload("c//Pod/shop/source").unwrap();
        let looked_up = |host: &str| {
            assert_eq!(host, "ext.example");
            Some(found.split(',').map(|ip| ip.parse().unwrap()).collect())
        };
        let dst = OrigDst::from(dst.parse::<std::net::SocketAddr>().unwrap());
        let plan = match outbound(&reader, &source, dst, &Choose { looked_up: &looked_up, ..ANY }) {
            Ok(plan) => {
                let how = if plan.route == Route::Plain { "plain" } else { "hbone" };
                format!("{how} {} {}", plan.destination.unwrap().name, plan.target)
            }
            Err(error) => format!("error: {error}").replace("//Entry/", "//Pod/"),
        };
        assert!(plan.starts_with(expect), "{client} to {found}: {plan}");
    }
}

/// All that a host name leads to is tried, the families in turn; but for what is somebody else's.
#[test]
fn every_address_of_a_host_name_has_its_turn() {
    let found = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "192.0.2.3", "10.0.0.8"];
    for (client, random, expect) in [
        ("10.0.0.1,fd00::1", 0, "192.0.2.1 2001:db8::1 192.0.2.2 192.0.2.3"),
        ("10.0.0.1,fd00::1", 1 << 32, "192.0.2.2 2001:db8::1 192.0.2.3 192.0.2.1"),
        ("10.0.0.1", 0, "192.0.2.1 192.0.2.2 192.0.2.3"),
        ("10.0.0.1", 3 << 32, "10.0.0.8"),
    ] {
        let ext = wire::Workload {
            uid: "c//Entry/shop/ext".into(),
            hostname: "ext.example".into(),
            tunnel_protocol: 0,
            ..member(pod("ext", ""), "web")
        };
        let workloads = vec![ext, pod("source", client), pod("pod", "10.0.0.8")];
        let (reader, _) = mesh(workloads, vec![service("web", "10.96.0.2")]);
        let source = reader.workload("c//Pod/shop/source").unwrap();
        let looked_up = |_: &str| Some(found.iter().map(|ip| ip.parse().unwrap()).collect());
        let plan = to_web(&reader, &source, &Choose { random, looked_up: &looked_up, ..ANY }).unwrap();
        let all: Vec<String> =
            [plan.target].iter().chain(&plan.others).map(|at| at.ip().to_string()).collect();
        assert_eq!(all.join(" "), expect, "{client}, {random}");
    }
}

#[test]
fn of_a_host_with_many_addresses_the_first_few_are_tried() {
    let many = (1..=20).map(|last| IpAddr::from([192, 0, 2, last]));
    for (random, first) in [(0, 1), (15 << 32, 16)] {
        let tried = in_turn(many.clone(), [10, 96, 0, 2].into(), &Choose { random, ..ANY });
        let expect: Vec<_> = many.clone().cycle().skip(first - 1).take(8).collect();
        assert_eq!(tried, expect);
    }
}

/// Only then another one is worth a try.
#[test]
fn it_is_told_whether_the_endpoint_is_at_fault() {
    let far = wire::Workload { network: "far".into(), ..pod("far", "10.0.0.5") };
    let (reader, client) = mesh(vec![member(far, "web")], vec![service("web", "10.96.0.2")]);
    let error = to_web(&reader, &client, &ANY).unwrap_err();
    assert!(matches!(error.error, PlanError::OtherNetwork { .. }), "{error}");
    assert_eq!(error.chosen.unwrap().endpoint.uid.as_str(), "c//Pod/shop/far");
    let (reader, client) = mesh(vec![], vec![service("web", "10.96.0.2")]);
    assert!(to_web(&reader, &client, &ANY).unwrap_err().chosen.is_none(), "nothing was chosen");
}
