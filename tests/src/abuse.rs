//! What each way of flooding a pod's tunnel port costs the proxy, and other pods of the same proxy.
//!
//! The attacker has a certificate of the mesh and a pod outside of it (from within, a pod reaches no tunnel port by
//! itself), and is a thread of this process with sockets in that pod. It takes a processor of this machine for itself;
//! so each attack is compared with a thread that does nothing but that.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_core::test_http2::{self as http2, ATTACKS, Attack, STALLED};
use serde::Serialize;
use serde_json::Value;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::demo::progress;
use crate::kubelet::Live;
use crate::lab::PodRef;
use crate::peer::{self, Authority, Credentials};
use crate::workload::Workload;
use crate::{Lab, eventually};

#[derive(Debug, clap::Args)]
pub struct Config {
    /// Connections of the victim's client in each measurement, one after the other.
    #[arg(long, default_value_t = 2000)]
    connections: usize,
    /// Tunnels of the attacker at a time.
    #[arg(long, default_value_t = 8)]
    tunnels: usize,
    /// Only attacks with this in their name.
    #[arg(long, default_value = "")]
    only: String,
    /// Fail where p99 is more than so many times what it is beside a busy thread.
    #[arg(long)]
    at_most: Option<f64>,
    /// Print the result as one JSON object; progress goes to stderr.
    #[arg(long)]
    json: bool,
}

/// More than a client waits for its next tunnel after it was sent away.
const SENT_AWAY: Duration = Duration::from_secs(60);

/// Until all tunnels of an attack, and the connections in them, are open: what is measured is what goes on.
const LEAD: Duration = Duration::from_secs(1);

/// One attack.
#[derive(Debug, Serialize)]
struct Row {
    attack: &'static str,
    /// Connect to first byte, of a client of another pod: in microseconds.
    p50_us: f64,
    p99_us: f64,
    /// To the measurement beside a busy thread.
    ratio: f64,
    /// Processors that the attacked pod's proxy was busy on.
    cpu: f64,
    /// Processors that the attacked application was busy on.
    application: f64,
    /// Memory of that proxy while the attack goes on.
    rss_mib: f64,
    /// Tunnels that the attacker has opened, a second.
    opened: f64,
}

/// What a thread of this process does meanwhile.
#[derive(Clone, Copy)]
enum Against {
    /// It sleeps.
    Nothing,
    /// It is busy.
    Nobody,
    /// Connections that say nothing.
    Silence,
    /// TLS handshakes, and no more.
    Handshakes,
    Frames(&'static Attack),
}

impl Against {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "no attack",
            Self::Nobody => "no attack, a busy thread",
            Self::Silence => "connections that say nothing",
            Self::Handshakes => "handshakes",
            Self::Frames(attack) => attack.name,
        }
    }
}

/// Everything of the lab that a measurement needs.
struct Scene<'a> {
    lab: &'a Lab,
    victim: PodRef<'a>,
    target: PodRef<'a>,
    echo: String,
    attacker: Arc<Attacker>,
}

/// Sockets and certificate of an attacker.
struct Attacker {
    pod: Arc<Live>,
    credentials: Credentials,
    target: SocketAddr,
    tunnels: usize,
    opened: AtomicU64,
}

/// Measures every attack.
pub fn run(config: &Config) -> anyhow::Result<ExitCode> {
    progress("starting a cluster of two nodes with the mesh");
    let lab = Lab::new().nodes(2).mesh().start()?;
    lab.namespace("abuse", &[("istio.io/dataplane-mode", "ambient")])?;
    lab.namespace("outside", &[])?;
    let attacker = Workload::new("outside", "attacker").on_node(1).start(&lab)?;
    let target = Workload::new("abuse", "target").echo().on_node(2).start(&lab)?;
    let victim = Workload::new("abuse", "client").on_node(1).start(&lab)?;
    let echo = Workload::new("abuse", "echo").echo().on_node(2).start(&lab)?;
    let scene = Scene {
        lab: &lab,
        victim,
        echo: format!("{}:7000", echo.address()?),
        attacker: Arc::new(Attacker {
            pod: attacker.live()?,
            credentials: Authority::of_the_mesh(&lab)?.issue("spiffe://cluster.local/ns/abuse/sa/default")?,
            target: (target.address()?, 15008).into(),
            tunnels: config.tunnels,
            opened: AtomicU64::new(0),
        }),
        target,
    };
    // Tunnels, certificates and caches are warm.
    scene.latency(config.connections / 4 + 1)?;
    let frames = ATTACKS.iter().chain([&STALLED]).map(Against::Frames);
    let all = [Against::Silence, Against::Handshakes].into_iter().chain(frames);
    let chosen = all.filter(|against| against.name().contains(&config.only));
    let mut rows: Vec<Row> = Vec::new();
    for against in [Against::Nothing, Against::Nobody].into_iter().chain(chosen) {
        progress(against.name());
        let mut row = scene.measure(against, config.connections)?;
        row.ratio = row.p99_us / rows.get(1).map_or(row.p99_us, |busy| busy.p99_us);
        rows.push(row);
    }
    if config.json {
        println!("{}", serde_json::to_string(&rows)?);
    } else {
        print(&rows);
    }
    let most = config.at_most.unwrap_or(f64::INFINITY);
    let mut over = rows.iter().skip(2).filter(|row| row.ratio > most).peekable();
    if over.peek().is_none() {
        return Ok(ExitCode::SUCCESS);
    }
    over.for_each(|row| eprintln!("{}: {:.2} times, more than {most}", row.attack, row.ratio));
    Ok(ExitCode::FAILURE)
}

