//! The mesh over IPv6, and between pods that have both IP families and pods that have one.

use std::net::SocketAddr;

use mesh_tests::capture::{Captured, Protocol};
use mesh_tests::lab::{Lab, PATIENCE, PodRef};
use mesh_tests::peer::{self, Authority, Outcome};
use mesh_tests::stack::Family;
use mesh_tests::workload::{self, Workload};
use mesh_tests::{Stack, eventually, fabric};
use serde_json::{Value, json};

use crate::fixture::{ECHO, HBONE, HTTP, ask, log_end, log_line};
use crate::shared::scenario;

const CLIENT: &str = "spiffe://cluster.local/ns/mesh/sa/client";
const WEB: &str = "spiffe://cluster.local/ns/mesh/sa/web";

/// `[address]:port`
fn at(pod: &PodRef<'_>, family: Family, port: u16) -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::new(pod.address_of(family)?, port))
}

fn ask_over(pod: &PodRef<'_>, family: Family, url: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&pod.curl_over(family, url)?)?)
}

/// Nothing of the text is on the fabric in the clear, nor a packet of the application's port.
fn hidden(captured: &Captured, text: &str) {
    let flows = captured.flows_with(text.as_bytes());
    assert!(flows.is_empty(), "{text} is on the wire: {flows:?}");
    assert_eq!(captured.count(|packet| packet.has_port(HTTP)), 0, "packets of port {HTTP}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn captured_to_captured_on_another_node_by_ipv6_address() {
    scenario(|lab| {
        let (client, far) = (lab.pod("mesh/client"), lab.pod("mesh/far"));
        let (source, target) = (client.address_of(Family::V6)?, at(&far, Family::V6, HTTP)?);
        let ends = [log_end(lab, 1)?, log_end(lab, 2)?];
        let capture = lab.capture("another-node-v6")?;
        let answer = ask(&client, &format!("http://{target}/a-far-v6-path"))?;
        let captured = capture.stop()?;
        assert_eq!(answer["client"], json!(source.to_string()), "the server sees the client's own address");
        hidden(&captured, "/a-far-v6-path");
        assert!(captured.count(|packet| packet.has_port(HBONE) && packet.source.ip() == source) > 0);
        let tunnel = format!("dst.addr={}", at(&far, Family::V6, HBONE)?);
        let inner = format!("dst.hbone_addr={target}");
        let outbound = log_line(lab, 1, ends[0], &["outbound", CLIENT, WEB, &source.to_string()])?;
        let bare = outbound.replace('"', "");
        assert!(bare.contains(&tunnel) && bare.contains(&inner), "{tunnel} {inner}: {outbound}");
        log_line(lab, 2, ends[1], &["inbound", &target.to_string(), CLIENT, WEB, &source.to_string()])?;
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_service_is_reached_at_both_its_addresses_each_over_its_own_family() {
    scenario(|lab| {
        let client = lab.pod("mesh/client");
        for family in Family::ALL {
            let source = client.address_of(family)?.to_string();
            let vip = SocketAddr::new(lab.service_address_of(family, "mesh", "web")?, 80);
            let capture = lab.capture(&format!("vip-{}", family.as_str()))?;
            let mut answered = std::collections::BTreeSet::new();
            for _ in 0..20 {
                let answer = ask(&client, &format!("http://{vip}/by-vip"))?;
                assert_eq!(answer["client"], json!(source), "over {}", family.as_str());
                answered.insert(answer["service"].to_string());
            }
            let captured = capture.stop()?;
            assert_eq!(answered.len(), 2, "{answered:?}");
            hidden(&captured, "/by-vip");
            let tunnels = captured.count(|packet| packet.has_port(HBONE) && !packet.payload.is_empty());
            let other =
                captured.count(|packet| Family::of(packet.source.ip()) != family && packet.has_port(HBONE));
            assert!(tunnels > 0, "no tunnel over {}", family.as_str());
            // Tunnels that are open already may carry pings.
            assert!(other < tunnels, "{other} of the other family, {tunnels} of {}", family.as_str());
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn on_the_same_node_and_to_itself_over_ipv6() {
    scenario(|lab| {
        let (client, near) = (lab.pod("mesh/client"), lab.pod("mesh/near"));
        let (source, target) = (client.address_of(Family::V6)?.to_string(), at(&near, Family::V6, HTTP)?);
        let end = log_end(lab, 1)?;
        assert_eq!(ask(&client, &format!("http://{target}/"))?["client"], json!(source));
        log_line(lab, 1, end, &["outbound", &target.to_string()])?;
        let own = near.address_of(Family::V6)?.to_string();
        assert_eq!(ask(&near, &format!("http://{target}/"))?["client"], json!(own));
        assert_eq!(ask(&near, &format!("http://[::1]:{HTTP}/"))?["client"], json!("::1"));
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn in_and_out_of_the_mesh_in_the_clear_over_ipv6() {
    scenario(|lab| {
        let (inside, outside) = (lab.pod("mesh/client"), lab.pod("plain/client"));
        let (far, plain) = (lab.pod("mesh/far"), lab.pod("plain/server"));
        let ends = [log_end(lab, 1)?, log_end(lab, 2)?];
        let source = inside.address_of(Family::V6)?.to_string();
        let target = at(&plain, Family::V6, HTTP)?;
        let capture = lab.capture("clear-v6")?;
        assert_eq!(ask(&inside, &format!("http://{target}/a-plain-v6-path"))?["client"], json!(source));
        let captured = capture.stop()?;
        assert!(!captured.flows_with(b"/a-plain-v6-path").is_empty(), "nobody is there to encrypt for");
        log_line(lab, 1, ends[0], &["outbound", &target.to_string()])?;
        let source = outside.address_of(Family::V6)?.to_string();
        let target = at(&far, Family::V6, HTTP)?;
        assert_eq!(ask(&outside, &format!("http://{target}/"))?["client"], json!(source));
        let line = log_line(lab, 2, ends[1], &["inbound", &source])?;
        assert!(!line.contains("src.identity"), "no identity was proved: {line}");
        let beyond = SocketAddr::new(fabric::outside(Family::V6), 80);
        let answer = ask(&inside, &format!("http://{beyond}/"))?;
        assert_eq!(answer["client"], json!(inside.address_of(Family::V6)?.to_string()));
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn every_byte_and_half_closes_over_ipv6() {
    scenario(|lab| {
        let client = lab.pod("mesh/client");
        let echo = at(&lab.pod("mesh/echo"), Family::V6, ECHO)?.to_string();
        for bytes in ["16777216", "1", "0"] {
            client.exec_ok(["ambit-example", "send", "--bytes", bytes, &echo])?;
        }
        let echoed = client.exec_ok(["ambit-example", "datagram", &echo, "hello"])?;
        assert_eq!(echoed.trim(), "hello", "UDP is left alone");
        Ok(())
    });
}

/// Where kube-proxy leads what is for the Service of DNS.
fn dns_server(family: Family) -> SocketAddr {
    SocketAddr::new(fabric::control(family), 53)
}

/// By its address and by its name, which they resolve over their own family.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn clients_of_one_family_reach_a_service_of_both() {
    scenario(|lab| {
        for family in Family::ALL {
            let name = format!("only-{}", family.as_str().to_ascii_lowercase());
            let client = Workload::new("mesh", &name).families(&[family]).on_node(1).start(lab)?;
            client.captured()?;
            let own = client.addresses()?;
            assert_eq!(own.iter().map(|ip| Family::of(*ip)).collect::<Vec<_>>(), [family]);
            let capture = lab.capture(&name)?;
            let vip = SocketAddr::new(lab.service_address_of(family, "mesh", "web")?, 80);
            for host in [vip.to_string(), "web".to_owned()] {
                for _ in 0..6 {
                    let answer = ask(&client, &format!("http://{host}/by-one-family"))?;
                    assert_eq!(answer["client"], json!(own[0].to_string()));
                }
            }
            let captured = capture.stop()?;
            hidden(&captured, "/by-one-family");
            let asked = captured.count(|packet| {
                packet.protocol == Protocol::Udp
                    && packet.destination == dns_server(family)
                    && packet.source.ip() == own[0]
            });
            assert_eq!(asked, 0, "names of the mesh are answered on the node, over {} too", family.as_str());
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn servers_of_one_family_are_reached_at_an_address_of_the_other() {
    scenario(|lab| {
        for (namespace, family) in
            [("mesh", Family::V4), ("mesh", Family::V6), ("plain", Family::V4), ("plain", Family::V6)]
        {
            let name = format!("lone-{}", family.as_str().to_ascii_lowercase());
            let server = Workload::new(namespace, &name).serve().families(&[family]).on_node(2).start(lab)?;
            workload::service(lab, namespace, &name, 80, HTTP)?;
            if namespace == "mesh" {
                server.captured()?;
            }
            let client = lab.pod("mesh/client");
            // kube-proxy has no endpoint behind that address; the mesh finds the workload whatever was dialled.
            let url = format!("http://{name}.{namespace}/by-the-other");
            let capture = lab.capture(&name)?;
            let answer = eventually("the mesh knows the endpoint", PATIENCE, || {
                ask_over(&client, family.other(), &url)
            })?;
            let captured = capture.stop()?;
            let seen = client.address_of(family)?.to_string();
            assert_eq!(answer["client"], json!(seen), "the client's address of the server's family");
            if namespace == "mesh" {
                hidden(&captured, "/by-the-other");
            }
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn authorities_of_both_families() {
    scenario(|lab| {
        let (client, far) = (lab.pod("plain/client"), lab.pod("mesh/far"));
        let credentials = Authority::of_the_mesh(lab)?.issue(CLIENT)?;
        let connect = |over: Family, authority: &str| {
            peer::connect(lab, &client, at(&far, over, HBONE)?, authority, &credentials)
        };
        let own = |family| Ok::<_, anyhow::Error>(at(&far, family, HTTP)?.to_string());
        let near = at(&lab.pod("mesh/near"), Family::V6, HTTP)?.to_string();
        let (v4, v6) = (own(Family::V4)?, own(Family::V6)?);
        for over in Family::ALL {
            for (authority, expect) in [
                (v4.as_str(), 200),
                (v6.as_str(), 200),
                ("web.mesh.svc.cluster.local:80", 200),
                (near.as_str(), 400),
            ] {
                let outcome = connect(over, authority)?;
                assert_eq!(outcome, Outcome::Status(expect), "{authority} over {}", over.as_str());
            }
        }
        ask(&lab.pod("mesh/client"), "http://web/").map(drop)
    });
}

/// Without IPv4 the daemons, their names and their certificates work over IPv6.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_mesh_of_ipv6_only() -> anyhow::Result<()> {
    mesh_of_one(Stack::V6)
}

/// Nodes and pods in which IPv6 is disabled.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_mesh_of_ipv4_only() -> anyhow::Result<()> {
    mesh_of_one(Stack::V4)
}

fn mesh_of_one(stack: Stack) -> anyhow::Result<()> {
    let lab = Lab::new().nodes(2).stack(stack).mesh().start()?;
    let carried = || {
        lab.namespace("one", &[("istio.io/dataplane-mode", "ambient")])?;
        let client = Workload::new("one", "client").on_node(1).start(&lab)?;
        let server = Workload::new("one", "server").serve().on_node(2).start(&lab)?;
        workload::service(&lab, "one", "server", 80, HTTP)?;
        client.captured()?;
        server.captured()?;
        let capture = lab.capture("one")?;
        let answer = eventually("the server answers through its Service", PATIENCE, || {
            ask(&client, "http://server/in-one-family")
        })?;
        let captured = capture.stop()?;
        assert_eq!(answer["client"], json!(client.address()?.to_string()));
        hidden(&captured, "/in-one-family");
        let other = captured.count(|packet| !stack.has(Family::of(packet.source.ip())));
        assert_eq!(other, 0, "there is one family");
        assert!(!captured.tls13(client.address()?, server.address()?).is_empty(), "no TLS 1.3");
        anyhow::Ok(())
    };
    carried().map_err(|error| error.context(lab.story("ambit-system")))
}
