//! Programs that people run, client and server in captured pods on two nodes: HTTP/2 with many streams, bulk in both
//! directions, a database with connections that stay, and a server that speaks before its client does.

use std::time::Duration;

use mesh_tests::lab::PodRef;
use mesh_tests::workload::{self, Workload};
use mesh_tests::{Lab, eventually};

use crate::fixture::{SOON, log_end, log_line};
use crate::shared::scenario;

const NAMESPACE: &str = "programs";
const CLIENT: &str = "spiffe://cluster.local/ns/mesh/sa/client";

/// A server in a captured pod on node 2, for mesh/client on node 1; its namespace is gone at the end.
struct Server<'a> {
    lab: &'a Lab,
    client: PodRef<'a>,
    pod: PodRef<'a>,
    address: String,
    port: u16,
    /// Where the log of its node ended before.
    end: usize,
}

impl<'a> Server<'a> {
    /// The script ends in the server.
    fn start(lab: &'a Lab, script: &str, port: u16) -> anyhow::Result<Self> {
        lab.namespace(NAMESPACE, &[("istio.io/dataplane-mode", "ambient")])?;
        workload::service_account(lab, NAMESPACE, "server")?;
        let pod = Workload::new(NAMESPACE, "server").service_account("server").on_node(2);
        let pod = pod.command(&["bash", "-ec", script]).start(lab)?;
        pod.captured()?;
        let client = lab.pod("mesh/client");
        let (address, end) = (pod.address()?.to_string(), log_end(lab, 2)?);
        let server = Self { lab, client, pod, address, port, end };
        eventually("the server accepts", SOON, || {
            let dial = format!("exec 3<>/dev/tcp/127.0.0.1/{port}");
            server.pod.exec_ok(["bash", "-c", &dial])
        })?;
        Ok(server)
    }

    /// The client's script, in which `$IP` is the server; what it wrote.
    fn asked_by(&self, script: &str) -> anyhow::Result<String> {
        self.client.exec_ok(["bash", "-ec", &format!("set -o pipefail; IP={}; {script}", self.address)])
    }

    /// The connections were the mesh's.
    fn tunnelled(&self) -> anyhow::Result<()> {
        let address = format!("dst.addr={}:{}", self.address, self.port);
        log_line(self.lab, 2, self.end, &["inbound", CLIENT, &address, "connection complete"]).map(drop)
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = self.lab.kubectl(["delete", "namespace", NAMESPACE, "--wait=true"]);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn http2_with_many_streams() {
    scenario(|lab| {
        let script = "mkdir /tmp/www; head -c 10000 /dev/urandom > /tmp/www/blob; \
                      exec nghttpd --no-tls -d /tmp/www 9000";
        let server = Server::start(lab, script, 9000)?;
        let version = server.asked_by(
            "curl -sS --fail --max-time 10 --http2-prior-knowledge -o /tmp/blob -w '%{http_version} %{size_download}' \
             http://$IP:9000/blob",
        )?;
        assert_eq!(version, "2 10000");
        let told = server.asked_by("h2load -n 5000 -c 20 -m 10 http://$IP:9000/blob")?;
        let all =
            "requests: 5000 total, 5000 started, 5000 done, 5000 succeeded, 0 failed, 0 errored, 0 timeout";
        assert!(told.contains(all), "{told}");
        server.tunnelled()
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn bulk_in_both_directions() {
    scenario(|lab| {
        let server = Server::start(lab, "exec iperf3 --server --port 9001", 9001)?;
        for direction in ["", "--reverse", "--bidir"] {
            let line =
                format!("iperf3 --client $IP --port 9001 --bytes 200M --parallel 4 --json {direction}");
            // The server takes one test at a time, and may still be ending the one before.
            let told = eventually("the server takes the test", SOON, || server.asked_by(&line))?;
            let told: serde_json::Value = serde_json::from_str(&told)?;
            let received = &told["end"]["sum_received"]["bytes"];
            assert!(received.as_u64().is_some_and(|bytes| bytes >= 150_000_000), "{direction}: {received}");
        }
        server.tunnelled()
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_database_and_a_connection_that_waits() {
    scenario(|lab| {
        // Debian's package of the server would start one on this machine; the program is the same, and goes by its name.
        let script =
            "exec -a redis-server redis-check-rdb --port 9002 --bind '*' --protected-mode no --save ''";
        let server = Server::start(lab, script, 9002)?;
        let mut listening =
            server.client.spawn(["redis-cli", "-h", &server.address, "-p", "9002", "subscribe", "news"])?;
        listening.wait_for("subscribe", SOON)?;
        let told = server.asked_by("redis-benchmark -h $IP -p 9002 -n 5000 -c 50 -P 4 -t set,get -q")?;
        assert_eq!(told.matches("requests per second").count(), 2, "{told}");
        let same = "head -c 20000000 /dev/urandom > /tmp/value; R=\"redis-cli -h $IP -p 9002\"; \
                    $R -x set value < /tmp/value; $R strlen value; \
                    $R get value | head -c 20000000 | cmp - /tmp/value; rm /tmp/value";
        let told = server.asked_by(same)?;
        assert!(told.contains("20000000"), "{told}");
        // Nothing was sent on it meanwhile.
        server.asked_by("redis-cli -h $IP -p 9002 publish news 'still there'")?;
        listening.wait_for("still there", SOON)?;
        assert!(listening.runs()?, "{}", listening.output());
        listening.finish()?;
        server.tunnelled()
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_server_that_speaks_first() {
    scenario(|lab| {
        let script = "mkdir -p ~/.ssh; echo /bin/bash > /etc/shells; dropbearkey -t ed25519 -f /tmp/host; \
                      exec dropbear -F -E -s -r /tmp/host -p 9003";
        let server = Server::start(lab, script, 9003)?;
        let first =
            server.asked_by("exec 3<>/dev/tcp/$IP/9003; IFS= read -r -t 10 -u 3 line; echo \"$line\"")?;
        assert!(first.starts_with("SSH-2.0-dropbear"), "{first}");
        let key = server.asked_by("dropbearkey -t ed25519 -f /tmp/key | grep ^ssh-ed25519")?;
        let trust = format!("echo '{}' > ~/.ssh/authorized_keys", key.trim());
        server.pod.exec_ok(["bash", "-ec", &trust])?;
        let session = "head -c 5000000 /dev/urandom > /tmp/sent; \
                       dbclient -y -y -i /tmp/key -p 9003 root@$IP cat < /tmp/sent | cmp - /tmp/sent; \
                       rm /tmp/sent /tmp/key; echo same";
        let told = eventually("the session", Duration::from_secs(30), || server.asked_by(session))?;
        assert!(told.ends_with("same\n"), "{told}");
        server.tunnelled()
    });
}
