//! A small mesh: pods `client` and `server`, a service in front of each, one ztunnel for both.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::Parser;
use mesh_core::addr::{ClientAddr, NextHop, Target};
use mesh_core::pod_link::Listener;
use mesh_core::proto::pods::{self as wire, Fd};
use mesh_core::proto::workload::{self, address::Type};
use mesh_core::telemetry::Levels;
use mesh_core::test_ca::TestCa;
use socket2::{Domain, Socket};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use ztunnel::app::{self, Surroundings};
use ztunnel::config::Config;
use ztunnel::descriptors::Descriptors;
use ztunnel::sockets::{Datagrams, FlagMap, Sockets};

use crate::agent::{Talk, Xds, address};
use crate::logs;

/// Port of the applications.
pub(crate) const APP: u16 = 8080;
/// Port of the services.
pub(crate) const SERVICE: u16 = 8000;

/// How many the connections of all worlds of this process may have; without a limit by default.
pub(crate) static DESCRIPTORS: OnceLock<Descriptors> = OnceLock::new();

pub(crate) struct World {
    pub(crate) ca: Arc<TestCa>,
    pub(crate) agent: Listener,
    pub(crate) talk: Option<Talk>,
    pub(crate) xds: Xds,
    pub(crate) ztunnel: JoinHandle<anyhow::Result<()>>,
    pub(crate) shutdown: Option<oneshot::Sender<&'static str>>,
    net: [u8; 2],
    run_dir: PathBuf,
    /// What the agent keeps of each listener.
    pub(crate) kept: Vec<(String, Vec<(Fd, OwnedFd)>)>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.ztunnel.abort();
        let _ = std::fs::remove_dir_all(&self.run_dir);
    }
}

/// A pod of the test: name and the last byte of its address.
#[derive(Clone, Copy)]
pub(crate) struct TestPod {
    pub(crate) name: &'static str,
    pub(crate) last: u8,
}

pub(crate) const CLIENT: TestPod = TestPod { name: "client", last: 10 };
pub(crate) const SERVER: TestPod = TestPod { name: "server", last: 20 };
/// For tests that want another server.
pub(crate) const SECOND: TestPod = TestPod { name: "second", last: 30 };

impl TestPod {
    pub(crate) fn uid(self) -> String {
        format!("uid-{}", self.name)
    }

    pub(crate) fn workload_uid(self) -> String {
        format!("Kubernetes//Pod/shop/{}", self.name)
    }

    pub(crate) fn identity(self) -> String {
        format!("spiffe://cluster.local/ns/shop/sa/{}", self.name)
    }
}

impl World {
    /// Both pods served, the mesh known, ztunnel ready.
    pub(crate) async fn new() -> Self {
        Self::with(&[]).await
    }

    /// The same with more on ztunnel's command line.
    pub(crate) async fn with(arguments: &[&str]) -> Self {
        let world = Self::unready_with(arguments).await;
        world.ready().await;
        world
    }

    /// The same without waiting until ztunnel is ready.
    pub(crate) async fn unready_with(arguments: &[&str]) -> Self {
        let world = Self::start(arguments).await;
        world.xds.put(world.mesh().into_iter().map(address));
        world.told_of(&[CLIENT, SERVER]).await
    }

    /// These pods served and ztunnel ready, with a mesh as it was told so far.
    pub(crate) async fn with_pods(self, pods: &[TestPod]) -> Self {
        let world = self.told_of(pods).await;
        world.ready().await;
        world
    }

    async fn told_of(mut self, pods: &[TestPod]) -> Self {
        self.xds.serve(&self.run_dir.join("xds.sock"));
        let (mut talk, hello) = Talk::accept(&self.agent).await;
        assert_eq!((hello.min_version, hello.max_version), (2, 3));
        assert!(talk.welcome().await.is_empty());
        for pod in pods {
            let fds = self.listeners(*pod).await;
            assert_eq!(talk.add(self.describe(*pod), fds).await, "");
        }
        assert!(!self.is_ready().await, "ready before the snapshot is whole");
        talk.snapshot_end().await;
        self.talk = Some(talk);
        self
    }

    /// A ztunnel that waits for its agent's pods.
    pub(crate) async fn without_pods() -> Self {
        let world = Self::without_mesh().await;
        world.serve_mesh();
        world
    }

