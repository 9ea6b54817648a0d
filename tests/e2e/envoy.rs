//! Envoy at the other end of the tunnel: as a client of captured pods, and as the server of a workload that is no pod.

use std::net::SocketAddr;

use mesh_tests::envoy::{self, Envoy, PROXY};
use mesh_tests::fabric;
use mesh_tests::lab::PodRef;
use mesh_tests::peer::Authority;
use mesh_tests::stack::Family;
use mesh_tests::workload::Workload;
use mesh_tests::{Lab, eventually};

use crate::fixture::{ECHO, HBONE, HTTP, SOON, ask, log_end, log_line};
use crate::shared::scenario;

/// Who Envoy is as a client.
const ENVOY: &str = "spiffe://cluster.local/ns/strangers/sa/envoy";
/// Who it is as a server, by the WorkloadEntry below.
const VM: &str = "spiffe://cluster.local/ns/strangers/sa/vm";
const CLIENT: &str = "spiffe://cluster.local/ns/mesh/sa/client";
const WEB: &str = "spiffe://cluster.local/ns/mesh/sa/web";
/// A transfer that fills every window several times over.
const LARGE: &str = "67108864";
/// Where Envoy's tunnels of one authority each listen.
const TO_HTTP: u16 = 18003;
const TO_ECHO: u16 = 18001;
const TO_GREET: u16 = 18002;

/// Envoy in the network of plain/client, which is not captured, with tunnels to a pod of the web account.
fn client_of<'a>(
    lab: &'a Lab,
    server: &PodRef<'_>,
    expected: &str,
    tunnels: &[(u16, String)],
) -> anyhow::Result<(PodRef<'a>, Envoy)> {
    let root = Authority::of_the_mesh(lab)?;
    let server = SocketAddr::new(server.address()?, HBONE);
    let settings = envoy::client(&root, &root.issue(ENVOY)?, server, expected, tunnels);
    let pod = lab.pod("plain/client");
    let envoy = Envoy::start(lab, |program| pod.beside(program), &settings)?;
    Ok((pod, envoy))
}

