//! Connections that a pod opens.

use std::net::{SocketAddr, TcpStream};

use anyhow::{Result, ensure};

use crate::family::{all, over_both};
use crate::world::{PATIENCE, PORT, World, accept, converse, idle, into_stream, proxy_socket, upstream};

/// The destination is the accepted socket's own address, the source the pod's.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn meets_the_proxy_with_its_addresses_unchanged() -> Result<()> {
    over_both(|world| {
        let (_datapath, listeners) = world.enrolled(&[&world.a])?;
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        let accepted = accept(world.family.outbound(&listeners[0]))?;
        ensure!(accepted.local_addr()? == world.b.at(PORT));
        ensure!(accepted.peer_addr()? == client.local_addr()?);
        ensure!(client.peer_addr()? == world.b.at(PORT));
        ensure!(client.local_addr()?.ip() == world.a.address);
        converse(&client, &accepted)
    })
}

/// An IPv6 socket that dials a v4-mapped address is an IPv4 connection.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn v4_mapped_sockets_are_captured() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let mapped = SocketAddr::from((world.b.v4.to_ipv6_mapped(), PORT));
    let client = world.a.dial(mapped, PATIENCE)?;
    let accepted = accept(world.family.outbound(&listeners[0]))?;
    ensure!(accepted.local_addr()? == world.b.at(PORT));
    converse(&client, &accepted)
}

/// Two pods of one node have their addresses in the same map, and on lo the connection of one to the other differs
/// from the proxy's, made on the neighbour's behalf, only in which network namespace it is in.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn neighbours_on_one_node_are_told_apart() -> Result<()> {
    over_both(|world| {
        let (datapath, listeners) = world.enrolled(&[&world.a, &world.b])?;
        let app = world.b.serve()?;
        let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
        let outbound = accept(world.family.outbound(&listeners[0]))?;
        ensure!(outbound.local_addr()? == world.b.at(PORT));
        converse(&client, &outbound)?;

        let on_behalf = SocketAddr::from((world.a.address, 20_000));
        let relayed = world.b.run(|| upstream(&datapath, on_behalf, world.b.at(PORT)))?;
        let (served, peer) = app.accept()?;
        ensure!(peer == on_behalf);
        converse(&relayed, &served)?;
        ensure!(all(&listeners[1]).all(|listener| idle(listener).is_ok_and(|idle| idle)));
        Ok(())
    })
}

/// The proxy's own connections are flagged: not captured at connect, let out by the guard.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_proxy_gets_out() -> Result<()> {
    over_both(|world| {
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        let app = world.b.serve()?;
        let proxied: TcpStream = world.a.run(|| {
            let socket = proxy_socket(&datapath, world.family.domain())?;
            socket.connect_timeout(&world.b.at(PORT).into(), PATIENCE)?;
            Ok(into_stream(socket))
        })?;
        let (served, peer) = app.accept()?;
        ensure!(peer.ip() == world.a.address);
        converse(&proxied, &served)?;
        ensure!(idle(world.family.outbound(&listeners[0]))?);
        Ok(())
    })
}

/// A pod that dials its own Service is captured, and the proxy can bring it back to the pod itself.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pods_own_service_leads_back_to_it() -> Result<()> {
    over_both(|world| {
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        let app = world.a.serve()?;
        let service = SocketAddr::new(world.family.pick("10.96.0.7", "fd96::7").parse()?, 80);
        let client = world.a.dial(service, PATIENCE)?;
        let accepted = accept(world.family.outbound(&listeners[0]))?;
        ensure!(accepted.local_addr()? == service);
        let back = world.a.run(|| upstream(&datapath, world.a.at(20_000), world.a.at(PORT)))?;
        let (served, peer) = app.accept()?;
        ensure!(peer == world.a.at(20_000));
        converse(&back, &served)?;
        converse(&client, &accepted)
    })
}