    /// Tells the mesh to ztunnel.
    pub(crate) fn serve_mesh(&self) {
        self.xds.put(self.mesh().into_iter().map(address));
        self.xds.serve(&self.run_dir.join("xds.sock"));
    }

    /// A ztunnel that waits for its agent's pods, and for the mesh until [`World::serve_mesh`].
    pub(crate) async fn without_mesh() -> Self {
        Self::start(&[]).await
    }

    async fn start(arguments: &[&str]) -> Self {
        logs::start();
        let net = own_net();
        let run_dir =
            std::env::temp_dir().join(format!("ambit-inproc-{}-{}-{}", std::process::id(), net[0], net[1]));
        std::fs::create_dir_all(&run_dir).unwrap();
        let agent = Listener::bind(&run_dir.join("pods.sock")).unwrap();
        let ca = Arc::new(TestCa::new());
        let (shutdown, signal) = oneshot::channel();
        let address = |port: u16| format!("127.{}.{}.1:{port}", net[0], net[1]);
        let own = [
            "ztunnel",
            "--node-name=node-1",
            &format!("--run-dir={}", run_dir.display()),
            &format!("--admin-address={}", address(15000)),
            &format!("--metrics-address={}", address(15020)),
            &format!("--readiness-address={}", address(15021)),
        ];
        let config = Config::parse_from(own.iter().chain(arguments).chain(
            (!arguments.iter().any(|given| given.starts_with("--drain"))).then_some(&"--drain-deadline=30"),
        ));
        let surroundings = Surroundings {
            authority: ca.clone(),
            open_pod: Arc::new(open_pod),
            descriptors: DESCRIPTORS.get().cloned().unwrap_or_else(Descriptors::without_limit),
            resolve: Arc::new(resolve),
            levels: Levels::fixed("info"),
        };
        let ztunnel =
            tokio::spawn(app::run(config, surroundings, async { signal.await.unwrap_or("dropped") }));
        let (talk, xds, shutdown, kept) = (None, Xds::new(), Some(shutdown), Vec::new());
        Self { ca, agent, talk, xds, ztunnel, shutdown, net, run_dir, kept }
    }

    pub(crate) fn ip(&self, last: u8) -> IpAddr {
        Ipv4Addr::new(127, self.net[0], self.net[1], last).into()
    }

    pub(crate) fn pod_ip(&self, pod: TestPod) -> IpAddr {
        self.ip(pod.last)
    }

    /// Address of the service in front of a pod.
    pub(crate) fn vip(&self, pod: TestPod) -> SocketAddr {
        (self.ip(pod.last + 100), SERVICE).into()
    }

    /// An address that no resource names.
    pub(crate) fn outside(&self) -> SocketAddr {
        (self.ip(200), SERVICE).into()
    }

    /// The DNS server that a pod asks; its queries come in there, too.
    pub(crate) fn nameserver(&self, pod: TestPod) -> SocketAddr {
        (self.ip(pod.last + 50), 5353).into()
    }

    pub(crate) fn tunnel_address(&self, pod: TestPod) -> SocketAddr {
        (self.pod_ip(pod), 15008).into()
    }

    /// Connects as the pod's application would, from the pod's address.
    pub(crate) async fn dial(&self, from: TestPod, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((self.pod_ip(from), 0).into())?;
        socket.connect(to).await
    }

