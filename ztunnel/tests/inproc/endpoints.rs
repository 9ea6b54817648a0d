//! Several endpoints of one service: some that do not answer, some that policy closes, and clients that come back.

use mesh_core::proto::discovery::Resource;
use mesh_core::proto::workload::{self, Workload, address::Type};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

use crate::agent::address;
use crate::policy;
use crate::world::{CLIENT, SECOND, SERVER, TestPod, World, eventually, line};

/// The service that all are endpoints of.
const WEB: &str = "shop/server.local";

/// A workload as an endpoint of the service.
fn endpoint(workload: Workload) -> Resource {
    let services = [(WEB.to_owned(), workload::PortList::default())].into();
    address(Type::Workload(Workload { services, ..workload }))
}

fn known(world: &World, pod: TestPod) -> Workload {
    let Type::Workload(workload) = world.workload(pod) else { unreachable!() };
    workload
}

/// A pod at an address where there is no ztunnel, at least not its own. It proves to be `account`.
fn ghost(world: &World, name: &str, last: u8, account: &str) -> Workload {
    let std::net::IpAddr::V4(ip) = world.ip(last) else { unreachable!() };
    Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.into(),
        addresses: vec![ip.octets().to_vec()],
        service_account: account.into(),
        workload_name: format!("{name}-deployment"),
        ..known(world, SERVER)
    }
}

/// The pods are served, the endpoints known.
async fn world(pods: &[TestPod], endpoints: impl Fn(&World) -> Vec<Resource>) -> World {
    let world = World::without_mesh().await;
    world.xds.put([address(world.workload(CLIENT)), address(world.service(SERVER))]);
    world.xds.put(endpoints(&world));
    world.with_pods(pods).await
}

async fn count(world: &World, what: &str, workload: &str, flag: &str) -> u64 {
    let labels = [
        "reporter=\"source\"",
        &format!("destination_workload=\"{workload}-deployment\""),
        &format!("response_flags=\"{flag}\""),
    ];
    world.metric(&format!("istio_tcp_connections_{what}_total"), &labels).await
}

/// Whether the client is served.
async fn served(world: &World) -> bool {
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    !line(&mut stream).await.is_empty()
}

#[tokio::test]
async fn one_that_does_not_answer_is_given_up_for_another() {
    for (what, last, account, flag) in [
        ("nobody is there", 60, "server", "CONNECT"),
        ("who is there cannot prove it", 20, "ghost", "TLS_FAILURE"),
        ("it is another workload by now", 20, "server", "CONNECT"),
        ("it never answers", 61, "server", "CONNECT"),
    ] {
        let world = world(&[CLIENT, SERVER], |world| {
            vec![endpoint(known(world, SERVER)), endpoint(ghost(world, "ghost", last, account))]
        })
        .await;
        let _application = world.application(SERVER).await;
        // Takes connections and says nothing.
        let _deaf = TcpListener::bind((world.ip(61), 15008)).await.unwrap();
        let mut dials = 0;
        while count(&world, "failed", "ghost", flag).await == 0 {
            assert!(served(&world).await, "{what}");
            dials += 1;
            assert!(dials < 64, "{what}: the other one is never tried");
        }
        world.logged(&["direction=\"outbound\"", "connection complete", "tried=2"]).await;
        assert_eq!(
            count(&world, "opened", "ghost", "-").await,
            count(&world, "closed", "ghost", "-").await,
            "{what}"
        );
    }
}

#[tokio::test]
async fn an_application_that_does_not_listen_is_given_up_for_one_that_does() {
    let world = world(&[CLIENT, SERVER, SECOND], |world| {
        vec![endpoint(known(world, SERVER)), endpoint(known(world, SECOND))]
    })
    .await;
    let _application = world.application(SECOND).await;
    for _ in 0..16 {
        assert!(served(&world).await);
    }
    assert!(count(&world, "failed", "server", "CONNECT").await > 0);
    assert_eq!(count(&world, "failed", "second", "CONNECT").await, 0);
}

/// An endpoint that is known by a host name alone, and out of the mesh.
fn named(world: &World, name: &str, host: &str) -> Workload {
    let host = host.to_owned();
    Workload { addresses: vec![], hostname: host, tunnel_protocol: 0, ..ghost(world, name, 60, "server") }
}

#[tokio::test]
async fn one_whose_name_leads_nowhere_is_given_up_for_another() {
    for session_affinity_seconds in [0, 3600] {
        let world = world(&[CLIENT, SERVER], |world| {
            let Type::Service(service) = world.service(SERVER) else { unreachable!() };
            let service = workload::Service { session_affinity_seconds, ..service };
            let dead = named(world, "dead", &"x".repeat(300));
            vec![address(Type::Service(service)), endpoint(known(world, SERVER)), endpoint(dead)]
        })
        .await;
        let _application = world.application(SERVER).await;
        for _ in 0..16 {
            assert!(served(&world).await, "affinity for {session_affinity_seconds} s");
        }
        if session_affinity_seconds == 0 {
            assert!(count(&world, "failed", "dead", "CONNECT").await > 0, "it was never chosen");
            world.logged(&["direction=\"outbound\"", "connection complete", "tried=2"]).await;
        }
        assert_eq!(count(&world, "opened", "server", "-").await, 16);
    }
}

#[tokio::test]
async fn when_no_name_leads_anywhere_it_is_told() {
    let world = world(&[CLIENT], |world| {
        ["a", "b"].map(|name| endpoint(named(world, name, &name.repeat(300)))).into()
    })
    .await;
    assert!(!served(&world).await);
    world.logged(&["connection failed", "tried=2", "looking up the endpoint's host name"]).await;
    assert_eq!(count(&world, "failed", "a", "CONNECT").await, 1);
    assert_eq!(count(&world, "failed", "b", "CONNECT").await, 1);
}

