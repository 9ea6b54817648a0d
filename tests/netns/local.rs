//! What is not captured: everything that stays inside the pod.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use node_agent::datapath::Listeners;

use crate::family::{all, over_both};
use crate::world::{PATIENCE, PORT, World, converse, idle};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn localhost_between_processes_of_a_pod() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    dial_localhost(&world)?;
    untouched(&listeners[0])
}

/// As the kubelet's port-forward does: a process of the node that enters the pod's network namespace.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_process_of_the_node_that_enters_the_pod() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    world.outside(|| dial_localhost(&world))?;
    untouched(&listeners[0])
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_dials_its_own_address() -> Result<()> {
    over_both(|world| {
        let (_datapath, listeners) = world.enrolled(&[&world.a])?;
        let app = world.a.serve()?;
        let client = world.a.dial(world.a.at(PORT), PATIENCE)?;
        converse(&client, &app.accept()?.0)?;
        untouched(&listeners[0])
    })
}

fn dial_localhost(world: &World) -> Result<()> {
    for (at, to) in [
        ("127.0.0.1:7000", "127.0.0.1:7000"),
        ("[::1]:7001", "[::1]:7001"),
        ("0.0.0.0:7002", "127.0.0.1:7002"),
        ("[::]:7003", "[::ffff:127.0.0.1]:7003"),
        ("0.0.0.0:7004", "0.0.0.0:7004"),
        ("[::]:7005", "[::]:7005"),
    ] {
        let app = world.a.listen(at)?;
        let client = world.a.dial(to.parse::<SocketAddr>()?, PATIENCE)?;
        converse(&client, &app.accept()?.0)?;
    }
    Ok(())
}

fn untouched(listeners: &Listeners) -> Result<()> {
    for listener in all(listeners) {
        ensure!(idle(listener)?);
    }
    Ok(())
}
