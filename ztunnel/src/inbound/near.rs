//! Connections from a pod that this process serves to another: one copy loop between two sockets on lo, without TLS and
//! HTTP/2, which would only hide the bytes from the process that carries them.
//!
//! Who the client is needs no proof: it is known in which pod's network namespace its connection was accepted. The way
//! in is the tunnel's in everything else, and the server's side has its own log line and series.
//! **Invariant:** used only where no network policy could have a say, since nothing passes the network here, and while
//! no certificate can be revoked, since none is shown.

use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::task::Poll;

use mesh_core::addr::ClientAddr;
use mesh_core::copy::{Carried, Meter, Side as From};
use mesh_core::drain::Watch;
use mesh_core::hbone::ConnectRequest;
use mesh_core::identity::Identity;
use mesh_core::tls::revocation::Revocations;

use super::admit::{Admitted, admit};
use super::{Arrival, cut};
use crate::metrics::Security;
use crate::neighbours::Neighbour;
use crate::policy;
use crate::proxy::{Abort, carry};
use crate::reason::{Cause, ProxyError};
use crate::report::Report;

/// A connection that the server's side has let in.
pub struct Arrived {
    admitted: Admitted,
    report: Report,
    drain: Watch,
    revocations: Revocations,
}

/// Lets a connection of `peer` in, which is asked for as in a tunnel; `local` is the pod's address that was chosen.
///
/// # Errors
/// As in a tunnel; the server's side has told of it then.
pub async fn arrive(
    neighbour: Neighbour,
    peer: Identity,
    client: ClientAddr,
    request: &ConnectRequest,
    local: IpAddr,
) -> Result<Arrived, ProxyError> {
    let Neighbour { pod, drain } = neighbour;
    let arrival = Arrival { pod, drain: drain.clone(), client, peer, local, security: Security::SameNode };
    let destination = arrival.pod.workload();
    let revocations = arrival.pod.proxy.revocations.clone();
    let mut report = arrival.report(&destination, Some(request));
    let admitted = async {
        let connection = arrival.check(&destination, request, &mut report)?;
        admit(&arrival.pod, connection, &mut report).await
    };
    let admitted = tokio::select! {
        biased;
        error = cut(&drain) => Err(error),
        admitted = admitted => admitted,
    };
    match admitted {
        Ok(admitted) => Ok(Arrived { admitted, report, drain, revocations }),
        Err(error) => {
            report.failed(&error);
            Err(error)
        }
    }
}

impl Arrived {
    /// Carries the bytes of the client's connection, whose side counts them with `meter`; either pod's end is its end.
    ///
    /// # Errors
    /// As `proxy::carry`.
    pub async fn carry<Down>(
        mut self: Box<Self>,
        mut stream: Down,
        meter: &Report,
        drain: &Watch,
    ) -> Result<(), ProxyError>
    where
        Down: Carried + Abort,
    {
        let result = {
            let Self { admitted: Admitted { upstream, permit, .. }, report, drain: own, revocations } =
                &mut *self;
            let (mut closing, mut own_closing) = (pin!(drain.closing()), pin!(own.closing()));
            let mut revoked = pin!(policy::revoked(Some(&*permit)));
            // Also if they came since the way was chosen.
            let mut needs_tunnel = revocations.are_configured().then(|| Box::pin(revocations.in_force()));
            let cut = poll_fn(|cx| {
                if closing.as_mut().poll(cx).is_ready() || own_closing.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Cause::Cut);
                }
                if needs_tunnel.as_mut().is_some_and(|needs| needs.as_mut().poll(cx).is_ready()) {
                    return Poll::Ready(Cause::NeedsTunnel);
                }
                revoked.as_mut().poll(cx).map(Cause::Revoked)
            });
            carry(&mut stream, upstream, &Both(meter, report), cut).await
        };
        let Self { admitted, report, .. } = *self;
        drop((stream, admitted));
        report.finish(&result);
        result
    }
}

/// Counts in the accounts of both sides.
struct Both<'a>(&'a Report, &'a Report);

impl Meter for Both<'_> {
    fn carried(&self, side: From, bytes: u64) {
        self.0.carried(side, bytes);
        self.1.carried(side, bytes);
    }

    fn most_at_once(&self) -> usize {
        self.0.most_at_once().min(self.1.most_at_once())
    }
}
