//! The lab itself, without the mesh: it has to behave as a cluster does before anything else can be said.

use std::time::Duration;

use mesh_tests::lab::PATIENCE;
use mesh_tests::workload::{self, Workload};
use mesh_tests::{Lab, eventually};
use nix::sys::signal::Signal;
use serde_json::json;

/// Pods, Services, DNS, probes, restarts and the fabric in one lab: starting one takes longer than any of these.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn behaves_as_a_cluster() -> anyhow::Result<()> {
    let lab = Lab::new().nodes(2).start()?;
    lab.namespace("shop", &[])?;
    let client = Workload::new("shop", "client").on_node(1).create(&lab)?;
    let near = Workload::new("shop", "near").on_node(1).serve().label("app", "web").create(&lab)?;
    let far = Workload::new("shop", "far").on_node(2).serve().label("app", "web").create(&lab)?;
    workload::service(&lab, "shop", "web", 80, 8080)?;
    for pod in [&client, &near, &far] {
        pod.ready()?;
    }
    services(&lab)?;
    names(&lab)?;
    limits(&lab)?;
    restarts(&lab)?;
    capture(&lab)?;
    deployments(&lab)
}

fn services(lab: &Lab) -> anyhow::Result<()> {
    let client = lab.pod("shop/client");
    let address = client.address()?.to_string();
    let mut answered = std::collections::BTreeSet::new();
    eventually("both endpoints answer through the Service", PATIENCE, || {
        let answer: serde_json::Value = serde_json::from_str(&client.curl("http://web/")?)?;
        anyhow::ensure!(answer["client"] == address.as_str(), "the server saw {}", answer["client"]);
        answered.insert(answer["service"].to_string());
        anyhow::ensure!(answered.len() == 2, "only {answered:?}");
        Ok(())
    })?;
    // A pod behind a Service reaches itself through it.
    let near = lab.pod("shop/near");
    for _ in 0..8 {
        near.curl("http://web.shop.svc.cluster.local/")?;
    }
    // Without endpoints it refuses at once.
    workload::service(lab, "shop", "nobody", 80, 8080)?;
    eventually("a Service without endpoints refuses", PATIENCE, || {
        let output = client.exec(["curl", "-sS", "--max-time", "3", "http://nobody/"])?;
        anyhow::ensure!(output.code == 7, "curl ended with {}: {}", output.code, output.stderr);
        Ok(())
    })
}

fn names(lab: &Lab) -> anyhow::Result<()> {
    let client = lab.pod("shop/client");
    let outside = client.curl("http://outside.example/")?;
    assert!(outside.contains("\"service\":\"outside\""), "{outside}");
    let echoed = client.exec_ok(["ambit-example", "datagram", "outside.example:7", "hello"])?;
    assert_eq!(echoed.trim(), "hello");
    assert!(!client.exec(["getent", "hosts", "nowhere.example"])?.success());
    let over_tcp = client.exec_ok(["bash", "-c", "RES_OPTIONS=use-vc getent ahostsv4 web"])?;
    assert!(over_tcp.contains(&lab.service_address("shop", "web")?.to_string()), "{over_tcp}");
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

fn capture(lab: &Lab) -> anyhow::Result<()> {
    let (client, far) = (lab.pod("shop/client"), lab.pod("shop/far"));
    let capture = lab.capture("cluster")?;
    client.curl(&format!("http://{}:8080/a-path-to-be-seen", far.address()?))?;
    let captured = capture.stop()?;
    let flows = captured.flows_with(b"/a-path-to-be-seen");
    // The request and the answer that quotes it.
    assert_eq!(flows.len(), 2, "{flows:?}");
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
