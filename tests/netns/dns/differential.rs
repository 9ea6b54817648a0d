//! The proxy against a real DNS server: what a pod in the mesh gets of names that are not the mesh's is, byte for byte,
//! what a pod outside gets.

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use hickory_proto::op::{Edns, Message, OpCode, Query};
use hickory_proto::rr::{DNSClass, Name, RecordType};

use super::{DNS, hear, receive, say, udp};
use crate::family::over_both;
use crate::proxy::Proxy;
use crate::world::{PATIENCE, Pod, World};

/// Debian's dnsmasq with records of its own and no server behind it; it ends with this.
pub(super) struct Dnsmasq(Child);

impl Dnsmasq {
    pub(super) fn start(pod: &Pod) -> Result<Self> {
        let mut command = Command::new("dnsmasq");
        command.args(["--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]);
        command.args(["--pid-file", "--local=/example.test/", "--local-ttl=60", "--edns-packet-max=4096"]);
        command
            .args(["--host-record=one.example.test,192.0.2.1,2001:db8::1", "--address=/wild.test/192.0.2.9"]);
        command.args([
            "--cname=alias.example.test,one.example.test",
            "--mx-host=example.test,one.example.test,10",
        ]);
        command.args(["--srv-host=_sip._tcp.example.test,one.example.test,5060,1,2"]);
        command
            .args(["--ptr-record=1.2.0.192.in-addr.arpa,one.example.test", "--txt-record=example.test,a,b"]);
        command.args(["--naptr-record=example.test,10,20,s,SIP+D2U,,_sip._udp.example.test"]);
        command.args(["--caa-record=example.test,0,issue,example.org", "--dns-rr=example.test,65,00010000"]);
        for n in 0..40 {
            // Longer than 512 bytes as well as than 1232.
            command.arg(format!("--txt-record=long.example.test,{n:0>60}"));
        }
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let spawn = || command.spawn().context("start dnsmasq; `cargo xtask setup` installs it");
        Ok(Self(pod.run(spawn)?))
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        // Else it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn message(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(Name::from_ascii(name).expect("a name"), kind));
    message
}

/// Queries of all kinds, ordinary ones and others.
fn corpus() -> Result<Vec<(String, Vec<u8>)>> {
    use RecordType::{A, AAAA, ANY, CAA, CNAME, HTTPS, MX, NAPTR, NS, PTR, SOA, SRV, SVCB, TXT};
    let kinds = [A, AAAA, ANY, CAA, CNAME, HTTPS, MX, NAPTR, NS, PTR, SOA, SRV, SVCB, TXT];
    let names = [
        "example.test.",
        "one.example.test.",
        "ONE.exAmple.test.",
        "alias.example.test.",
        "a.wild.test.",
        "no-such.example.test.",
        "_sip._tcp.example.test.",
        "1.2.0.192.in-addr.arpa.",
        "elsewhere.invalid.",
        "long.example.test.",
        "x.svc.cluster.local.",
        "one.example.test.shop.svc.cluster.local.",
        ".",
    ];
    let mut all = Vec::new();
    for name in names {
        for kind in kinds.into_iter().chain([RecordType::from(65_280)]) {
            let plain = message(name, kind);
            all.push((format!("{name} {kind}"), plain.to_vec()?));
            for payload in [512, 1232, 4096] {
                let mut with = plain.clone();
                let mut edns = Edns::new();
                edns.set_max_payload(payload).set_dnssec_ok(payload == 1232);
                with.edns = Some(edns);
                all.push((format!("{name} {kind}, EDNS {payload}"), with.to_vec()?));
            }
        }
    }
    let mut odd = |what: &str, change: &dyn Fn(&mut Message)| -> Result<()> {
        let mut message = message("one.example.test.", A);
        change(&mut message);
        all.push((what.to_owned(), message.to_vec()?));
        Ok(())
    };
    odd("no recursion", &|m| m.metadata.recursion_desired = false)?;
    odd("AD and CD", &|m| (m.metadata.authentic_data, m.metadata.checking_disabled) = (true, true))?;
    odd("NOTIFY", &|m| m.metadata.op_code = OpCode::Notify)?;
    odd("UPDATE", &|m| m.metadata.op_code = OpCode::Update)?;
    odd("class CHAOS", &|m| m.queries[0].query_class = DNSClass::CH)?;
    odd("two questions", &|m| m.queries.push(m.queries[0].clone()))?;
    let ordinary = message("one.example.test.", A).to_vec()?;
    all.push(("bytes behind it".to_owned(), [&ordinary[..], b"more"].concat()));
    Ok(all)
}

/// Asks over UDP, with a number for the answer to be known by.
fn ask(socket: &UdpSocket, query: &[u8], number: u16) -> Result<()> {
    socket.send(&[&number.to_be_bytes(), &query[2..]].concat())?;
    Ok(())
}

/// The answer to that number; those to others may come before it.
fn answer(socket: &UdpSocket, number: u16) -> Result<Vec<u8>> {
    loop {
        let (answer, _) = receive(socket)?;
        if answer.starts_with(&number.to_be_bytes()) {
            return Ok(answer);
        }
    }
}

/// What the server answers, if anything; it takes one query after the other, so another one tells when there is nothing.
fn directly(socket: &UdpSocket, query: &[u8], number: u16) -> Result<Option<Vec<u8>>> {
    ask(socket, query, number)?;
    ask(socket, &message("after.example.test.", RecordType::A).to_vec()?, u16::MAX)?;
    let mut found = None;
    loop {
        let (answer, _) = receive(socket)?;
        match answer.get(..2) {
            Some([255, 255]) => return Ok(found),
            Some(id) if id == number.to_be_bytes() => found = Some(answer),
            _ => {}
        }
    }
}

fn over_tcp(pod: &Pod, server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    let mut stream: TcpStream = pod.dial(server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    say(&mut stream, query)?;
    hear(&mut stream)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_is_not_the_meshs_is_the_servers_byte_for_byte() -> Result<()> {
    over_both(|world: &World| {
        let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
        // The server is its own client outside of the mesh: what stays in a pod is not captured.
        let _dnsmasq = Dnsmasq::start(&world.b)?;
        let _proxy = Proxy::start(world, &datapath, &listeners)?;
        let server = world.b.at(DNS);
        let (inside, outside) = (
            udp(&world.a, world.family.anywhere(0), PATIENCE)?,
            udp(&world.b, world.family.anywhere(0), PATIENCE)?,
        );
        inside.connect(server)?;
        outside.connect(server)?;
        mesh_tests::eventually("dnsmasq answers", PATIENCE, || {
            directly(&outside, &message("one.example.test.", RecordType::A).to_vec()?, 1).map(drop)
        })?;
        let (mut answered, mut truncated) = (0, 0);
        for (number, (what, query)) in corpus()?.into_iter().enumerate() {
            let number = u16::try_from(number)?;
            let Some(direct) = directly(&outside, &query, number).with_context(|| what.clone())? else {
                ask(&inside, &query, number)?;
                continue;
            };
            // dnsmasq has the addresses of a name now in one order, now in the other.
            mesh_tests::eventually(&format!("{what}: the same answer"), PATIENCE, || {
                ask(&inside, &query, number)?;
                let proxied = answer(&inside, number)?;
                ensure!(direct == proxied, "{direct:02x?}, by the proxy {proxied:02x?}");
                Ok(())
            })?;
            answered += 1;
            if direct[2] & 2 != 0 {
                truncated += 1;
                let long = over_tcp(&world.b, server, &query)?;
                ensure!(
                    over_tcp(&world.a, server, &query)? == long && long.len() > direct.len(),
                    "{what}, TCP"
                );
            }
        }
        println!("{:?}: {answered} answers compared, {truncated} over TCP as well", world.family);
        ensure!(answered > 500 && truncated > 2);
        Ok(())
    })
}
