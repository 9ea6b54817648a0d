//! DNS queries of a pod: what is captured, and what becomes of it in a real proxy.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use mesh_core::proto::workload::{self, NetworkAddress, address::Type};
use mesh_tests::shell;
use node_agent::datapath::Listeners;
use socket2::Socket;

use crate::family::over_both;
use crate::proxy::Proxy;
use crate::proxy::agent::address;
use crate::world::{PATIENCE, Pod, REFUSAL, World};

mod differential;
mod rate;

const DNS: u16 = 53;

fn query(name: &str, kind: RecordType) -> Result<Vec<u8>> {
    let mut message = Message::query();
    message.metadata.id = 4711;
    message.queries.push(Query::query(Name::from_ascii(name)?, kind));
    Ok(message.to_vec()?)
}

/// A socket of an application of the pod.
fn udp(pod: &Pod, at: SocketAddr, patience: Duration) -> Result<UdpSocket> {
    let socket = pod.run(|| UdpSocket::bind(at).with_context(|| format!("bind to {at}")))?;
    socket.set_read_timeout(Some(patience))?;
    Ok(socket)
}

fn receive(socket: &UdpSocket) -> Result<(Vec<u8>, SocketAddr)> {
    let mut buffer = vec![0; 65_535];
    let (length, from) = socket.recv_from(&mut buffer).context("no datagram")?;
    buffer.truncate(length);
    Ok((buffer, from))
}

fn is_silent(socket: &UdpSocket) -> bool {
    let result = socket.recv_from(&mut [0; 16]);
    matches!(result, Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
}

fn queue(world: &World, listeners: &Listeners) -> Result<UdpSocket> {
    let fd: Option<&OwnedFd> = world.family.pick(listeners.dns_v4.as_ref(), listeners.dns_v6.as_ref());
    let socket = Socket::from(fd.context("no DNS socket")?.try_clone()?);
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket.into())
}