fn print(rows: &[Row]) {
    println!(
        "connect to first byte through the mesh, of a client and a server that are not attacked; the proxy"
    );
    println!("is the server's. The ratio is that of p99 to the one beside a busy thread.");
    println!(
        "{:<30} {:>8} {:>8} {:>6} {:>5} {:>5} {:>8} {:>8}",
        "attack", "p50 us", "p99 us", "ratio", "CPU", "app", "RSS MiB", "opened/s"
    );
    for row in rows {
        println!(
            "{:<30} {:>8.0} {:>8.0} {:>6.2} {:>5.2} {:>5.2} {:>8.1} {:>8.1}",
            row.attack, row.p50_us, row.p99_us, row.ratio, row.cpu, row.application, row.rss_mib, row.opened
        );
    }
}

impl Scene<'_> {
    fn measure(&self, against: Against, connections: usize) -> anyhow::Result<Row> {
        let (stop, begun) = (CancellationToken::new(), Instant::now());
        self.attacker.opened.store(0, Ordering::Relaxed);
        let thread = {
            let (attacker, stop) = (self.attacker.clone(), stop.clone());
            std::thread::spawn(move || attacker.run(against, &stop))
        };
        let opened = || self.attacker.opened.load(Ordering::Relaxed);
        if !matches!(against, Against::Nothing | Against::Nobody) {
            // Who was sent away for the last attack has to wait.
            let begins =
                eventually(&format!("{}: the attacker has a tunnel", against.name()), SENT_AWAY, || {
                    anyhow::ensure!(opened() > 0, "none was accepted");
                    Ok(())
                });
            if begins.is_err() {
                stop.cancel();
            }
            begins?;
            std::thread::sleep(LEAD);
        }
        let pid = self.lab.daemon("ztunnel", 2).live()?.pid(None).context("ztunnel does not run")?;
        let application = self.target.live()?.pid(None).context("the attacked application does not run")?;
        let both = || anyhow::Ok([busy_seconds(pid)?, busy_seconds(application)?]);
        let (began, before) = (Instant::now(), both()?);
        let latency = self.latency(connections);
        let seconds = began.elapsed().as_secs_f64();
        let (after, rss_mib) = (both()?, resident_mib(pid)?);
        let [cpu, application] = [0, 1].map(|of| (after[of] - before[of]) / seconds);
        #[expect(clippy::cast_precision_loss, reason = "a count of tunnels")]
        let opened = opened() as f64 / begun.elapsed().as_secs_f64();
        stop.cancel();
        thread.join().map_err(|_| anyhow::anyhow!("the attacker has panicked"))??;
        let latency = latency.with_context(|| format!("under attack: {}", against.name()))?;
        let time = |name: &str| latency["first_byte"][name].as_f64().context("no percentile");
        Ok(Row {
            attack: against.name(),
            p50_us: time("p50")?,
            p99_us: time("p99")?,
            ratio: 1.0,
            cpu,
            application,
            rss_mib,
            opened,
        })
    }

    fn latency(&self, connections: usize) -> anyhow::Result<Value> {
        let count = format!("--count={connections}");
        let told = self.victim.exec_ok(["ambit-example", "latency", &self.echo, &count])?;
        serde_json::from_str(&told).context("read the latencies")
    }
}

impl Attacker {
    fn run(self: Arc<Self>, against: Against, stop: &CancellationToken) -> anyhow::Result<()> {
        if let Against::Nobody = against {
            while !stop.is_cancelled() {
                std::hint::spin_loop();
            }
            return Ok(());
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut tunnels = JoinSet::new();
            let parallel = match against {
                Against::Nothing => 0,
                Against::Silence => 512,
                _ => self.tunnels,
            };
            for _ in 0..parallel {
                let (attacker, stop) = (self.clone(), stop.clone());
                tunnels.spawn(async move {
                    while !stop.is_cancelled() {
                        tokio::select! {
                            () = stop.cancelled() => break,
                            // What the server refuses is tried again.
                            _ = attacker.once(against) => {}
                        }
                    }
                });
            }
            stop.cancelled().await;
            while tunnels.join_next().await.is_some() {}
        });
        Ok(())
    }

    async fn once(&self, against: Against) -> anyhow::Result<()> {
        let netns = self.pod.netns().context("the attacker has no network")?;
        let connect = || Ok(std::net::TcpStream::connect_timeout(&self.target, Duration::from_secs(5))?);
        let socket = netns.run(connect)?;
        socket.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(socket)?;
        if let Against::Silence = against {
            self.opened.fetch_add(1, Ordering::Relaxed);
            let _ended = stream.read(&mut [0]).await;
            return Ok(());
        }
        let tls = peer::tls(stream, &self.credentials).await?;
        self.opened.fetch_add(1, Ordering::Relaxed);
        if let Against::Frames(attack) = against {
            let authority = format!("{}:7000", self.target.ip());
            http2::flood(tls, attack, &authority, u32::MAX).await?;
        }
        Ok(())
    }
}

/// Of all threads of a process so far (proc_pid_stat(5), fields 14 and 15).
fn busy_seconds(pid: i32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(") ").context("a name in stat")?.1;
    let ticks: f64 =
        after_name.split(' ').skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    // USER_HZ, which is 100 on every Linux that is built today.
    Ok(ticks / 100.0)
}

fn resident_mib(pid: i32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().next().context("an empty VmRSS")?.parse()?;
    Ok(kib / 1024.0)
}
