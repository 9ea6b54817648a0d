//! Connections from before enrolment never met the proxy: the agent resets those that policy denies.

use std::io::{ErrorKind, Read as _};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};

use crate::family::over_both;
use crate::world::{PATIENCE, PORT, accept, converse};

/// Those of before enrolment that policy denies are reset, on both sides, and no others: not what the pod opened itself,
/// not what stays inside of it, and nothing that the proxy carries.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn older_connections_that_policy_denies_are_reset() -> Result<()> {
    over_both(|world| {
        let (theirs, ours) = (world.b.serve()?, world.a.serve()?);
        let opened = (world.a.dial(world.b.at(PORT), PATIENCE)?, theirs.accept()?.0);
        let accepted = (world.b.dial(world.a.at(PORT), PATIENCE)?, ours.accept()?.0);
        let inside = (world.a.dial(world.a.at(PORT), PATIENCE)?, ours.accept()?.0);
        let (datapath, listeners) = world.enrolled(&[&world.a])?;
        let client = world.b.dial(world.a.at(PORT), PATIENCE)?;
        let carried = (client, accept(world.family.inbound(&listeners[0]))?);
        let asked = Mutex::new(Vec::new());
        let ask = |deny: bool| {
            datapath.reset_older(&world.a.uid, &|application, client| {
                asked.lock().unwrap_or_else(PoisonError::into_inner).push((application, client));
                deny
            })
        };
        ensure!(ask(false)?.count == 0);
        converse(&accepted.0, &accepted.1)?;
        ensure!(ask(true)?.count == 1);
        for side in [&accepted.0, &accepted.1] {
            side.set_read_timeout(Some(PATIENCE))?;
            let mut side = side;
            let error = side.read(&mut [0; 1]).err().context("it goes on")?;
            let kinds = [ErrorKind::ConnectionReset, ErrorKind::ConnectionAborted];
            ensure!(kinds.contains(&error.kind()), "{error}");
        }
        ensure!(ask(true)?.count == 0, "it is gone");
        let only = (world.a.at(PORT), accepted.0.local_addr()?);
        let asked = asked.into_inner().unwrap_or_else(PoisonError::into_inner);
        ensure!(asked == [only, only], "{asked:?}");
        for pair in [&opened, &inside, &carried] {
            converse(&pair.0, &pair.1)?;
        }
        Ok(())
    })
}
