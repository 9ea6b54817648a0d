//! How many queries a second the proxy answers for one pod, printed; and far more than any pod asks.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Result;
use hickory_proto::rr::RecordType;

use super::differential::Dnsmasq;
use super::{DNS, own_name, own_name_is_known, query, udp};
use crate::family::Family;
use crate::proxy::Proxy;
use crate::world::{PATIENCE, World};

/// Queries that wait for their answers at a time.
const AT_ONCE: usize = 32;
const DURATION: Duration = Duration::from_secs(2);
/// Answers a second that are too few.
const TOO_FEW: f64 = 500.0;

/// Answers a second.
fn rate(socket: &UdpSocket, query: &[u8]) -> Result<f64> {
    let begun = Instant::now();
    let mut answers = 0_u32;
    while begun.elapsed() < DURATION {
        for _ in 0..AT_ONCE {
            socket.send(query)?;
        }
        for _ in 0..AT_ONCE {
            socket.recv(&mut [0; 512])?;
            answers += 1;
        }
    }
    Ok(f64::from(answers) / begun.elapsed().as_secs_f64())
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn answers_a_second() -> Result<()> {
    let world = World::of(Family::V4)?;
    let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
    let _dnsmasq = Dnsmasq::start(&world.b)?;
    let proxy = Proxy::start(&world, &datapath, &listeners)?;
    let connected = |pod, to: SocketAddr| -> Result<UdpSocket> {
        let socket = udp(pod, world.family.anywhere(0), PATIENCE)?;
        socket.connect(to)?;
        Ok(socket)
    };
    let (inside, outside) = (connected(&world.a, world.b.at(DNS))?, connected(&world.b, world.b.at(DNS))?);
    own_name_is_known(&world, &proxy, &inside)?;
    let other = query("one.example.test.", RecordType::A)?;
    let figures = [
        ("answered by the proxy", rate(&inside, &own_name(&world)?)?),
        ("forwarded to dnsmasq", rate(&inside, &other)?),
        ("dnsmasq itself, within its pod", rate(&outside, &other)?),
    ];
    for (what, rate) in figures {
        println!("{what}: {rate:.0} a second");
        assert!(rate > TOO_FEW, "{what}");
    }
    Ok(())
}