    /// The server's application: tells each client its address in a line, then echoes.
    pub(crate) async fn application(&self, pod: TestPod) -> JoinHandle<()> {
        let listener = TcpListener::bind((self.pod_ip(pod), APP)).await.unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, client)) = listener.accept().await {
                tokio::spawn(async move {
                    stream.write_all(format!("{}\n", client.ip()).as_bytes()).await.unwrap();
                    let (mut reader, mut writer) = stream.split();
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        })
    }

    pub(crate) fn describe(&self, pod: TestPod) -> wire::Pod {
        let IpAddr::V4(ip) = self.pod_ip(pod) else { unreachable!() };
        wire::Pod {
            uid: pod.uid(),
            namespace: "shop".into(),
            name: pod.name.into(),
            service_account: pod.name.into(),
            addresses: vec![ip.octets().to_vec()],
            workload_uid: pod.workload_uid(),
            trust_domain: "cluster.local".into(),
            node: "node-1".into(),
            cluster_id: "Kubernetes".into(),
            workload_name: format!("{}-deployment", pod.name),
            canonical_name: pod.name.into(),
            canonical_revision: "v1".into(),
            ..Default::default()
        }
    }

    /// Opens a pod's listeners as the agent would, and keeps copies. A client's outbound listener is there once for
    /// each address that it dials; the protocol has one, so the rest take the places of the IPv6 ones.
    pub(crate) async fn listeners(&mut self, pod: TestPod) -> Vec<(Fd, OwnedFd)> {
        let listen = async |address: SocketAddr| -> OwnedFd {
            TcpListener::bind(address).await.unwrap().into_std().unwrap().into()
        };
        // Each pod dials the other's service, and its own.
        let (outbound, own) = match pod.name {
            "client" => (self.vip(SERVER), self.vip(CLIENT)),
            "server" => ((self.ip(pod.last + 1), SERVICE).into(), self.outside()),
            _ => ((self.ip(pod.last + 1), SERVICE).into(), (self.ip(pod.last + 2), SERVICE).into()),
        };
        let fds = vec![
            (Fd::Netns, self.netns(pod)),
            (Fd::OutboundV4, listen(outbound).await),
            (Fd::OutboundV6, listen(own).await),
            (Fd::InboundV4, listen((self.pod_ip(pod), 8999).into()).await),
            (Fd::HboneV4, listen(self.tunnel_address(pod)).await),
            (Fd::DnsV4, datagrams(self.nameserver(pod)).unwrap().into()),
        ];
        let copies = fds.iter().map(|(kind, fd)| (*kind, fd.try_clone().unwrap())).collect();
        self.kept.push((pod.uid(), copies));
        fds
    }

    /// Stands for the pod's namespace: a file with its address.
    fn netns(&self, pod: TestPod) -> OwnedFd {
        let path = self.run_dir.join(format!("netns-{}", pod.name));
        write!(File::create(&path).unwrap(), "{}", self.pod_ip(pod)).unwrap();
        File::open(path).unwrap().into()
    }

    fn mesh(&self) -> Vec<Type> {
        [CLIENT, SERVER].into_iter().flat_map(|pod| [self.workload(pod), self.service(pod)]).collect()
    }

    /// A pod as the mesh is told of it.
    pub(crate) fn workload(&self, pod: TestPod) -> Type {
        Type::Workload(workload::Workload {
            uid: pod.workload_uid(),
            name: pod.name.into(),
            namespace: "shop".into(),
            service_account: pod.name.into(),
            addresses: vec![octets(self.pod_ip(pod))],
            tunnel_protocol: workload::TunnelProtocol::Hbone as i32,
            canonical_name: pod.name.into(),
            canonical_revision: "v1".into(),
            workload_name: format!("{}-deployment", pod.name),
            services: [(format!("shop/{}.local", pod.name), workload::PortList::default())].into(),
            ..Default::default()
        })
    }

    /// The service in front of it.
    pub(crate) fn service(&self, pod: TestPod) -> Type {
        let address = octets(self.vip(pod).ip());
        let port = workload::Port { service_port: SERVICE.into(), target_port: APP.into(), app_protocol: 0 };
        Type::Service(workload::Service {
            name: pod.name.into(),
            namespace: "shop".into(),
            hostname: format!("{}.local", pod.name),
            addresses: vec![workload::NetworkAddress { address, ..Default::default() }],
            ports: vec![port],
            ..Default::default()
        })
    }

    pub(crate) async fn ready(&self) {
        eventually("ztunnel is ready", async || self.is_ready().await).await;
    }

    /// Waits until ztunnel says that this is what it is not ready for.
    pub(crate) async fn not_ready_for(&self, what: &str) {
        let told = async || self.get(15021, "/healthz/ready").await;
        eventually(what, async || told().await.contains(what)).await;
        assert!(told().await.starts_with("HTTP/1.1 503"));
    }

    pub(crate) async fn is_ready(&self) -> bool {
        self.get(15021, "/healthz/ready").await.starts_with("HTTP/1.1 200")
    }

    /// The sum of a metric's lines that have all these labels.
    pub(crate) async fn metric(&self, name: &str, labels: &[&str]) -> u64 {
        let text = self.get(15020, "/metrics").await;
        text.lines()
            .filter(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
            .sum()
    }

    pub(crate) async fn dump(&self) -> serde_json::Value {
        let text = self.get(15000, "/config_dump").await;
        serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
    }

    async fn get(&self, port: u16, path: &str) -> String {
        get((self.ip(1), port).into(), path).await
    }

    /// Waits for an access-log line about these addresses that has all of `parts`.
    pub(crate) async fn logged(&self, parts: &[&str]) {
        let net = format!("127.{}.{}.", self.net[0], self.net[1]);
        let all = |line: &str| line.contains(&net) && parts.iter().all(|part| line.contains(part));
        eventually(&format!("a log line with {parts:?}"), async || logs::any(all)).await;
    }
}