/// Answers each datagram with itself, marked as a response, and with something behind it.
fn answer_once(server: &UdpSocket) -> Result<(Vec<u8>, SocketAddr)> {
    let (asked, from) = receive(server)?;
    let mut answer = asked.clone();
    answer[2] |= 0x80;
    answer.extend(b"\xc0\xff\xee");
    server.send_to(&answer, from)?;
    Ok((asked, from))
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn queries_meet_the_proxys_socket_and_nobody_else() -> Result<()> {
    over_both(|world| {
        let server = udp(&world.b, world.family.anywhere(DNS), REFUSAL)?;
        // Older than the enrolment, and has asked already.
        let older = udp(&world.a, world.family.anywhere(0), PATIENCE)?;
        older.connect(world.b.at(DNS))?;
        older.send(b"before")?;
        ensure!(receive(&server)?.0 == b"before");
        let (_datapath, listeners) = world.enrolled(&[&world.a])?;
        let queue = queue(world, &listeners[0])?;
        let client = udp(&world.a, world.family.anywhere(0), PATIENCE)?;
        for to in [world.b.at(DNS), SocketAddr::new(world.family.pick("10.96.0.10", "fd96::a").parse()?, DNS)]
        {
            client.send_to(b"unconnected", to)?;
            let from = SocketAddr::new(world.a.address, client.local_addr()?.port());
            ensure!(receive(&queue)? == (b"unconnected".to_vec(), from));
        }
        older.send(b"connected")?;
        ensure!(receive(&queue)? == (b"connected".to_vec(), older.local_addr()?));
        ensure!(is_silent(&server), "nothing of it has left the pod");
        // Other ports are nobody's business, nor are the pod's own server and what comes from outside.
        let other = udp(&world.b, world.family.anywhere(5353), PATIENCE)?;
        client.send_to(b"other", world.b.at(5353))?;
        ensure!(receive(&other)?.0 == b"other");
        let own = udp(&world.a, world.family.anywhere(DNS), PATIENCE)?;
        for to in [world.a.address, world.family.pick("127.0.0.1", "::1").parse::<IpAddr>()?] {
            client.send_to(b"own", (to, DNS))?;
            ensure!(receive(&own)?.0 == b"own");
        }
        server.send_to(b"outside", world.a.at(DNS))?;
        ensure!(receive(&own)?.0 == b"outside");
        Ok(())
    })
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_can_keep_its_dns_and_gets_it_back() -> Result<()> {
    over_both(|world| {
        let server = udp(&world.b, world.family.anywhere(DNS), REFUSAL)?;
        let client = udp(&world.a, world.family.anywhere(0), PATIENCE)?;
        let mut datapath = world.open()?;
        let reaches = || -> Result<bool> {
            client.send_to(b"query", world.b.at(DNS))?;
            Ok(!is_silent(&server))
        };
        for (dns, reached) in [(false, true), (true, false), (false, true), (true, false)] {
            let mut spec = world.a.spec()?;
            spec.dns = dns;
            let listeners = datapath.prepare(&spec, None)?;
            ensure!(listeners.dns_v4.is_some() == dns && listeners.dns_v6.is_some() == dns);
            datapath.capture(&world.a.uid)?;
            ensure!(reaches()? == reached, "captured: {dns}");
        }
        datapath.leave(&world.a.uid)?;
        ensure!(reaches()?, "it left");
        for version in ["-4", "-6"] {
            let rules = shell::run("ip", ["-n", world.a.netns.name(), version, "rule"])?;
            ensure!(!rules.contains("dport"), "{rules}");
        }
        Ok(())
    })
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn queries_wait_for_a_proxy_and_are_answered_from_where_they_went() -> Result<()> {
    over_both(|world| {
        let server = udp(&world.b, world.family.anywhere(DNS), PATIENCE)?;
        for device in ["all", "lo", "eth0"] {
            world.a.netns.sysctl(&format!("ipv4/conf/{device}/rp_filter"), "1")?;
        }
        let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
        // The pod has a server of its own, on all its addresses: it must be able to, and to go on.
        let own = udp(&world.a, world.family.anywhere(DNS), REFUSAL)?;
        let client = udp(&world.a, world.family.anywhere(0), PATIENCE)?;
        client.connect(world.b.at(DNS))?;
        let asked = query("example.org.", RecordType::TXT)?;
        client.send(&asked)?;
        let proxy = Proxy::start(world, &datapath, &listeners)?;
        for round in 0..2 {
            let (got, from) = answer_once(&server).with_context(|| format!("round {round}"))?;
            ensure!(got[2..] == asked[2..]);
            ensure!(from.ip() == world.a.address && from.port() != client.local_addr()?.port());
            let (answer, from) = receive(&client)?;
            ensure!(from == world.b.at(DNS));
            ensure!(answer[..2] == asked[..2] && answer.ends_with(b"\xc0\xff\xee"));
            client.send(&asked)?;
        }
        answer_once(&server)?;
        receive(&client)?;
        // Of the mesh, with no server.
        drop(server);
        own_name_is_known(world, &proxy, &client)?;
        ensure!(is_silent(&own));
        Ok(())
    })
}

/// A name of the mesh; `client` is connected to a server that is not there.
fn own_name(world: &World) -> Result<Vec<u8>> {
    query("web.shop.svc.cluster.local.", world.family.pick(RecordType::A, RecordType::AAAA))
}

fn own_name_is_known(world: &World, proxy: &Proxy, client: &UdpSocket) -> Result<()> {
    proxy.xds.put([address(service(world))]);
    mesh_tests::eventually("the mesh's own name", PATIENCE, || {
        client.send(&own_name(world)?)?;
        let (answer, from) = receive(client)?;
        let answer = Message::from_vec(&answer)?;
        ensure!(from == client.peer_addr()? && answer.metadata.id == 4711);
        let data: Vec<_> = answer.answers.iter().map(|record| record.data.to_string()).collect();
        ensure!(data == [world.family.pick("10.96.0.7", "fd96::7")], "{answer}");
        Ok(())
    })
}

fn service(world: &World) -> Type {
    let octets = world.family.pick(
        vec![10, 96, 0, 7],
        "fd96::7".parse::<std::net::Ipv6Addr>().map(|ip| ip.octets().to_vec()).unwrap_or_default(),
    );
    Type::Service(workload::Service {
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "web.shop.svc.cluster.local".to_owned(),
        canonical: true,
        addresses: vec![NetworkAddress { address: octets, ..Default::default() }],
        ..Default::default()
    })
}

fn accept(server: &TcpListener) -> Result<TcpStream> {
    server.set_nonblocking(true)?;
    let stream = mesh_tests::eventually("a connection", PATIENCE, || Ok(server.accept()?.0))?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn say(stream: &mut TcpStream, message: &[u8]) -> Result<()> {
    stream.write_all(&[&u16::try_from(message.len())?.to_be_bytes(), message].concat())?;
    Ok(())
}

fn hear(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).context("no message")?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// One conversation has questions for the mesh and for the server, whose answer may be as long as one can be; then one
/// whose answer has many messages, which only a stream can carry.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn over_tcp_each_question_is_answered_by_whom_it_concerns() -> Result<()> {
    over_both(|world| {
        let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
        let server: TcpListener = world.router.run(|| Ok(TcpListener::bind(world.family.anywhere(DNS))?))?;
        let proxy = Proxy::start(world, &datapath, &listeners)?;
        let router = SocketAddr::new(world.family.pick("10.98.1.1", "fd98:1::1").parse()?, DNS);
        let client = udp(&world.a, world.family.anywhere(0), PATIENCE)?;
        client.connect(router)?;
        own_name_is_known(world, &proxy, &client)?;
        let own = own_name(world)?;
        let (other, transfer) =
            (query("example.org.", RecordType::MX)?, query("example.org.", RecordType::AXFR)?);
        let mut client = world.a.dial(router, PATIENCE)?;
        client.set_read_timeout(Some(PATIENCE))?;
        say(&mut client, &own)?;
        ensure!(Message::from_vec(&hear(&mut client)?)?.answers.len() == 1);
        let long = [&other[..2], &[0x81], &other[3..], &vec![0xee; 65_535 - other.len()]].concat();
        for _ in 0..2 {
            say(&mut client, &other)?;
            let mut accepted = accept(&server)?;
            ensure!(hear(&mut accepted)? == other);
            say(&mut accepted, &long)?;
            ensure!(hear(&mut client)? == long);
            // A server that closes idle connections is dialled again.
        }
        say(&mut client, &own)?;
        ensure!(
            Message::from_vec(&hear(&mut client)?)?.answers.len() == 1,
            "the mesh's are answered all along"
        );
        say(&mut client, &transfer)?;
        let mut accepted = accept(&server)?;
        ensure!(hear(&mut accepted)? == transfer);
        for part in [b"one".as_slice(), b"two"] {
            say(&mut accepted, part)?;
            ensure!(hear(&mut client)? == part);
        }
        drop(accepted);
        ensure!(client.read(&mut [0; 1])? == 0);
        // Nobody is there any more.
        drop(server);
        let mut client = world.a.dial(router, PATIENCE)?;
        client.set_read_timeout(Some(PATIENCE))?;
        say(&mut client, &other)?;
        ensure!(hear(&mut client)?[3] & 0xf == 2, "SERVFAIL");
        Ok(())
    })
}
