//! What may leave an enrolled pod besides what was captured.

use anyhow::{Result, ensure};
use mesh_ebpf_abi::event::Counter;
use mesh_ebpf_abi::{HBONE_PORT, MARK_PROXY, MARK_UPSTREAM};
use mesh_tests::kernel;
use mesh_tests::raw_bpf::{self, Kind};
use socket2::{Protocol, Socket, Type};

use crate::family::over_both;
use crate::packets::{ACK, FIN, RST, SYN, Sniffer, segment, send_raw};
use crate::world::{PATIENCE, PORT, REFUSAL, accept, converse};

/// CAP_NET_RAW makes packets and sets marks; neither is trusted.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn raw_packets_are_dropped_whatever_their_mark() -> Result<()> {
    over_both(|world| {
        let mut sniffer = Sniffer::new(world)?;
        let packet = segment(world.a.at(5000), world.b.at(PORT), SYN);
        send_raw(&world.a, &packet, 0)?;
        ensure!(sniffer.tcp_from(&world.a, world.b.address)?.len() == 1, "not seen before enrolment");
        let (mut datapath, _listeners) = world.enrolled(&[&world.a])?;
        for mark in [0, MARK_PROXY, MARK_UPSTREAM + 100] {
            send_raw(&world.a, &packet, mark)?;
        }
        let seen = sniffer.tcp_from(&world.a, world.b.address)?;
        ensure!(seen.is_empty(), "{seen:?}");
        ensure!(datapath.count(Counter::GuardApp)? == 3);
        let event = datapath.next_drop().ok_or_else(|| anyhow::anyhow!("no event"))?;
        ensure!(event.source.to_ip() == world.a.address && event.destination.to_ip() == world.b.address);
        ensure!((event.source_port, event.destination_port) == (5000, PORT));
        ensure!(event.reason == Counter::GuardApp as u32);
        Ok(())
    })
}

/// A socket that the connect hook did not see, here of a process outside the cgroup, does not get out either.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_socket_that_missed_the_hook_is_dropped_whatever_its_mark() -> Result<()> {
    over_both(|world| {
        let mut sniffer = Sniffer::new(world)?;
        let _app = world.b.serve()?;
        let (datapath, _listeners) = world.enrolled(&[&world.a])?;
        let dialled = world.outside(|| {
            world.a.run(|| {
                let socket = Socket::new(world.family.domain(), Type::STREAM, Some(Protocol::TCP))?;
                socket.set_mark(MARK_PROXY)?;
                Ok(socket.connect_timeout(&world.b.at(PORT).into(), REFUSAL).is_ok())
            })
        })?;
        ensure!(!dialled);
        ensure!(sniffer.tcp_from(&world.a, world.b.address)?.is_empty());
        ensure!(datapath.count(Counter::GuardApp)? >= 1);
        Ok(())
    })
}

/// A listener that is not the proxy's cannot answer: its address is one that sk_lookup lets nobody reach, so the
/// guard is asked about its SYN-ACK here by taking sk_lookup away.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_apps_syn_ack_is_dropped() -> Result<()> {
    over_both(|world| {
        let (datapath, _listeners) = world.enrolled(&[&world.a])?;
        let _app = world.a.serve()?;
        raw_bpf::replace_by_one_that_passes_all(&world.pod_pins(&world.a).join("steer"), Kind::SkLookup)?;
        ensure!(world.b.dial(world.a.at(PORT), REFUSAL).is_err());
        ensure!(datapath.count(Counter::GuardAppListener)? >= 1);
        Ok(())
    })
}

/// SYN-ACKs of flagged listeners pass, and accepted sockets inherit the flag: without either nothing would arrive.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn accepted_sockets_inherit_the_listeners_flag() -> Result<()> {
    over_both(|world| {
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        let client = world.b.dial(world.a.at(HBONE_PORT), PATIENCE)?;
        converse(&client, &accept(world.family.hbone(&listeners[0]))?)?;
        for counter in [Counter::GuardApp, Counter::GuardAppListener, Counter::GuardOlder] {
            ensure!(datapath.count(counter)? == 0, "{}", counter.name());
        }
        Ok(())
    })
}

/// The side that closed first answers a stray segment from TIME_WAIT.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn time_wait_answers() -> Result<()> {
    // The socket that ip_send_unicast_reply() answers for.
    if !kernel::names("orig_sk")? {
        kernel::skipped("time_wait_answers", "the socket of what TIME_WAIT answers (Linux 6.13)");
        return Ok(());
    }
    over_both(|world| {
        let (_datapath, listeners) = world.enrolled(&[&world.a])?;
        let client = world.b.dial(world.a.at(HBONE_PORT), PATIENCE)?;
        let from = client.local_addr()?;
        let mut sniffer = Sniffer::new(world)?;
        drop(accept(world.family.hbone(&listeners[0]))?);
        drop(client);
        let fin =
            |port| move |seen: &crate::packets::Segment| seen.to.port() == port && seen.flags & FIN != 0;
        sniffer.wait("the pod's FIN", fin(from.port()))?;
        sniffer.wait("the client's FIN", fin(HBONE_PORT))?;
        sniffer.wait("its ACK", |seen| seen.to.port() == from.port() && seen.flags == ACK)?;
        // What came until here is not the answer.
        sniffer.tcp_from(&world.a, world.b.address)?;
        send_raw(&world.b, &segment(from, world.a.at(HBONE_PORT), ACK), 0)?;
        let answer = sniffer.wait("an answer", |seen| seen.from.ip() == world.a.address)?;
        ensure!(answer.to.port() == from.port() && answer.flags == ACK, "{answer:?}");
        Ok(())
    })
}

/// The kernel's reset for a connection that nobody has.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_kernels_reset_passes() -> Result<()> {
    over_both(|world| {
        let (_datapath, _listeners) = world.enrolled(&[&world.a])?;
        let mut sniffer = Sniffer::new(world)?;
        send_raw(&world.b, &segment(world.b.at(5000), world.a.at(PORT), ACK), 0)?;
        let answer = sniffer.wait("a reset", |seen| seen.from.ip() == world.a.address)?;
        ensure!(answer.flags & RST != 0 && answer.to == world.b.at(5000), "{answer:?}");
        Ok(())
    })
}
