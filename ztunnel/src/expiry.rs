//! Certificates that are not renewed in time: into the log, all together, and to the node agent, which makes Events.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_core::certs::health::{Alarm, Health};
use mesh_core::certs::{Certificates, Late};
use mesh_core::identity::Identity;
use mesh_core::proto::pods::Expiring;
use mesh_core::proto::pods::from_ztunnel::Message;
use tokio::sync::mpsc;

use crate::denials::Waiting;

/// Between two looks, unless a certificate lives so short that it would be missed.
const LOOK: Duration = Duration::from_secs(10);
/// The least time between two looks.
const SHORTEST_LOOK: Duration = Duration::from_millis(500);

/// Says it at 50, 25 and 10 percent of a life, each once. For ever.
pub async fn run(certificates: Certificates, to_agent: mpsc::Sender<Waiting>) {
    let (mut alarm, mut told) = (Alarm::default(), Told::default());
    loop {
        let now = SystemTime::now();
        let health = certificates.health(now);
        let left = health.soonest.and_then(|soonest| soonest.duration_since(now).ok()).unwrap_or(LOOK);
        tokio::time::sleep((left / 20).clamp(SHORTEST_LOOK, LOOK)).await;
        let now = SystemTime::now();
        let health = certificates.health(now);
        if let Some(percent) = alarm.due(health.reached) {
            log(&health, percent, now);
        }
        for late in told.due(certificates.late(now)) {
            // Where the agent is away for long the newest ones are lost; the log has them.
            let _ = to_agent.try_send(Message::Expiring(expiring(late)).into());
        }
    }
}

fn log(health: &Health, percent: u8, now: SystemTime) {
    let Health { failing, missing, soonest, .. } = *health;
    let left = soonest.and_then(|soonest| soonest.duration_since(now).ok()).unwrap_or_default();
    tracing::error!(
        failing, missing, first_ends_in = ?Duration::from_secs(left.as_secs()),
        "certificates are not renewed, of one no more than {percent} percent of its life is left: is the certificate \
         authority well? (/config_dump has each error)"
    );
}

fn expiring(late: Late) -> Expiring {
    let not_after = late.until.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let identity = late.identity.to_string();
    Expiring { identity, percent: late.percent.into(), not_after, reason: late.error }
}

/// What was said of each identity.
#[derive(Debug, Default)]
struct Told(HashMap<Identity, Alarm>);

impl Told {
    /// Those that something is to be said of, out of all that are late.
    fn due(&mut self, late: Vec<Late>) -> Vec<Late> {
        self.0.retain(|identity, _| late.iter().any(|late| late.identity == *identity));
        let is_due = |late: &Late| {
            let alarm = self.0.entry(late.identity.clone()).or_default();
            alarm.due(Some(late.percent)).is_some()
        };
        late.into_iter().filter(is_due).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn late(account: &str, percent: u8) -> Late {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap();
        Late { identity, percent, until: UNIX_EPOCH, error: "away".into() }
    }

    #[test]
    fn each_identity_is_told_at_each_share_once_and_again_after_all_was_well() {
        let mut told = Told::default();
        let [a50, a25, b50] = [late("a", 50), late("a", 25), late("b", 50)];
        for (all, due) in [
            (vec![], vec![]),
            (vec![a50.clone()], vec![a50.clone()]),
            (vec![a50.clone(), b50.clone()], vec![b50.clone()]),
            (vec![a25.clone(), b50.clone()], vec![a25.clone()]),
            (vec![a25, b50.clone()], vec![]),
            (vec![b50.clone()], vec![]),
            (vec![b50, a50.clone()], vec![a50]),
        ] {
            assert_eq!(told.due(all.clone()), due, "{all:?}");
        }
    }
}
