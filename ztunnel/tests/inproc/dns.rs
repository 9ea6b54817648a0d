//! DNS queries over UDP: answered, forwarded, refused in time.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

use crate::world::{CLIENT, SERVER, TestPod, World, behind};

/// Longer than the proxy waits for a server.
const PATIENCE: Duration = Duration::from_secs(5);

fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = id;
    message.queries.push(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

/// The pod's application.
struct Resolver {
    socket: UdpSocket,
    server: SocketAddr,
}

impl Resolver {
    fn send(&self, query: &[u8]) {
        self.socket.send_to(query, self.server).unwrap();
    }

    /// The next answer, which has to come from the address that was asked.
    fn receive(&self) -> Vec<u8> {
        let (answer, from) = receive(&self.socket);
        assert_eq!(from.ip(), self.server.ip());
        answer
    }
}

fn resolver(world: &World) -> Resolver {
    resolver_of(world, CLIENT)
}

fn resolver_of(world: &World, pod: TestPod) -> Resolver {
    let socket = UdpSocket::bind((world.pod_ip(pod), 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    Resolver { socket, server: world.nameserver(pod) }
}

/// The server that forwarded queries reach.
fn server(world: &World) -> UdpSocket {
    let socket = UdpSocket::bind(behind(world.nameserver(CLIENT))).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65_535];
    let (length, from) = socket.recv_from(&mut buffer).expect("a datagram");
    buffer.truncate(length);
    (buffer, from)
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_the_mesh_are_answered_from_the_address_that_was_asked() {
    let world = World::new().await;
    let resolver = resolver(&world);
    resolver.send(&query(7, "server.local."));
    let answer = Message::from_vec(&resolver.receive()).unwrap();
    assert_eq!(answer.metadata.id, 7);
    let data: Vec<_> = answer.answers.iter().map(|record| record.data.to_string()).collect();
    assert_eq!(data, [world.vip(SERVER).ip().to_string()]);
    let labels =
        ["request_query_type=\"A\"", "request_protocol=\"udp\"", "source_canonical_service=\"client\""];
    assert_eq!(world.metric("istio_dns_requests_total", &labels).await, 1);
    assert_eq!(world.metric("istio_dns_upstream_requests_total", &labels).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_else_reaches_the_server_and_its_answer_the_client_byte_for_byte() {
    let world = World::new().await;
    let (resolver, server) = (resolver(&world), server(&world));
    let mut odd = query(9, "example.org.");
    odd.extend(b"\xff\x00 what no parser would take");
    let mut ids = Vec::new();
    for (n, asked) in [query(9, "example.org."), odd, query(9, "example.org.")].into_iter().enumerate() {
        resolver.send(&asked);
        let (mut answer, from) = receive(&server);
        assert_eq!(answer[2..], asked[2..], "all but the identifier");
        ids.push((answer[..2].to_vec(), from.port()));
        answer[2] |= 0x80;
        // Nobody else's answers count, nor those to other questions.
        let stranger = UdpSocket::bind((world.ip(7), 0)).unwrap();
        stranger.send_to(&answer, from).unwrap();
        let wrong_id = [&[answer[0] ^ 1, answer[1]], &answer[2..]].concat();
        server.send_to(&wrong_id, from).unwrap();
        let mut other = answer.clone();
        other[14] ^= 1;
        server.send_to(&other, from).unwrap();
        answer.extend(vec![n as u8; 3000 * n]);
        server.send_to(&answer, from).unwrap();
        let got = resolver.receive();
        assert_eq!(got[..2], asked[..2]);
        assert_eq!(got[2..], answer[2..]);
    }
    ids.dedup();
    assert_eq!(ids.len(), 3, "another port and identifier each time: {ids:?}");
    let labels = ["request_query_type=\"A\""];
    assert_eq!(world.metric("istio_dns_upstream_requests_total", &labels).await, 3);
    assert_eq!(world.metric("istio_dns_upstream_request_duration_seconds_count", &labels).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_server_is_told_in_time() {
    let world = World::new().await;
    let resolver = resolver(&world);
    // Nobody is there.
    resolver.send(&query(1, "example.org."));
    let answer = Message::from_vec(&resolver.receive()).unwrap();
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (1, ResponseCode::ServFail));
    // Somebody is there and says nothing.
    let server = server(&world);
    let begun = Instant::now();
    resolver.send(&query(2, "example.org."));
    let answer = Message::from_vec(&resolver.receive()).unwrap();
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (2, ResponseCode::ServFail));
    assert!(begun.elapsed() < PATIENCE);
    assert_eq!(receive(&server).0, receive(&server).0, "the query was repeated");
    assert_eq!(world.metric("istio_dns_upstream_failures_total", &[]).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_queries_than_may_wait_are_told_at_once() {
    let world = World::new().await;
    let (resolver, _silent) = (resolver(&world), server(&world));
    for id in 0..=256 {
        resolver.send(&query(id, "example.org."));
        if id % 64 == 0 {
            // Its queue is not what this is about.
            let all = u64::from(id) + 1;
            crate::world::eventually("they are read", async || {
                world.metric("istio_dns_requests_total", &[]).await == all
            })
            .await;
        }
    }
    let answer = Message::from_vec(&resolver.receive()).unwrap();
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (256, ResponseCode::ServFail));
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_wait_until_the_mesh_is_known() {
    let mut world = World::without_mesh().await;
    let (mut talk, _) = crate::agent::Talk::accept(&world.agent).await;
    talk.welcome().await;
    let fds = world.listeners(CLIENT).await;
    assert_eq!(talk.add(world.describe(CLIENT), fds).await, "");
    talk.snapshot_end().await;
    let resolver = resolver(&world);
    resolver.send(&query(7, "server.local."));
    world.serve_mesh();
    let answer = Message::from_vec(&resolver.receive()).unwrap();
    assert_eq!(answer.answers.len(), 1, "{answer}");
}

/// Its own queries wait, or are lost; what others ask is answered.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_too_much_waits() {
    let world = World::with(&["--max-pod-dns-queries=50"]).await;
    let resolver = resolver(&world);
    let asked = 150;
    let begun = Instant::now();
    for id in 0..asked {
        resolver.send(&query(id, "server.local."));
    }
    let other = resolver_of(&world, SERVER);
    other.send(&query(7, "server.local."));
    assert_eq!(Message::from_vec(&other.receive()).unwrap().metadata.id, 7);
    resolver.socket.set_nonblocking(true).unwrap();
    let mut answered = 0;
    while resolver.socket.recv(&mut [0; 1500]).is_ok() {
        answered += 1;
    }
    assert!(answered < asked, "another pod has its answer first");
    resolver.socket.set_nonblocking(false).unwrap();
    for _ in answered..asked {
        resolver.receive();
    }
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(900), "a hundred at once and fifty a second: {took:?}");
}
