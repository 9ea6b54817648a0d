//! A real ztunnel in the test's process, with an agent and a certificate authority of the test's own.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, ensure};
use clap::Parser as _;
use mesh_core::pod_link::Listener;
use mesh_core::proto::pods::{self as wire, Fd};
use mesh_core::proto::workload::{self, address::Type};
use mesh_core::telemetry::Levels;
use mesh_core::test_ca::TestCa;
use node_agent::datapath::{Datapath, Listeners};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use ztunnel::app::{self, Surroundings};
use ztunnel::config::Config;

use crate::world::{Pod, World};

#[path = "../../ztunnel/tests/inproc/agent.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
pub(crate) mod agent;

use agent::{Talk, Xds, address};

/// A ztunnel that serves both pods.
pub(crate) struct Proxy {
    pub(crate) xds: Xds,
    runtime: Runtime,
    serving: JoinHandle<Result<()>>,
    shutdown: Option<oneshot::Sender<&'static str>>,
    run_dir: PathBuf,
    talk: Talk,
}

impl Proxy {
    pub(crate) fn start(world: &World, datapath: &Datapath, listeners: &[Listeners]) -> Result<Self> {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let run_dir = std::env::temp_dir().join(format!("ambit-proxy-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&run_dir)?;
        let status = "127.0.0.1:0";
        let config = Config::try_parse_from([
            "ztunnel".to_owned(),
            "--node-name=node".to_owned(),
            format!("--run-dir={}", run_dir.display()),
            format!("--admin-address={status}"),
            format!("--metrics-address={status}"),
            format!("--readiness-address={status}"),
            "--drain-deadline=60".to_owned(),
            // What the proxy can do is asked here, not what a pod may.
            "--max-pod-dns-queries=1000000".to_owned(),
        ])?;
        let runtime = Runtime::new()?;
        let _inside = runtime.enter();
        let agent = Listener::bind(&run_dir.join("pods.sock"))?;
        let xds = Xds::new();
        xds.put([&world.a, &world.b].map(|pod| address(resource(pod))));
        xds.serve(&run_dir.join("xds.sock"));
        let mut surroundings = Surroundings::real(&config, Levels::fixed("info"))?;
        surroundings.authority = Arc::new(TestCa::new());
        let (shutdown, signal) = oneshot::channel();
        let serving =
            runtime.spawn(app::run(config, surroundings, async { signal.await.unwrap_or("dropped") }));
        let talk = runtime.block_on(async {
            let (mut talk, _) = Talk::accept(&agent).await;
            talk.welcome_with(Some(datapath.skproxy_map().try_clone_to_owned()?)).await;
            for (pod, listeners) in [&world.a, &world.b].into_iter().zip(listeners) {
                let error = talk.add(describe(pod), descriptors(pod, listeners)?).await;
                ensure!(error.is_empty(), "{error}");
            }
            talk.snapshot_end().await;
            Ok(talk)
        })?;
        Ok(Self { xds, runtime, serving, shutdown: Some(shutdown), run_dir, talk })
    }

    /// From now on it takes no connections, and goes on with those that it has.
    pub(crate) fn drain(&mut self) -> Result<()> {
        let shutdown = self.shutdown.take().context("it drains already")?;
        shutdown.send("SIGTERM").ok().context("ztunnel has ended")?;
        self.runtime.block_on(self.talk.draining());
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.serving.abort();
        // Ends when the last descriptor inside the pods is closed.
        let _ = self.runtime.block_on(&mut self.serving);
        let _ = std::fs::remove_dir_all(&self.run_dir);
    }
}

fn descriptors(pod: &Pod, listeners: &Listeners) -> Result<Vec<(Fd, OwnedFd)>> {
    let sockets = [
        (Fd::OutboundV4, Some(&listeners.outbound_v4)),
        (Fd::InboundV4, Some(&listeners.inbound_v4)),
        (Fd::HboneV4, Some(&listeners.hbone_v4)),
        (Fd::OutboundV6, listeners.outbound_v6.as_ref()),
        (Fd::InboundV6, listeners.inbound_v6.as_ref()),
        (Fd::HboneV6, listeners.hbone_v6.as_ref()),
        (Fd::DnsV4, listeners.dns_v4.as_ref()),
        (Fd::DnsV6, listeners.dns_v6.as_ref()),
    ];
    let mut all = vec![(Fd::Netns, pod.netns.descriptor()?)];
    for (name, socket) in sockets {
        if let Some(socket) = socket {
            all.push((name, socket.as_fd().try_clone_to_owned()?));
        }
    }
    Ok(all)
}

fn addresses(pod: &Pod) -> Vec<Vec<u8>> {
    vec![pod.v4.octets().to_vec(), pod.v6.octets().to_vec()]
}

fn describe(pod: &Pod) -> wire::Pod {
    wire::Pod {
        uid: pod.uid.clone(),
        namespace: "shop".to_owned(),
        name: pod.uid.clone(),
        addresses: addresses(pod),
        workload_uid: format!("Kubernetes//Pod/shop/{}", pod.uid),
        trust_domain: "cluster.local".to_owned(),
        ..Default::default()
    }
}

fn resource(pod: &Pod) -> Type {
    Type::Workload(workload::Workload {
        uid: format!("Kubernetes//Pod/shop/{}", pod.uid),
        name: pod.uid.clone(),
        namespace: "shop".to_owned(),
        addresses: addresses(pod),
        tunnel_protocol: workload::TunnelProtocol::Hbone as i32,
        ..Default::default()
    })
}
