//! Policy at the door of a pod: who is let in, and who has to go when it changes.

use std::io::ErrorKind;

use mesh_core::convert::authz::AUDIT;
use mesh_core::proto::security::{self, string_match::MatchType};
use mesh_core::proto::workload::{self, address::Type};
use mesh_core::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::agent::{address, authorization};
use crate::world::{APP, CLIENT, SERVER, TestPod, World, eventually, line};

/// Istio's converted PeerAuthentication.
const STRICT: &str = "istio-system/istio_converted_static_strict";

/// A DENY policy for those who name it.
fn deny(key: &str, matches: security::Match) -> mesh_core::proto::discovery::Resource {
    let (namespace, name) = key.split_once('/').unwrap();
    let rule = security::Rule { clauses: vec![security::Clause { matches: vec![matches] }] };
    authorization(&security::Authorization {
        name: name.into(),
        namespace: namespace.into(),
        scope: security::Scope::WorkloadSelector.into(),
        action: security::Action::Deny.into(),
        rules: vec![rule],
        ..Default::default()
    })
}

fn text(match_type: MatchType) -> security::StringMatch {
    security::StringMatch { match_type: Some(match_type) }
}

fn strict() -> mesh_core::proto::discovery::Resource {
    let anyone = vec![text(MatchType::Presence(security::Presence {}))];
    deny(STRICT, security::Match { not_principals: anyone, ..Default::default() })
}

/// One that denies the client.
pub(crate) fn no_client(name: &str) -> mesh_core::proto::discovery::Resource {
    denies(name, &CLIENT.identity())
}

/// One that denies this identity.
pub(crate) fn denies(name: &str, identity: &str) -> mesh_core::proto::discovery::Resource {
    let principals = vec![text(MatchType::Exact(identity.replace("spiffe://", "")))];
    deny(name, security::Match { principals, ..Default::default() })
}

/// The server's workload, subject to these policies.
pub(crate) fn subject(world: &World, policies: &[&str]) -> mesh_core::proto::discovery::Resource {
    let Type::Workload(workload) = world.workload(SERVER) else { unreachable!() };
    let authorization_policies = policies.iter().map(|name| (*name).to_owned()).collect();
    address(Type::Workload(workload::Workload { authorization_policies, ..workload }))
}

/// Waits until ztunnel knows that the server is subject to a policy.
pub(crate) async fn is_subject(world: &World, policy: &str) {
    eventually("the pod is subject to it", async || {
        let dump = world.dump().await;
        let workloads = dump["workloads"].as_array().unwrap();
        workloads.iter().any(|workload| workload["authorizationPolicies"][0] == policy)
    })
    .await;
}

async fn echoes(stream: &mut TcpStream) -> bool {
    stream.write_all(b"?").await.is_ok() && stream.read_u8().await.is_ok_and(|byte| byte == b'?')
}

/// Connects in the clear to the pod's inbound listener and waits for what becomes of it.
async fn plaintext(world: &World, pod: TestPod) -> ErrorKind {
    let mut stream = world.dial(CLIENT, (world.pod_ip(pod), 8999).into()).await.unwrap();
    stream.read(&mut [0; 1]).await.unwrap_err().kind()
}

#[tokio::test]
async fn strict_refuses_plaintext_and_serves_the_mesh() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    let mut open = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut open).await;
    world.xds.put([strict(), subject(&world, &[STRICT])]);
    is_subject(&world, STRICT).await;
    assert_eq!(plaintext(&world, SERVER).await, ErrorKind::ConnectionReset);
    world
        .logged(&[
            &format!("policy {STRICT} denies it by its rule 0; the client did not use mutual TLS"),
            "direction=\"inbound\"",
            "dst.workload=\"server\"",
            "reason=\"DENY\"",
        ])
        .await;
    let denied =
        ["reporter=\"destination\"", "response_flags=\"DENY\"", "destination_workload=\"server-deployment\""];
    assert_eq!(world.metric("istio_tcp_connections_failed_total", &denied).await, 1);
    assert!(echoes(&mut open).await, "what came by mutual TLS goes on");
    let mut new = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    assert_eq!(line(&mut new).await, world.pod_ip(CLIENT).to_string());
}