/// In the clear, too: the first that answers is it.
#[tokio::test]
async fn each_address_of_a_host_name_is_tried() {
    const EXTERNAL: TestPod = TestPod { name: "ext", last: 62 };
    let world = world(&[CLIENT], |world| {
        let [a, b, good] = [60, 61, EXTERNAL.last].map(|last| world.ip(last));
        vec![endpoint(named(world, "ext", &format!("{a}_{b}_{good}.test")))]
    })
    .await;
    let _application = world.application(EXTERNAL).await;
    for _ in 0..16 {
        assert!(served(&world).await);
    }
    assert_eq!(count(&world, "opened", "ext", "-").await, 16);
    assert_eq!(count(&world, "failed", "ext", "CONNECT").await, 0);
    world.logged(&["connection complete", &format!("dst.addr={}:{}", world.ip(62), crate::world::APP)]).await;
}

#[tokio::test]
async fn when_all_fail_it_is_told_how_many_were_tried() {
    let ghosts = ["a", "b", "c", "d"];
    let world = world(&[CLIENT], |world| {
        let all = ghosts.iter().zip(60..);
        all.map(|(name, last)| endpoint(ghost(world, name, last, "server"))).collect()
    })
    .await;
    assert!(!served(&world).await);
    world.logged(&["direction=\"outbound\"", "connection failed", "tried=3", "cannot connect"]).await;
    let mut failed = 0;
    for name in ghosts {
        failed += count(&world, "failed", name, "CONNECT").await;
    }
    assert_eq!(failed, 3);
}

#[tokio::test]
async fn what_policy_refuses_is_not_tried_elsewhere() {
    let world = world(&[CLIENT, SERVER, SECOND], |world| {
        let policies = vec!["shop/no-client".to_owned()];
        let closed = Workload { authorization_policies: policies, ..known(world, SERVER) };
        vec![policy::no_client("shop/no-client"), endpoint(closed), endpoint(known(world, SECOND))]
    })
    .await;
    let _applications = (world.application(SERVER).await, world.application(SECOND).await);
    let (mut open, mut closed) = (0, 0);
    while open == 0 || closed == 0 {
        if served(&world).await {
            open += 1
        } else {
            closed += 1
        }
        assert!(open + closed < 64, "{open} served, {closed} refused");
    }
    eventually("each refusal is told", async || count(&world, "failed", "server", "DENY").await == closed)
        .await;
    assert_eq!(count(&world, "opened", "second", "-").await, open, "and nobody else was asked");
}

#[tokio::test]
async fn a_client_keeps_its_endpoint() {
    let world = world(&[CLIENT, SERVER, SECOND], |world| {
        let Type::Service(service) = world.service(SERVER) else { unreachable!() };
        let sticky = workload::Service { session_affinity_seconds: 3600, ..service };
        vec![address(Type::Service(sticky)), endpoint(known(world, SERVER)), endpoint(known(world, SECOND))]
    })
    .await;
    let _applications = (world.application(SERVER).await, world.application(SECOND).await);
    for _ in 0..16 {
        assert!(served(&world).await);
    }
    let counts = [count(&world, "opened", "server", "-").await, count(&world, "opened", "second", "-").await];
    assert!(counts == [16, 0] || counts == [0, 16], "{counts:?}");
    // The endpoint goes, and does not come back into its clients' memory.
    let (left, right) = if counts[0] == 0 { (SECOND, SERVER) } else { (SERVER, SECOND) };
    world.xds.put([endpoint(Workload { status: 1, ..known(&world, left) })]);
    eventually("the other one serves", async || {
        assert!(served(&world).await);
        count(&world, "opened", right.name, "-").await > 0
    })
    .await;
    world.xds.put([endpoint(known(&world, left))]);
    let before = count(&world, "opened", left.name, "-").await;
    eventually("it is ready again", async || {
        let dump = world.dump().await;
        let mut services = dump["services"].as_array().unwrap().iter();
        services.any(|service| service["endpoints"].as_array().unwrap().len() == 2)
    })
    .await;
    for _ in 0..16 {
        let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
        stream.read_u8().await.unwrap();
    }
    assert_eq!(count(&world, "opened", left.name, "-").await, before);
}

#[tokio::test]
async fn an_endpoint_with_a_host_name_is_looked_up() {
    let outside = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = outside.local_addr().unwrap().port();
    let world = world(&[CLIENT], |world| {
        let Type::Service(service) = world.service(SERVER) else { unreachable!() };
        let ports = vec![workload::Port { target_port: port.into(), ..service.ports[0] }];
        let named = |name: &str, host: &str| {
            let workload = ghost(world, name, 60, "server");
            endpoint(Workload { addresses: vec![], hostname: host.into(), tunnel_protocol: 0, ..workload })
        };
        vec![address(Type::Service(workload::Service { ports, ..service })), named("ghost", "localhost")]
    })
    .await;
    let _stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    let (_, client) = outside.accept().await.unwrap();
    assert_eq!(client.ip(), world.pod_ip(CLIENT));
    assert_eq!(count(&world, "opened", "ghost", "-").await, 1);
    let nowhere =
        Workload { addresses: vec![], hostname: "x".repeat(300), ..ghost(&world, "ghost", 60, "server") };
    world.xds.put([endpoint(nowhere)]);
    eventually("nothing is at its new name", async || !served(&world).await).await;
    world.logged(&["connection failed", "looking up the endpoint's host name"]).await;
}