/// What a CONNECT through Envoy is answered with.
fn status(pod: &PodRef<'_>, target: &str) -> anyhow::Result<u16> {
    let (proxy, url) = (format!("http://127.0.0.1:{PROXY}"), format!("http://{target}/"));
    let answer =
        pod.exec(["curl", "-s", "-o", "/dev/null", "-w", "%{http_connect}", "-p", "-x", &proxy, &url])?;
    Ok(answer.stdout.trim().parse()?)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn envoy_as_client_is_served_under_its_own_name() {
    scenario(|lab| {
        let far = lab.pod("mesh/far");
        let tunnels = [(TO_HTTP, format!("{}:{HTTP}", far.address()?))];
        let (pod, envoy) = client_of(lab, &far, WEB, &tunnels)?;
        let opened = || metric(lab, "istio_tcp_connections_opened_total");
        let (before, end) = (opened()?, log_end(lab, 2)?);
        let answer =
            pod.exec_ok(["curl", "-sS", "--max-time", "10", &format!("http://127.0.0.1:{TO_HTTP}/")])?;
        let answer: serde_json::Value = serde_json::from_str(&answer)?;
        assert_eq!(answer["service"], "far", "{answer} {}", envoy.log());
        assert_eq!(answer["client"], pod.address()?.to_string(), "the application sees who connected");
        log_line(lab, 2, end, &["inbound", ENVOY, "connection complete"])?;
        eventually("the connection is counted under Envoy's name", SOON, || {
            let now = opened()?;
            anyhow::ensure!(now == before + 1, "{before} before, {now} now");
            Ok(())
        })
    });
}

/// Of the connections to pods of node 2 that Envoy made.
fn metric(lab: &Lab, name: &str) -> anyhow::Result<u64> {
    let metrics = lab.scrape(2, 15020, "/metrics")?;
    let principal = format!("source_principal=\"{ENVOY}\"");
    let lines = metrics.lines().filter(|line| {
        line.starts_with(name) && line.contains("reporter=\"destination\"") && line.contains(&principal)
    });
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn envoy_as_client_is_told_why_it_is_refused() {
    scenario(|lab| {
        let far = lab.pod("mesh/far");
        let address = far.address()?;
        let (pod, envoy) = client_of(lab, &far, WEB, &[])?;
        let asked = |target: &str| status(&pod, target);
        assert_eq!(asked(&format!("{address}:{HTTP}"))?, 200, "{}", envoy.log());
        assert_eq!(asked(&format!("{address}:1"))?, 503, "nothing listens there");
        assert_eq!(asked(&format!("{}:{HTTP}", lab.pod("mesh/near").address()?))?, 400, "another pod");
        let principal = ENVOY.trim_start_matches("spiffe://");
        lab.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{ name: no-envoy, namespace: mesh }}\n\
             spec: {{ action: DENY, rules: [{{ from: [{{ source: {{ principals: [{principal}] }} }}] }}] }}\n"
        ))?;
        let denied = eventually("policy refuses Envoy", SOON, || {
            let status = asked(&format!("{address}:{HTTP}"))?;
            anyhow::ensure!(status == 401, "it is answered with {status}");
            Ok(())
        });
        let others = ask(&lab.pod("mesh/client"), &format!("http://{address}:{HTTP}/"));
        lab.kubectl(["delete", "-n", "mesh", "authorizationpolicy", "no-envoy"])?;
        denied?;
        others.map(drop)
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn envoy_as_client_refuses_a_server_of_another_name() {
    scenario(|lab| {
        let far = lab.pod("mesh/far");
        let (pod, envoy) = client_of(lab, &far, CLIENT, &[])?;
        assert_eq!(status(&pod, &format!("{}:{HTTP}", far.address()?))?, 503);
        envoy.logs(&["tunnel ", ": 503 "]).map(drop)
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn every_byte_and_half_close_passes_from_envoy() {
    scenario(|lab| {
        let (echo, greet) = (lab.pod("mesh/echo"), greeter(lab)?);
        let tunnels = [(TO_ECHO, format!("{}:{ECHO}", echo.address()?))];
        let (pod, envoy) = client_of(lab, &echo, WEB, &tunnels)?;
        for bytes in [LARGE, "1", "0"] {
            pod.exec_ok(["ambit-example", "send", "--bytes", bytes, &format!("127.0.0.1:{TO_ECHO}")])?;
        }
        drop(envoy);
        let tunnels = [(TO_GREET, format!("{}:7001", greet.address()?))];
        let (pod, _envoy) = client_of(lab, &greet, "spiffe://cluster.local/ns/mesh/sa/default", &tunnels)?;
        let line = ["ambit-example", "send", "--after-eof", "--bytes", "5000000"];
        pod.exec_ok(line.into_iter().chain([format!("127.0.0.1:{TO_GREET}").as_str()]))?;
        eventually("the server has counted what came after its end", SOON, || {
            let log = greet.logs()?;
            anyhow::ensure!(log.contains("Ok(5000000) bytes"), "it says {log}");
            Ok(())
        })?;
        lab.kubectl(["delete", "pod", "-n", "mesh", "half-closer"]).map(drop)
    });
}

/// A pod that closes its half first.
fn greeter(lab: &Lab) -> anyhow::Result<PodRef<'_>> {
    let greet = Workload::new("mesh", "half-closer").on_node(2);
    let greet = greet.command(&["ambit-example", "greet", "--listen=[::]:7001"]).start(lab)?;
    greet.captured()?;
    Ok(greet)
}

/// The host outside of the cluster as a workload of the mesh whose proxy is Envoy; it is none any more at the end.
struct Machine<'a> {
    lab: &'a Lab,
    envoy: Envoy,
    /// Its applications.
    http: SocketAddr,
    echo: SocketAddr,
}

impl<'a> Machine<'a> {
    fn start(lab: &'a Lab, identity: &str) -> anyhow::Result<Self> {
        let host = fabric::outside(Family::V4);
        let [http, echo] = [80, 7].map(|port| SocketAddr::new(host, port));
        let root = Authority::of_the_mesh(lab)?;
        let settings = envoy::server(&root, &root.issue(identity)?, CLIENT, &[http, echo]);
        let envoy = Envoy::start(lab, |program| lab.outside(program), &settings)?;
        lab.namespace("strangers", &[])?;
        lab.apply(&format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n\
             metadata: {{ name: vm, namespace: strangers, \
             annotations: {{ ambient.istio.io/redirection: enabled }} }}\n\
             spec: {{ address: {host}, serviceAccount: vm }}\n"
        ))?;
        Ok(Self { lab, envoy, http, echo })
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let _ = self.lab.kubectl(["delete", "namespace", "strangers", "--wait=true"]);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn envoy_as_server_ends_the_tunnels_of_a_captured_pod() {
    scenario(|lab| {
        let machine = Machine::start(lab, VM)?;
        let client = lab.pod("mesh/client");
        let url = format!("http://{}/tunnelled", machine.http);
        eventually("what the client sends goes through Envoy", SOON, || {
            assert_eq!(ask(&client, &url)?["service"], "outside");
            anyhow::ensure!(machine.envoy.log().contains("tunnel "), "{}", machine.envoy.log());
            Ok(())
        })?;
        let line = machine.envoy.logs(&[&format!("tunnel {}", machine.http), CLIENT, ": 200 "])?;
        assert!(line.contains("k8s.namespace.name=mesh") && line.contains("forwarded=for="), "{line}");
        let end = log_end(lab, 1)?;
        // The client's end comes first. With the application's, Envoy ends the tunnel: it knows no other half-close.
        for bytes in [LARGE, "1", "0"] {
            client.exec_ok(["ambit-example", "send", "--bytes", bytes, &machine.echo.to_string()])?;
        }
        log_line(lab, 1, end, &["outbound", VM, "connection complete", LARGE])?;
        // What Envoy has no route for it refuses, and the client's log says so.
        let end = log_end(lab, 1)?;
        let other = format!("http://{}:81/", machine.http.ip());
        assert!(!client.exec(["curl", "-sS", "--max-time", "5", &other])?.success());
        log_line(lab, 1, end, &["outbound", &format!("{}:81", machine.http.ip()), "404"]).map(drop)
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn envoy_under_another_name_gets_nothing() {
    scenario(|lab| {
        let end = log_end(lab, 1)?;
        let machine = Machine::start(lab, ENVOY)?;
        let client = lab.pod("mesh/client");
        let url = format!("http://{}/", machine.http);
        eventually("the client does not get through", SOON, || {
            let answer = client.exec(["curl", "-sS", "--max-time", "5", &url])?;
            anyhow::ensure!(!answer.success(), "{answer:?}");
            Ok(())
        })?;
        log_line(lab, 1, end, &["outbound", &machine.http.to_string(), "wrong identity", ENVOY])?;
        assert!(!machine.envoy.log().contains("tunnel "), "{}", machine.envoy.log());
        Ok(())
    });
}
