//! The lab itself, without the mesh: it has to behave as a cluster does before anything else can be said.

use std::time::Duration;

use mesh_tests::lab::PATIENCE;
use mesh_tests::stack::Family;
use mesh_tests::workload::{self, Workload};
use mesh_tests::{Lab, Stack, eventually, fabric};
use nix::sys::signal::Signal;
use serde_json::json;

#[test]
#[ignore = "needs root: cargo xtask test"]
fn behaves_as_a_cluster() -> anyhow::Result<()> {
    behaves(Stack::V4)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn behaves_as_a_cluster_of_ipv6_only() -> anyhow::Result<()> {
    behaves(Stack::V6)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn behaves_as_a_cluster_of_both_families() -> anyhow::Result<()> {
    behaves(Stack::Dual)
}

/// Pods, Services, DNS, probes, restarts and the fabric in one lab: starting one takes longer than any of these.
fn behaves(stack: Stack) -> anyhow::Result<()> {
    let lab = Lab::new().nodes(2).stack(stack).start()?;
    lab.namespace("shop", &[])?;
    let client = Workload::new("shop", "client").on_node(1).create(&lab)?;
    let near = Workload::new("shop", "near").on_node(1).serve().label("app", "web").create(&lab)?;
    let far = Workload::new("shop", "far").on_node(2).serve().label("app", "web").create(&lab)?;
    workload::service(&lab, "shop", "web", 80, 8080)?;
    for pod in [&client, &near, &far] {
        pod.ready()?;
    }
    addresses(&lab, stack)?;
    for family in stack.families() {
        services(&lab, *family)?;
        names(&lab, *family)?;
        capture(&lab, *family)?;
    }
    refusal(&lab, stack)?;
    over_tcp(&lab)?;
    limits(&lab)?;
    restarts(&lab)?;
    deployments(&lab)
}

/// What nodes, pods, Services and slices say of themselves, in the order of the families.
fn addresses(lab: &Lab, stack: Stack) -> anyhow::Result<()> {
    let families: Vec<&str> = stack.families().iter().map(|family| family.as_str()).collect();
    let of = |ips: &str| -> anyhow::Result<Vec<&str>> {
        ips.split_whitespace().map(|ip| Ok(Family::of(ip.parse()?).as_str())).collect()
    };
    let paths = [
        ("node/n1", "{.status.addresses[?(@.type==\"InternalIP\")].address}"),
        ("-nshop pod/near", "{.status.podIPs[*].ip}"),
        ("-nshop pod/near", "{.status.hostIPs[*].ip}"),
        ("-nshop service/web", "{.spec.clusterIPs[*]}"),
    ];
    for (object, path) in paths {
        let path = format!("-ojsonpath={path}");
        let line = ["get"].into_iter().chain(object.split(' ')).chain([path.as_str()]);
        let ips = lab.kubectl(line)?;
        assert_eq!(of(&ips)?, families, "{object} {path}: {ips}");
    }
    let selector = "kubernetes.io/service-name=web";
    let slices = ["get", "-nshop", "endpointslices", "-l", selector, "-ojsonpath={.items[*].addressType}"];
    let mut types: Vec<String> = lab.kubectl(slices)?.split(' ').map(str::to_owned).collect();
    types.sort();
    assert_eq!(types, families, "one slice for each family");
    Ok(())
}

fn services(lab: &Lab, family: Family) -> anyhow::Result<()> {
    let client = lab.pod("shop/client");
    let address = client.address_of(family)?.to_string();
    let mut answered = std::collections::BTreeSet::new();
    eventually("both endpoints answer through the Service", PATIENCE, || {
        let answer: serde_json::Value = serde_json::from_str(&client.curl_over(family, "http://web/")?)?;
        anyhow::ensure!(answer["client"] == address.as_str(), "the server saw {}", answer["client"]);
        answered.insert(answer["service"].to_string());
        anyhow::ensure!(answered.len() == 2, "only {answered:?}");
        Ok(())
    })?;
    // A pod behind a Service reaches itself through it.
    let near = lab.pod("shop/near");
    for _ in 0..8 {
        near.curl_over(family, "http://web.shop.svc.cluster.local/")?;
    }
    Ok(())
}

/// Without endpoints a Service refuses at once, at each of its addresses.
fn refusal(lab: &Lab, stack: Stack) -> anyhow::Result<()> {
    let client = lab.pod("shop/client");
    workload::service(lab, "shop", "nobody", 80, 8080)?;
    for option in stack.families().iter().map(|family| if *family == Family::V4 { "-4" } else { "-6" }) {
        eventually("a Service without endpoints refuses", PATIENCE, || {
            let output = client.exec(["curl", option, "-sS", "--max-time", "3", "http://nobody/"])?;
            anyhow::ensure!(output.code == 7, "curl {option} ended with {}: {}", output.code, output.stderr);
            Ok(())
        })?;
    }
    Ok(())
}

fn names(lab: &Lab, family: Family) -> anyhow::Result<()> {
    let client = lab.pod("shop/client");
    let outside = client.curl_over(family, "http://outside.example/")?;
    let seen = format!("\"client\":\"{}\"", client.address_of(family)?);
    assert!(outside.contains("\"service\":\"outside\"") && outside.contains(&seen), "{outside}");
    let echo = std::net::SocketAddr::new(fabric::outside(family), 7).to_string();
    let echoed = client.exec_ok(["ambit-example", "datagram", &echo, "hello"])?;
    assert_eq!(echoed.trim(), "hello");
    let database = if family == Family::V4 { "ahostsv4" } else { "ahostsv6" };
    let found = client.exec_ok(["getent", database, "web"])?;
    assert!(found.contains(&lab.service_address_of(family, "shop", "web")?.to_string()), "{found}");
    assert!(!client.exec(["getent", database, "nowhere.example"])?.success());
    Ok(())
}

fn over_tcp(lab: &Lab) -> anyhow::Result<()> {
    let found = lab.pod("shop/client").exec_ok(["bash", "-c", "RES_OPTIONS=use-vc getent ahosts web"])?;
    assert!(found.contains(&lab.service_address("shop", "web")?.to_string()), "{found}");
    Ok(())
}

/// A container has the runtime's default capabilities, no more, and its own root.
fn limits(lab: &Lab) -> anyhow::Result<()> {
    let status = lab.pod("shop/client").exec_ok(["cat", "/proc/self/status"])?;
    let set = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).map(str::to_owned)
    };
    for name in ["CapBnd:", "CapEff:", "CapPrm:"] {
        assert_eq!(set(name).as_deref(), Some("00000000a80425fb"), "{name} in {status}");
    }
    let client = lab.pod("shop/client");
    assert!(!client.exec(["ls", "/root", "/home"])?.success(), "the host's files are visible");
    let token = "/var/run/secrets/kubernetes.io/serviceaccount/token";
    assert!(client.exec_ok(["cat", token])?.starts_with("ey"), "no service account token");
    let api = "https://kubernetes.default.svc/api/v1/namespaces/shop/pods";
    let ca = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
    let bearer = format!(
        "curl -sS --cacert {ca} -H \"Authorization: Bearer $(cat {token})\" -w '%{{http_code}}' -o /dev/null {api}"
    );
    assert_eq!(client.exec_ok(["bash", "-c", &bearer])?, "403", "a pod without rights may not list pods");
    Ok(())
}