#[tokio::test]
async fn an_open_connection_that_policy_no_longer_allows_is_cut() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    let mut open = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut open).await;
    // One that does not select the pod yet changes nothing.
    world.xds.put([no_client("shop/no-client")]);
    eventually("it is known", async || !world.dump().await["policies"].as_array().unwrap().is_empty()).await;
    assert!(echoes(&mut open).await);
    world.xds.put([subject(&world, &["shop/no-client"])]);
    assert_eq!(open.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    world
        .logged(&[
            "policy has changed: policy shop/no-client denies it by its rule 0",
            "direction=\"inbound\"",
            "DENY",
        ])
        .await;
    // So is its client's end told, which had been answered 200 already.
    let told = ["the other end's policy does not allow it any more", "direction=\"outbound\"", "DENY"];
    world.logged(&told).await;
    world.xds.put([subject(&world, &[])]);
    world.xds.remove(AUTHORIZATION_TYPE, "shop/no-client");
    eventually("it is gone", async || world.dump().await["policies"].as_array().unwrap().is_empty()).await;
    let mut open = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut open).await;
    assert!(echoes(&mut open).await);
    // A policy's own change counts as well, here from one that is about nobody to one about everybody.
    world.xds.put([authorization(&security::Authorization {
        name: "nothing".into(),
        namespace: "istio-system".into(),
        ..Default::default()
    })]);
    assert_eq!(open.read(&mut [0; 1]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    world.logged(&["policy has changed: policy istio-system/nothing does not allow it"]).await;
}

/// What a policy did, and would have done, by its name at both ends; who was nearly let in; who is to be noted.
#[tokio::test]
async fn what_policies_did_is_counted_by_their_names_at_both_ends() {
    let mut world = World::new().await;
    let _application = world.application(SERVER).await;
    let of = async |reporter: &str, policy: &str, outcome: &str| {
        let (reporter, policy) = (format!("reporter=\"{reporter}\""), format!("policy=\"{policy}\""));
        let outcome = format!("outcome=\"{outcome}\"");
        world.metric("ambit_policy_connections_total", &[&reporter, &policy, &outcome]).await
    };
    let everything =
        |name: &str, action: security::Action, matches: security::Match| security::Authorization {
            name: name.into(),
            namespace: "shop".into(),
            scope: security::Scope::Namespace.into(),
            action: action.into(),
            rules: vec![security::Rule { clauses: vec![security::Clause { matches: vec![matches] }] }],
            ..Default::default()
        };
    let port = |port: u16| security::Match { destination_ports: vec![port.into()], ..Default::default() };
    let audit = security::Authorization {
        dry_run: true,
        extensions: vec![security::Extension { name: AUDIT.into(), config: None }],
        ..everything("noted", security::Action::Deny, port(APP))
    };
    let trial =
        security::Authorization { dry_run: true, ..everything("trial", security::Action::Deny, port(APP)) };
    let also = security::Authorization { name: "also".into(), ..audit.clone() };
    world.xds.put([authorization(&audit), authorization(&also), authorization(&trial)]);
    let known = async |count| {
        eventually("it is known", async || world.dump().await["policies"].as_array().unwrap().len() == count)
            .await;
    };
    known(3).await;
    let mut open = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    line(&mut open).await;
    drop(open);
    world
        .logged(&[
            "connection complete",
            "audit=policy shop/",
            "policy shop/noted, rule 0",
            "policy shop/also, rule 0",
            "dry_run=policy shop/trial",
        ])
        .await;
    let counts =
        [of("destination", "shop/noted", "audit").await, of("destination", "shop/trial", "dry_run").await];
    assert_eq!(counts, [1, 1]);
    assert_eq!(of("destination", "shop/also", "audit").await, 1, "each that matches");
    let only = security::Match { principals: vec![text(MatchType::Exact("nobody".into()))], ..port(APP) };
    world.xds.put([authorization(&everything("only", security::Action::Allow, only))]);
    known(4).await;
    let mut refused = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    refused.read(&mut [0; 1]).await.unwrap_err();
    world
        .logged(&[
            "policy shop/only does not allow it",
            "nearest=rule 0 of policy shop/only, but for principals",
            "audit=policy shop/",
            "policy shop/noted, rule 0",
            "policy shop/also, rule 0",
            "dry_run=policy shop/trial",
            "direction=\"inbound\"",
        ])
        .await;
    eventually("both ends count it", async || {
        of("destination", "shop/only", "denied").await == 1 && of("source", "shop/only", "denied").await == 1
    })
    .await;
    let flags = ["reporter=\"source\"", "response_flags=\"DENY\""];
    assert_eq!(world.metric("istio_tcp_connections_failed_total", &flags).await, 1);

    // What it did goes with it.
    assert!(of("destination", "shop/trial", "dry_run").await > 1, "who is refused is rehearsed as well");
    world.xds.remove(AUTHORIZATION_TYPE, "shop/trial");
    known(3).await;
    let left = [("shop/trial", "dry_run"), ("shop/noted", "audit")];
    eventually("its series are gone, and no other", async || {
        of("destination", left[0].0, left[0].1).await == 0
            && of("destination", left[1].0, left[1].1).await > 0
    })
    .await;

    // The agent hears of it once, however often the client tries.
    let mut again = world.dial(CLIENT, world.vip(SERVER)).await.unwrap();
    again.read(&mut [0; 1]).await.unwrap_err();
    eventually("it is refused again", async || of("destination", "shop/only", "denied").await == 2).await;
    let talk = world.talk.as_mut().unwrap();
    talk.remove(&CLIENT.uid()).await;
    let told: Vec<(&str, &str)> =
        talk.denied.iter().map(|denied| (denied.client.as_str(), denied.policy.as_str())).collect();
    assert_eq!(told, [(CLIENT.identity().as_str(), "shop/only")]);
    assert_eq!((talk.denied[0].uid.as_str(), talk.denied[0].port), (SERVER.uid().as_str(), APP.into()));
    assert!(!talk.denied[0].reason.contains("but for"), "{:?}", talk.denied[0].reason);
}

/// A pod may outlive its object in the API server, when that is deleted by force: its policies go on.
#[tokio::test]
async fn what_selected_a_pod_selects_it_when_the_mesh_has_forgotten_it() {
    let world = World::new().await;
    let _application = world.application(SERVER).await;
    world.xds.put([strict(), subject(&world, &[STRICT])]);
    is_subject(&world, STRICT).await;
    world.xds.remove(ADDRESS_TYPE, &SERVER.workload_uid());
    eventually("it is forgotten", async || {
        let dump = world.dump().await;
        dump["workloads"].as_array().unwrap().iter().all(|workload| workload["name"] != SERVER.name)
    })
    .await;
    assert_eq!(plaintext(&world, SERVER).await, ErrorKind::ConnectionReset);
    world.logged(&[&format!("policy {STRICT} denies it"), "direction=\"inbound\""]).await;
}

#[tokio::test]
async fn a_policy_that_is_not_known_lets_nobody_in() {
    let world = World::new().await;
    world.xds.put([subject(&world, &["shop/later"])]);
    is_subject(&world, "shop/later").await;
    assert_eq!(plaintext(&world, SERVER).await, ErrorKind::ConnectionReset);
    world.logged(&["the pod is subject to policy shop/later, which is not known"]).await;
}