/// What an HTTP server answers; nothing if nobody listens.
pub(crate) async fn get(at: SocketAddr, path: &str) -> String {
    let Ok(mut stream) = TcpStream::connect(at).await else { return String::new() };
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// The middle of 127.x.y.z, another for each world of this process; other processes begin elsewhere.
fn own_net() -> [u8; 2] {
    const FIRST: u16 = 16 << 8;
    const NETS: u16 = (250 << 8) - FIRST;
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    let next = NEXT.get_or_init(|| AtomicU16::new(rand::random())).fetch_add(1, Ordering::Relaxed);
    (FIRST + next % NETS).to_be_bytes()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Polls until the condition holds; panics when it does not for ten seconds.
pub(crate) async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let mut look = tokio::time::interval(Duration::from_millis(10));
    for _ in 0..1000 {
        look.tick().await;
        if condition().await {
            return;
        }
    }
    panic!("not within ten seconds: {what}");
}

/// Reads up to the end of a line.
pub(crate) async fn line(stream: &mut TcpStream) -> String {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await {
            Ok(b'\n') | Err(_) => return String::from_utf8(line).unwrap(),
            Ok(byte) => line.push(byte),
        }
    }
}

/// Sockets without namespaces: the pod's address comes from the file that stands for its namespace.
struct LoopbackSockets(IpAddr);

fn open_pod(netns: OwnedFd, _flags: FlagMap) -> Arc<dyn Sockets> {
    let mut file = File::from(netns);
    let mut text = String::new();
    // Copies of a descriptor share their position.
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    Arc::new(LoopbackSockets(text.parse().unwrap()))
}

impl Sockets for LoopbackSockets {
    fn to_network(&self, from: Option<ClientAddr>, _next_hop: NextHop) -> io::Result<Socket> {
        socket(from.map_or((self.0, 0).into(), ClientAddr::get))
    }

    fn to_application(&self, from: ClientAddr, _target: Target) -> io::Result<Socket> {
        socket(from.get())
    }

    fn to_nameserver(&self, server: SocketAddr) -> io::Result<Socket> {
        let socket = datagrams((self.0, 0).into())?;
        socket.connect(&behind(server).into())?;
        Ok(socket)
    }

    fn datagrams(&self, _ip: IpAddr) -> io::Result<Box<dyn Datagrams>> {
        Ok(Box::new(LoopbackDatagrams))
    }
}

struct LoopbackDatagrams;

impl Datagrams for LoopbackDatagrams {
    fn send(&self, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
        // From the port as well it would take what is sent there meanwhile.
        datagrams((from.ip(), 0).into())?.send_to(payload, &to.into()).map(drop)
    }
}

/// Where a DNS server really is; at its address queries are captured.
pub(crate) fn behind(server: SocketAddr) -> SocketAddr {
    let IpAddr::V4(ip) = server.ip() else { unreachable!() };
    (Ipv4Addr::from(u32::from(ip) + 1), server.port()).into()
}

fn datagrams(at: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, socket2::Type::DGRAM.nonblocking(), None)?;
    // Those of one pod that was added again.
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    Ok(socket)
}

fn socket(from: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, socket2::Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(from.port() != 0)?;
    socket.bind(&from.into())?;
    Ok(socket)
}

/// A name that lists its addresses, `127.0.0.1_127.0.0.2.test`, or one that the node knows.
fn resolve(name: &str) -> io::Result<Vec<IpAddr>> {
    let Some(listed) = name.strip_suffix(".test") else { return ztunnel::hosts::of_node(name) };
    listed.split('_').map(|ip| ip.parse().map_err(io::Error::other)).collect()
}