fn restarts(lab: &Lab) -> anyhow::Result<()> {
    let near = lab.pod("shop/near");
    near.kill_and_wait()?;
    let sick = Workload::new("shop", "sick")
        .echo()
        .liveness(json!({ "exec": { "command": ["test", "!", "-e", "/tmp/sick"] }, "periodSeconds": 1, "failureThreshold": 1 }))
        .start(lab)?;
    sick.exec_ok(["touch", "/tmp/sick"])?;
    eventually("a container whose liveness probe fails is restarted", PATIENCE, || {
        let live = sick.live()?;
        anyhow::ensure!(live.restarts(None) == 1 && live.pid(None).is_some(), "not restarted");
        Ok(())
    })?;
    let done = Workload::new("shop", "done")
        .command(&["true"])
        .with("/spec/restartPolicy", json!("Never"))
        .create(lab)?;
    eventually("a pod that has done its work has succeeded", PATIENCE, || {
        let phase = done.object()?.status.and_then(|status| status.phase);
        anyhow::ensure!(phase.as_deref() == Some("Succeeded"), "it is {phase:?}");
        Ok(())
    })?;
    sick.signal(Signal::SIGKILL)
}

fn capture(lab: &Lab, family: Family) -> anyhow::Result<()> {
    let (client, far) = (lab.pod("shop/client"), lab.pod("shop/far"));
    let server = std::net::SocketAddr::new(far.address_of(family)?, 8080);
    let capture = lab.capture("cluster")?;
    client.curl(&format!("http://{server}/a-path-to-be-seen"))?;
    let captured = capture.stop()?;
    let flows = captured.flows_with(b"/a-path-to-be-seen");
    // The request and the answer that quotes it.
    assert_eq!(flows.len(), 2, "{flows:?}");
    assert!(flows.iter().any(|flow| flow.destination == server), "{flows:?}");
    assert!(captured.flows_with(b"never sent").is_empty());
    assert!(captured.handshakes().is_empty());
    Ok(())
}

fn deployments(lab: &Lab) -> anyhow::Result<()> {
    lab.apply_manifests("examples/payments")?;
    lab.wait_ready("payments")?;
    let gateway = lab.pod("payments/api-gateway");
    let answer = eventually("a payment is made", PATIENCE, || gateway.curl("http://api-gateway/"))?;
    assert!(answer.contains("account-service") && answer.contains("validation-service"), "{answer}");
    let rows = lab.kubectl(["get", "pods", "-n", "payments", "--no-headers"])?;
    assert_eq!(rows.lines().count(), 5, "{rows}");
    lab.kubectl(["delete", "-n", "payments", "deployment", "payment-service-v2"])?;
    eventually("its pod is gone", Duration::from_secs(60), || {
        let rows = lab.kubectl(["get", "pods", "-n", "payments", "--no-headers"])?;
        anyhow::ensure!(rows.lines().count() == 4, "{rows}");
        Ok(())
    })
}
