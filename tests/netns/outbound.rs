//! Connections that a pod opens.

use anyhow::{Result, ensure};

use crate::world::{PATIENCE, PORT, World, accept, converse};

/// The destination is the accepted socket's own address, the source the pod's.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn meets_the_proxy_with_its_addresses_unchanged() -> Result<()> {
    let world = World::new()?;
    let (_datapath, listeners) = world.enrolled(&[&world.a])?;
    let client = world.a.dial(world.b.at(PORT), PATIENCE)?;
    let accepted = accept(&listeners[0].outbound_v4)?;
    ensure!(accepted.local_addr()? == world.b.at(PORT));
    ensure!(accepted.peer_addr()? == client.local_addr()?);
    ensure!(client.peer_addr()? == world.b.at(PORT));
    ensure!(client.local_addr()?.ip() == world.a.address);
    converse(&client, &accepted)
}
