//! The claims. Each returns its evidence, or an error that says what was missing.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;

use super::Scene;
use crate::capture::Protocol;
use crate::eventually;
use crate::fabric;
use crate::lab::PodRef;
use crate::peer::{self, Authority, Outcome};
use crate::stack::Family;
use crate::workload::Workload;

type Check = fn(&Scene<'_>) -> anyhow::Result<String>;

/// Number, title and check, in the order in which they are run.
pub(super) const ALL: &[(u8, &str, Check)] = &[
    (1, "before enrolment a known marker is seen in the clear on the wire", in_the_clear),
    (
        2,
        "labelling the namespace captures running pods without a restart: TLS 1.3 on the wire, no marker",
        enrolled,
    ),
    (3, "the server sees the client's real IP; both identities are in both access logs", identities),
    (4, "UDP, DNS and traffic to the outside keep working", outside),
    (5, "a new pod is in the mesh from its first packet", first_packet),
    (6, "a pod without the mesh reaches a permissive server, in the clear and counted as such", permissive),
    (7, "a peer with a certificate of another root is refused, and the log says why", foreign_root),
    (8, "kill -9 of ztunnel under load: no connection is refused or lost", super::crashes::ztunnel),
    (9, "kill -9 of the agent under load: nobody notices", super::crashes::agent),
    (10, "an address that goes to another pod takes no traffic along", super::reuse::safe),
    (11, "the same over IPv6: own address kept, both identities, TLS 1.3 on the wire, no marker", over_ipv6),
    (12, "STRICT refuses a pod outside the mesh and serves those inside", super::strict::refused),
    (
        13,
        "under STRICT the kubelet's probes reach the application from the node's own address",
        super::probes::direct,
    ),
];

/// The example's HTTP port, behind Service port 80.
const HTTP: u16 = 8080;
const HBONE: u16 = 15008;
/// Enough for the random choice of an endpoint to hit both nodes: 2^-19 that it does not.
const ENOUGH: usize = 20;
const SOON: Duration = Duration::from_secs(10);

fn in_the_clear(scene: &Scene<'_>) -> anyhow::Result<String> {
    paid_in_the_clear(scene, 1, &scene.gateway(), Family::V4)
}

/// Payments of a client that nobody captures are seen by whoever watches the wire.
fn paid_in_the_clear(
    scene: &Scene<'_>,
    claim: u8,
    client: &PodRef<'_>,
    family: Family,
) -> anyhow::Result<String> {
    let marker = scene.marker(claim);
    let capture = scene.lab.capture(&format!("claim-{claim}-clear"))?;
    let answers = scene.pay_over(family, client, &marker, ENOUGH)?;
    let captured = capture.stop()?;
    let flows = captured.flows_with(marker.as_bytes());
    let first = flows.first().with_context(|| format!("marker {marker} is not on the wire"))?;
    Ok(format!("{} payments, {} flows with {marker} in the clear, e.g. {first}", answers.len(), flows.len()))
}

fn enrolled(scene: &Scene<'_>) -> anyhow::Result<String> {
    let before = scene.incarnations()?;
    scene.enrol()?;
    let hidden = paid_unseen(scene, 2, Family::V4)?;
    anyhow::ensure!(scene.incarnations()? == before, "a pod was restarted");
    Ok(format!("{} running pods captured, 0 restarts; {hidden}", before.len()))
}

/// Payments of the gateway reach both versions of the payment service, and the wire shows TLS 1.3 and nothing else.
fn paid_unseen(scene: &Scene<'_>, claim: u8, family: Family) -> anyhow::Result<String> {
    let marker = scene.marker(claim);
    let capture = scene.lab.capture(&format!("claim-{claim}"))?;
    let answers = scene.pay_over(family, &scene.gateway(), &marker, ENOUGH)?;
    let captured = capture.stop()?;
    let versions: BTreeSet<&str> = answers.iter().filter_map(|answer| answer["version"].as_str()).collect();
    anyhow::ensure!(versions == BTreeSet::from(["v1", "v2"]), "answers came from {versions:?} only");
    let flows = captured.flows_with(marker.as_bytes());
    anyhow::ensure!(flows.is_empty(), "marker {marker} is on the wire: {}", flows[0]);
    let gateway = scene.gateway().address_of(family)?;
    let handshakes: Vec<_> = scene
        .payment_addresses(family)?
        .into_iter()
        .flat_map(|server| captured.tls13(gateway, server))
        .filter(|handshake| handshake.flow.destination.port() == HBONE)
        .collect();
    let first = handshakes.first().context("no TLS 1.3 handshake from the gateway to the payment service")?;
    let hbone = captured.count(|packet| packet.has_port(HBONE) && !packet.payload.is_empty());
    let clear = captured.count(|packet| packet.protocol == Protocol::Tcp && packet.has_port(HTTP));
    anyhow::ensure!(clear == 0, "{clear} packets to or from port {HTTP} in the clear");
    Ok(format!(
        "{} payments to {versions:?}; marker on the wire: never; TLS 1.3 {}; {hbone} HBONE segments, 0 packets of \
         port {HTTP}",
        answers.len(),
        first.flow
    ))
}

fn identities(scene: &Scene<'_>) -> anyhow::Result<String> {
    known_to_both(scene, 3, Family::V4)
}

/// The server sees the gateway's own address, and both nodes' logs have both identities.
fn known_to_both(scene: &Scene<'_>, claim: u8, family: Family) -> anyhow::Result<String> {
    let gateway = scene.gateway();
    let address = gateway.address_of(family)?.to_string();
    let node = gateway.node_index()?;
    let remote = remote_payment(scene, node)?;
    let (server, server_node) =
        (SocketAddr::new(remote.address_of(family)?, HTTP).to_string(), remote.node_index()?);
    let seen: BTreeSet<String> = scene
        .pay_over(family, &gateway, &scene.marker(claim), ENOUGH)?
        .iter()
        .map(|answer| answer["client"].as_str().unwrap_or_default().to_owned())
        .collect();
    anyhow::ensure!(
        seen == BTreeSet::from([address.clone()]),
        "the server saw {seen:?} instead of {address}"
    );
    let ids = ["api-gateway", "payment-service"]
        .map(|name| format!("spiffe://cluster.local/ns/payments/sa/{name}"));
    let line = |index: u8, direction: &str| -> anyhow::Result<String> {
        eventually(
            &format!("{direction} line with both identities in the access log of n{index}"),
            SOON,
            || {
                let log = scene.access_log(index)?;
                let holds = |line: &&str| {
                    line.contains(direction)
                        && line.contains(&server)
                        && ids.iter().all(|id| line.contains(id))
                };
                log.lines().rev().find(holds).map(str::to_owned).with_context(|| tail(&log))
            },
        )
    };
    let (source, destination) = (line(node, "outbound")?, line(server_node, "inbound")?);
    Ok(format!(
        "server saw {address}, the gateway's own address\nn{node}: {source}\nn{server_node}: {destination}"
    ))
}

fn outside(scene: &Scene<'_>) -> anyhow::Result<String> {
    let gateway = scene.gateway();
    let text = scene.marker(4);
    let echoed = gateway.exec_ok(["ambit-example", "datagram", "outside.example:7", &text])?;
    anyhow::ensure!(echoed.trim() == text, "the datagram came back as {echoed:?}");
    let answer = gateway.curl("http://outside.example/")?;
    anyhow::ensure!(answer.contains("\"service\":\"outside\""), "the outside answered {answer}");
    let name = gateway.exec_ok(["getent", "ahostsv4", "payment-service"])?;
    let address = scene.lab.service_address("payments", "payment-service")?.to_string();
    anyhow::ensure!(name.contains(&address), "payment-service resolves to {name:?}, not {address}");
    let unknown = gateway.exec(["getent", "ahostsv4", "nowhere.example"])?;
    anyhow::ensure!(!unknown.success(), "a name that does not exist resolves: {}", unknown.stdout);
    Ok(format!(
        "UDP echo by outside.example: back unchanged; HTTP: {}; payment-service resolves to {address}",
        answer.trim()
    ))
}

fn first_packet(scene: &Scene<'_>) -> anyhow::Result<String> {
    let marker = scene.marker(5);
    let remote = remote_payment(scene, 1)?;
    let server = SocketAddr::new(remote.address()?, HTTP);
    let capture = scene.lab.capture("claim-5")?;
    // Nothing is awaited: the very first thing the process does is to connect.
    let (note, url) = (format!("x-note: {marker}"), format!("http://{server}/payments"));
    let pod = Workload::new("payments", "newcomer")
        .on_node(1)
        .command(&["curl", "-sS", "--fail", "--max-time", "10", "-H", &note, &url])
        .with("/spec/restartPolicy", json!("Never"))
        .create(scene.lab)?;
    let phase =
        || Ok::<_, anyhow::Error>(pod.object()?.status.and_then(|status| status.phase).unwrap_or_default());
    eventually("the new pod has made its payment", Duration::from_secs(30), || {
        let phase = phase()?;
        anyhow::ensure!(phase == "Succeeded" || phase == "Failed", "it is {phase}");
        Ok(())
    })
    .map_err(|error| error.context(scene.lab.story("payments")))?;
    let captured = capture.stop()?;
    anyhow::ensure!(phase()? == "Succeeded", "its payment failed: {}", pod.logs()?);
    let answer: serde_json::Value = serde_json::from_str(&pod.logs()?).context("parse the answer")?;
    let address: IpAddr =
        answer["client"].as_str().unwrap_or_default().parse().context("the client's address")?;
    let flows = captured.flows_with(marker.as_bytes());
    anyhow::ensure!(flows.is_empty(), "marker {marker} is on the wire: {}", flows[0]);
    let opened: Vec<u16> = captured
        .packets()
        .filter(|packet| packet.opens() && packet.source.ip() == address)
        .map(|packet| packet.destination.port())
        .collect();
    anyhow::ensure!(opened.iter().all(|port| *port == HBONE), "it opened connections to ports {opened:?}");
    anyhow::ensure!(!captured.tls13(address, server.ip()).is_empty(), "no TLS 1.3 handshake from {address}");
    Ok(format!(
        "{address} connected to {server} as its first act: SYNs to ports {opened:?}, TLS 1.3, marker never seen"
    ))
}

fn permissive(scene: &Scene<'_>) -> anyhow::Result<String> {
    let client = scene.lab.pod("legacy/client");
    let remote = remote_payment(scene, client.node_index()?)?;
    let node = remote.node_index()?;
    let address = client.address()?.to_string();
    let before = clear_connections(scene, node)?;
    let marker = scene.marker(6);
    let capture = scene.lab.capture("claim-6")?;
    let answers = scene.pay(&client, &marker, ENOUGH)?;
    let captured = capture.stop()?;
    let flows = captured.flows_with(marker.as_bytes());
    let first = flows.first().context("the marker is not on the wire, though this client has no mesh")?;
    let seen = answers.iter().all(|answer| answer["client"] == address.as_str());
    anyhow::ensure!(seen, "the server saw another client than {address}");
    let counted = eventually("ztunnel counts the connections as of unknown security", SOON, || {
        let now = clear_connections(scene, node)?;
        anyhow::ensure!(now > before, "still {now}");
        Ok(now - before)
    })?;
    Ok(format!(
        "{} payments answered to {address}; in the clear: {first}; counted as connection_security_policy=\"unknown\" \
         on n{node}: {counted}",
        answers.len()
    ))
}

fn foreign_root(scene: &Scene<'_>) -> anyhow::Result<String> {
    let client = scene.lab.pod("legacy/client");
    let remote = remote_payment(scene, client.node_index()?)?;
    let (address, node) = (remote.address()?, remote.node_index()?);
    let authority = format!("{address}:{HTTP}");
    let server = SocketAddr::new(address, HBONE);
    let identity = "spiffe://cluster.local/ns/payments/sa/api-gateway";
    // The same request with a certificate of the mesh's own root is served: it is the root that is refused.
    let own = Authority::of_the_mesh(scene.lab)?.issue(identity)?;
    let served = peer::connect(scene.lab, &client, server, &authority, &own)?;
    anyhow::ensure!(served == Outcome::Status(200), "with the mesh's own root: {served:?}");
    let from = scene.access_log(node)?.len();
    let foreign = Authority::foreign()?.issue(identity)?;
    let outcome = peer::connect(scene.lab, &client, server, &authority, &foreign)?;
    let Outcome::Refused(reason) = outcome else { anyhow::bail!("it was answered: {outcome:?}") };
    let source = client.address()?.to_string();
    let line = eventually("the log says why", SOON, || {
        let log = scene.access_log(node)?;
        let new = log.get(from..).unwrap_or_default();
        let why = |line: &&str| {
            let lower = line.to_ascii_lowercase();
            lower.contains(&source) && ["root", "issuer", "authority"].iter().any(|word| lower.contains(word))
        };
        new.lines().find(why).map(str::to_owned).with_context(|| tail(new))
    })?;
    Ok(format!("own root: 200; other root: {reason}\nn{node}: {line}"))
}

fn over_ipv6(scene: &Scene<'_>) -> anyhow::Result<String> {
    let family = Family::V6;
    let gateway = scene.gateway();
    // What the next captures would show if there were no mesh.
    let clear = paid_in_the_clear(scene, 11, &scene.lab.pod("legacy/client"), family)?;
    let unseen = paid_unseen(scene, 11, family)?;
    let known = known_to_both(scene, 11, family)?;
    let name = gateway.exec_ok(["getent", "ahostsv6", "payment-service"])?;
    let service = scene.lab.service_address_of(family, "payments", "payment-service")?.to_string();
    anyhow::ensure!(name.contains(&service), "payment-service resolves to {name:?}, not {service}");
    let outside = gateway.curl_over(family, "http://outside.example/")?;
    let own = format!("\"client\":\"{}\"", gateway.address_of(family)?);
    anyhow::ensure!(outside.contains(&own), "the outside answered {outside}");
    let text = scene.marker(11);
    let echo = SocketAddr::new(fabric::outside(family), 7).to_string();
    let echoed = gateway.exec_ok(["ambit-example", "datagram", &echo, &text])?;
    anyhow::ensure!(echoed.trim() == text, "the datagram came back as {echoed:?}");
    Ok(format!(
        "without the mesh: {clear}\nin the mesh, to {service}: {unseen}\n{known}\n\
         UDP echo by {echo}: back unchanged; HTTP: {}",
        outside.trim()
    ))
}

/// The payment service's pod on another node than this one.
fn remote_payment<'a>(scene: &Scene<'a>, node: u8) -> anyhow::Result<PodRef<'a>> {
    for version in ["v1", "v2"] {
        let pod = scene.payment(version);
        if pod.node_index()? != node {
            return Ok(pod);
        }
    }
    anyhow::bail!("both versions of the payment service run on n{node}")
}

/// Connections that ztunnel accepted for the payment service without mutual TLS.
fn clear_connections(scene: &Scene<'_>, node: u8) -> anyhow::Result<u64> {
    let metrics = scene.lab.scrape(node, 15020, "/metrics")?;
    let lines = metrics.lines().filter(|line| {
        line.starts_with("istio_tcp_connections_opened_total{")
            && line.contains("reporter=\"destination\"")
            && line.contains("connection_security_policy=\"unknown\"")
            && line.contains("destination_workload=\"payment-service-")
    });
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum())
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    format!("the log ends with:\n{}", lines[lines.len().saturating_sub(8)..].join("\n"))
}
