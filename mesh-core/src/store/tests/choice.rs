//! Who is chosen when not everything is as it should be: nothing ready, some that did not answer, clients that come back.

use std::time::Duration;

use super::*;
use crate::addr::OrigDst;
use crate::service::{Mode, Scope};
use crate::workload::Locality;

fn vip() -> OrigDst {
    OrigDst::from(std::net::SocketAddr::from(([10, 96, 0, 1], 80)))
}

/// A mesh of these endpoints of the service `web`, which is chosen from like this.
fn mesh(endpoints: impl IntoIterator<Item = Workload>, balancing: Balancing) -> (Writer, Reader) {
    let (mut writer, reader) = new();
    for endpoint in endpoints {
        writer.put_workload(member(endpoint, "web", &[]));
    }
    let affinity = Some(Duration::from_secs(60));
    writer.put_service(Service { balancing, affinity, ..service("shop", "web", "10.96.0.1") });
    writer.commit();
    (writer, reader)
}

fn on(name: &str, node: &str, health: Health) -> Workload {
    let last = name.bytes().fold(0_u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte));
    Workload { node: node.into(), health, ..pod(name, &format!("10.0.0.{last}")) }
}

fn local() -> Balancing {
    Balancing { mode: Mode::Strict, scopes: [Scope::Node].into(), allow_unhealthy: false }
}

/// Names of all that are drawn, in order, each once.
fn drawn(reader: &Reader, client: &Workload) -> Result<String, PickError> {
    let entry = reader.service("shop", "web").unwrap();
    let mut names = (0..16)
        .map(|random| Ok(entry.pick(client, vip(), random)?.0.workload.name.to_string()))
        .collect::<Result<Vec<_>, _>>()?;
    names.sort();
    names.dedup();
    Ok(names.join(" "))
}

#[test]
fn what_is_being_ended_serves_where_nothing_else_does() {
    use Health::{Draining, Healthy, Unhealthy};
    let all = Balancing { allow_unhealthy: true, ..Default::default() };
    for (what, endpoints, balancing, expect) in [
        ("one is ready", [("n1", Healthy), ("n1", Draining)], Balancing::default(), Ok("e0")),
        ("none is", [("n1", Unhealthy), ("n1", Draining)], Balancing::default(), Ok("e1")),
        ("all are ended", [("n1", Draining), ("n2", Draining)], Balancing::default(), Ok("e0 e1")),
        (
            "nothing serves",
            [("n1", Unhealthy), ("n2", Unhealthy)],
            Balancing::default(),
            Err(PickError::NoneReady),
        ),
        ("one is ready here", [("n1", Healthy), ("n1", Draining)], local(), Ok("e0")),
        ("one is ready elsewhere", [("n2", Healthy), ("n1", Draining)], local(), Ok("e1")),
        (
            "all is elsewhere",
            [("n2", Healthy), ("n2", Draining)],
            local(),
            Err(PickError::NoneNear(Scope::Node)),
        ),
        ("whatever is published", [("n1", Unhealthy), ("n1", Draining)], all, Ok("e0 e1")),
    ] {
        let endpoints = endpoints.into_iter().enumerate();
        let (_writer, reader) =
            mesh(endpoints.map(|(i, (node, health))| on(&format!("e{i}"), node, health)), balancing);
        let client = on("client", "n1", Healthy);
        assert_eq!(drawn(&reader, &client), expect.map(str::to_owned), "{what}");
    }
}

#[test]
fn why_nothing_can_be_chosen_is_said() {
    let (_writer, reader) = mesh([on("far", "n2", Health::Healthy)], local());
    let error = drawn(&reader, &on("client", "n1", Health::Healthy)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no endpoint of the service is ready in the client's node, which its traffic has to stay in"
    );
}

#[test]
fn another_is_one_that_was_not_tried_the_next_best() {
    let near = Balancing { mode: Mode::Failover, scopes: [Scope::Node].into(), allow_unhealthy: false };
    let endpoints = [("a", "n1"), ("b", "n1"), ("c", "n2"), ("d", "n2")]
        .map(|(name, node)| on(name, node, Health::Healthy));
    let (_writer, reader) = mesh(endpoints, near);
    let client = on("client", "n1", Health::Healthy);
    let entry = reader.service("shop", "web").unwrap();
    for random in 0..32 {
        let mut tried = Vec::new();
        while let Some((endpoint, _)) = entry.pick_other(&client, vip(), random, &tried) {
            assert!(!tried.contains(&endpoint.workload.uid), "{random}: {endpoint:?} again");
            assert_eq!(*endpoint.workload.node == *"n1", tried.len() < 2, "{random}: near ones first");
            tried.push(endpoint.workload.uid.clone());
        }
        assert_eq!(tried.len(), 4, "{random}: {tried:?}");
    }
}

