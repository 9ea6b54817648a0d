//! A flood of connections to a proxy that may open few files: it resets what is too much, and everything else goes on.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Stdio;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use ztunnel::descriptors::Descriptors;

use crate::world::{APP, CLIENT, DESCRIPTORS, SECOND, SERVER, SERVICE, World, eventually, get};

/// Descriptors of the proxy's process. Connections may have three quarters of them.
const FEW: u64 = 400;
/// Each takes two of the proxy's.
const FLOOD: usize = 600;

/// The limit is the process's, so the proxy has one of its own: this test once more, with a word on the command line.
const THE_PROXY: &str = "be-the-proxy";

/// A proxy without applications, which adds a pod when it is told to.
struct Limited {
    _process: Child,
    say: ChildStdin,
    hear: Lines<BufReader<ChildStdout>>,
    net: [u8; 2],
}

impl Limited {
    async fn start() -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, THE_PROXY, "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (say, hear) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let mut hear = BufReader::new(hear).lines();
        let serving = heard(&mut hear, "serving ").await;
        let net: Vec<u8> = serving.split(' ').map(|byte| byte.parse().unwrap()).collect();
        Self { _process: process, say, hear, net: [net[0], net[1]] }
    }

    fn at(&self, last: u8, port: u16) -> SocketAddr {
        (IpAddr::from(Ipv4Addr::new(127, self.net[0], self.net[1], last)), port).into()
    }

    /// A connection of the client's application to the server's service; one that is reset may be so at once.
    async fn dial(&self) -> std::io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(self.at(CLIENT.last, 0))?;
        socket.connect(self.at(SERVER.last + 100, SERVICE)).await
    }

    async fn shed(&self) -> u64 {
        let text = get(self.at(1, 15020), "/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix("ambit_shed_connections_total "));
        line.expect("the metric").parse().unwrap()
    }
}

async fn heard(hear: &mut Lines<BufReader<ChildStdout>>, what: &str) -> String {
    loop {
        let line = hear.next_line().await.unwrap().expect("the proxy's process has ended");
        if let Some((_, rest)) = line.split_once(what) {
            return rest.to_owned();
        }
    }
}

async fn echoes(stream: &mut TcpStream) -> bool {
    stream.write_all(b"x").await.is_ok() && stream.read_u8().await.is_ok_and(|byte| byte == b'x')
}

const NAME: &str = "descriptors::a_flood_is_shed_and_open_connections_metrics_and_the_agent_go_on";

#[tokio::test]
async fn a_flood_is_shed_and_open_connections_metrics_and_the_agent_go_on() {
    if std::env::args().any(|argument| argument == THE_PROXY) {
        return Box::pin(be_the_proxy()).await;
    }
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let mut proxy = Limited::start().await;
    let application = TcpListener::bind(proxy.at(SERVER.last, APP)).await.unwrap();
    let _application = tokio::spawn(async move {
        while let Ok((mut stream, _)) = application.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    let mut open = proxy.dial().await.unwrap();
    assert!(echoes(&mut open).await);
    assert_eq!(proxy.shed().await, 0);

    let mut flood = Vec::new();
    for _ in 0..FLOOD {
        flood.extend(proxy.dial().await);
    }
    eventually("connections are shed", async || proxy.shed().await > 0).await;
    let mut refused = FLOOD - flood.len();
    for stream in &mut flood {
        refused += usize::from(!echoes(stream).await);
    }
    assert!(refused > FLOOD / 2 && refused < FLOOD, "{refused} of {FLOOD} are refused");
    assert!(echoes(&mut open).await, "an open connection goes on");
    proxy.say.write_all(b"add a pod\n").await.unwrap();
    assert_eq!(heard(&mut proxy.hear, "added ").await, "well", "the agent's descriptors are taken");

    drop(flood);
    eventually("new connections are served again", async || {
        let Ok(mut stream) = proxy.dial().await else { return false };
        echoes(&mut stream).await
    })
    .await;
    assert!(echoes(&mut open).await);
}

async fn be_the_proxy() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, FEW, most).unwrap();
    DESCRIPTORS.set(Descriptors::of_process()).unwrap();
    let mut world = World::new().await;
    let IpAddr::V4(own) = world.ip(0) else { unreachable!() };
    println!("serving {} {}", own.octets()[1], own.octets()[2]);
    let mut asked = BufReader::new(tokio::io::stdin()).lines();
    while asked.next_line().await.unwrap().is_some() {
        let fds = world.listeners(SECOND).await;
        let pod = world.describe(SECOND);
        let error = world.talk.as_mut().unwrap().add(pod, fds).await;
        println!("added {}", if error.is_empty() { "well" } else { &error });
    }
}
