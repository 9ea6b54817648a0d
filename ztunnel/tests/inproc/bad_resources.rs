//! What the agent should never send: a resource that is not valid closes ways, it opens none.

use std::io::ErrorKind;

use mesh_core::proto::security;
use mesh_core::proto::workload::address::Type;
use tokio::io::AsyncReadExt;

use crate::agent::{address, authorization};
use crate::world::{CLIENT, SERVER, World, eventually, line};

const REFUSED: &[&str] = &["response_flags=\"INVALID_RESOURCE\"", "reporter=\"source\""];

#[tokio::test]
async fn addresses_of_an_invalid_service_are_refused_until_it_is_corrected() {
    let world = World::without_mesh().await;
    let Type::Service(mut service) = world.service(SERVER) else { unreachable!() };
    service.ports[0].service_port = 70_000;
    world.xds.put([address(Type::Service(service))]);
    let world = world.with_pods(&[CLIENT]).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    world.logged(&["belongs to shop/server.local, of which only an invalid form is known", "70000"]).await;
    assert_eq!(world.metric("istio_tcp_connections_failed_total", REFUSED).await, 1);
    assert_eq!(world.metric("ambit_refused_resources", &[]).await, 1);
    assert!(world.xds.nacks()[0].starts_with("shop/server.local: "), "{:?}", world.xds.nacks());
    world.xds.put([address(world.service(SERVER)), address(world.workload(SERVER))]);
    eventually("the good form counts", async || world.metric("ambit_refused_resources", &[]).await == 0)
        .await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    stream.read(&mut [0; 1]).await.unwrap_err();
    world.logged(&["dst.service=\"server.local\"", "connection failed"]).await;
}

#[tokio::test]
async fn an_invalid_policy_denies_its_namespace_until_it_is_gone() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    let policy = |namespace: &str| {
        let (name, scope) = ("p".to_owned(), security::Scope::Namespace as i32);
        authorization(&security::Authorization {
            name,
            namespace: namespace.into(),
            scope,
            action: 9,
            ..Default::default()
        })
    };
    world.xds.put([policy("elsewhere")]);
    eventually("it is known", async || world.metric("ambit_refused_policies", &[]).await == 1).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert_eq!(line(&mut stream).await, world.pod_ip(CLIENT).to_string(), "another namespace is not touched");
    world.xds.put([policy("shop")]);
    eventually("it is known", async || world.metric("ambit_refused_policies", &[]).await == 2).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    world.logged(&["policy shop/p is not valid (action has the unknown value 9)", "DENY"]).await;
    world.xds.remove(mesh_core::proto::AUTHORIZATION_TYPE, "shop/p");
    eventually("it is gone", async || world.metric("ambit_refused_policies", &[]).await == 1).await;
    let mut stream = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert_eq!(line(&mut stream).await, world.pod_ip(CLIENT).to_string());
}

#[tokio::test]
async fn a_pod_whose_own_workload_is_invalid_lets_nobody_in() {
    let world = World::without_mesh().await;
    let Type::Workload(mut workload) = world.workload(SERVER) else { unreachable!() };
    workload.status = 7;
    world.xds.put([address(Type::Workload(workload))]);
    let world = world.with_pods(&[SERVER]).await;
    let _application = world.application(SERVER).await;
    let mut stream = world.dial(CLIENT, (world.pod_ip(SERVER), 8999).into()).await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    world.logged(&["status has the unknown value 7", "it is not known which policies select it"]).await;
}