#[test]
fn an_endpoint_is_kept_for_as_long_as_the_client_may_have_it() {
    let endpoints = ["a", "b"].map(|name| on(name, "n1", Health::Healthy));
    let (mut writer, reader) = mesh(endpoints, local());
    let kept = |reader: &Reader, node: &str| {
        let client = on("client", node, Health::Healthy);
        let uid = WorkloadUid::from("c//Pod/shop/a");
        let entry = reader.service("shop", "web").unwrap();
        entry.keep(&client, vip(), &uid).map(|(endpoint, port)| (endpoint.workload.name.to_string(), port))
    };
    assert_eq!(kept(&reader, "n1"), Some(("a".to_owned(), 8080)));
    assert_eq!(kept(&reader, "n2"), None, "it is not for clients of that node");
    writer.put_workload(member(on("c", "n1", Health::Healthy), "web", &[]));
    writer.commit();
    assert_eq!(kept(&reader, "n1"), Some(("a".to_owned(), 8080)), "others come and go");
    writer.put_workload(member(on("a", "n1", Health::Draining), "web", &[]));
    writer.commit();
    assert_eq!(kept(&reader, "n1"), None, "others are ready");
    assert_eq!(drawn(&reader, &on("client", "n1", Health::Healthy)).as_deref(), Ok("b c"));
}

#[test]
fn clients_of_many_places_each_get_what_is_near() {
    const NODES: usize = 40;
    let endpoints = (0..NODES).map(|i| on(&format!("e{i}"), &format!("n{i}"), Health::Healthy));
    let (_writer, reader) = mesh(endpoints, local());
    for round in 0..2 {
        for i in 0..NODES {
            let client = on("client", &format!("n{i}"), Health::Healthy);
            assert_eq!(drawn(&reader, &client), Ok(format!("e{i}")), "round {round}");
        }
    }
}

/// Each kind of place, the widest first: the endpoint that has most in common with the client is chosen, then the next.
#[test]
fn every_scope_is_compared_with_its_own_kind_of_place() {
    use Scope::{Cluster, Network, Node, Region, Subzone, Zone};
    let place = |name: &str, [region, zone, subzone, node, cluster]: [&str; 5]| Workload {
        locality: Locality { region: region.into(), zone: zone.into(), subzone: subzone.into() },
        cluster: cluster.into(),
        ..on(name, node, Health::Healthy)
    };
    let client = place("client", ["r", "z", "s", "n", "c"]);
    // Each differs from the client in one thing alone.
    let all = [
        ("region", Region, ["x", "z", "s", "n", "c"]),
        ("zone", Zone, ["r", "x", "s", "n", "c"]),
        ("subzone", Subzone, ["r", "z", "x", "n", "c"]),
        ("node", Node, ["r", "z", "s", "x", "c"]),
        ("cluster", Cluster, ["r", "z", "s", "n", "x"]),
    ];
    for (other, scope, _) in all {
        let balancing = Balancing { mode: Mode::Strict, scopes: [scope].into(), allow_unhealthy: false };
        let (_writer, reader) = mesh(all.map(|(name, _, at)| place(name, at)), balancing);
        let mut expected: Vec<&str> =
            all.iter().map(|(name, ..)| *name).filter(|name| *name != other).collect();
        expected.sort_unstable();
        assert_eq!(drawn(&reader, &client), Ok(expected.join(" ")), "{scope:?}");
    }
    // PreferClose: with each that is gone the next best one has its turn.
    let scopes = [Network, Region, Zone, Subzone, Node].into();
    let close = Balancing { mode: Mode::Failover, scopes, allow_unhealthy: false };
    let ranked = [
        ("a", ["r", "z", "s", "n", "c"]),
        ("b", ["r", "z", "s", "x", "c"]),
        ("c", ["r", "z", "x", "n", "c"]),
        ("d", ["r", "x", "s", "n", "c"]),
        ("e", ["x", "z", "s", "n", "c"]),
    ];
    let (mut writer, reader) = mesh(ranked.map(|(name, at)| place(name, at)), close);
    for (name, _) in ranked {
        assert_eq!(drawn(&reader, &client), Ok(name.to_owned()));
        writer.remove_workload(&format!("c//Pod/shop/{name}"));
        writer.commit();
    }
}

#[test]
fn what_is_in_another_network_comes_last_wherever_it_is() {
    let far = || Workload { network: "far".into(), ..on("far", "n1", Health::Healthy) };
    let near = Balancing { mode: Mode::Failover, scopes: [Scope::Node].into(), allow_unhealthy: false };
    for balancing in [Balancing::default(), near] {
        let (mut writer, reader) = mesh([far(), on("here", "n2", Health::Healthy)], balancing);
        let client = on("client", "n1", Health::Healthy);
        assert_eq!(drawn(&reader, &client), Ok("here".to_owned()));
        let theirs = Workload { network: "far".into(), ..on("theirs", "n3", Health::Healthy) };
        assert_eq!(
            drawn(&reader, &theirs),
            Ok("far".to_owned()),
            "for clients of that network it is the other"
        );
        writer.remove_workload("c//Pod/shop/here");
        writer.commit();
        assert_eq!(drawn(&reader, &client), Ok("far".to_owned()));
    }
}
