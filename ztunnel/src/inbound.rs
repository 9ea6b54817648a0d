//! Connections to pods over HBONE: terminate, authorize, connect, copy.
//!
//! **Invariant:** 200 is answered only after policy has allowed the connection and the application has accepted it.

pub mod admit;
pub mod authority;
pub mod near;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_core::addr::{ClientAddr, Target};
use mesh_core::authz::Connection;
use mesh_core::drain::Watch;
use mesh_core::hbone::server::{self, Handler, Incoming, TunnelError};
use mesh_core::hbone::{Baggage, ConnectRequest, InvalidRequest};
use mesh_core::identity::Identity;
use mesh_core::service::Service;
use mesh_core::workload::{Membership, Workload};
use tokio::net::TcpStream;

use self::admit::{Admitted, admit, exhausted};
use self::authority::Refusal;
use crate::metrics::Security;
use crate::pace::OfClient;
use crate::proxy::{Carrying, Pod, baggage, carrying, in_two_parts};
use crate::reason::{Cause, Phase, ProxyError, Side};
use crate::report::{Direction, Report};

/// Serves one tunnel that a peer opened to the pod.
pub async fn serve(pod: Arc<Pod>, drain: Watch, stream: TcpStream, client: SocketAddr) {
    let client = ClientAddr::from(client);
    let local = stream.local_addr();
    let mut place = pod.budget.handshake(client.ip());
    let pace = pod.proxy.pace.of(client.ip());
    let accepted = tokio::select! {
        biased;
        () = drain.closing() => Err(ProxyError::new(Phase::Handshake, Side::Local, Cause::Cut)),
        () = place.gave_way() => Err(ProxyError::new(Phase::Handshake, Side::Downstream, Cause::GaveWay)),
        accepted = Box::pin(accept(&pod, &pace, stream)) => accepted,
    };
    drop(place);
    match (accepted, local) {
        (Ok(tunnel), Ok(local)) => {
            let _share = match pod.budget.tunnel(client.ip()) {
                Ok(share) => share,
                Err(error) => {
                    refused(&pod, client, Some(local), exhausted(error));
                    return tunnel.refuse().await;
                }
            };
            let peer = tunnel.client().clone();
            let streams = Arrival {
                pod: pod.clone(),
                drain: drain.clone(),
                client,
                peer,
                local: local.ip().to_canonical(),
                security: Security::MutualTls,
            };
            // Its connections have told their own fate; this is about the connection below them.
            match Box::pin(tunnel.serve(streams, drain)).await {
                Err(error @ TunnelError::Abuse(_)) => {
                    pace.fine();
                    let error = ProxyError::new(Phase::Request, Side::Downstream, error);
                    refused(&pod, client, Some(local), error);
                }
                Err(error) => tracing::debug!(peer = %client, %error, "tunnel ended"),
                Ok(()) => {}
            }
        }
        (Err(error), local) => refused(&pod, client, local.ok(), error),
        (Ok(_), Err(error)) => {
            refused(&pod, client, None, ProxyError::local(Phase::Accept, "getsockname", error));
        }
    }
}

async fn accept(
    pod: &Pod,
    pace: &OfClient,
    stream: TcpStream,
) -> Result<server::Tunnel<TcpStream>, ProxyError> {
    let mut config = server::Config {
        wasted: pace.wasted.clone(),
        given_up: pace.given_up.clone(),
        frames: Some(Arc::new(pace.frames.clone())),
        ..server::Config::default()
    };
    tokio::time::timeout(config.handshake_timeout, pace.handshake())
        .await
        .map_err(|_| ProxyError::new(Phase::Handshake, Side::Downstream, Cause::TooFast))?;
    let certificate = pod
        .proxy
        .certificates
        .get(&pod.workload().identity)
        .await
        .map_err(|error| ProxyError::new(Phase::Handshake, Side::Local, error))?;
    config.window = pod.budget.window();
    server::handshake(stream, &certificate, config)
        .await
        .map_err(|error| ProxyError::new(Phase::Handshake, Side::Downstream, error))
}

/// A client that got no tunnel has its line and its count, too.
fn refused(pod: &Arc<Pod>, client: ClientAddr, local: Option<SocketAddr>, error: ProxyError) {
    let mut report = Report::new(pod, Direction::Inbound, client);
    report.facts.source.workload = pod.workload_at(client.ip());
    report.facts.destination.workload = Some(pod.workload());
    report.facts.destination.address = local;
    report.finish(&Err(error));
}

/// Waits until the pod's time is over.
async fn cut(drain: &Watch) -> ProxyError {
    drain.closing().await;
    ProxyError::new(Phase::Connect, Side::Local, Cause::Cut)
}

/// Who comes to which pod, and what is known of that; the same for all connections of a tunnel.
#[derive(Clone)]
struct Arrival {
    pod: Arc<Pod>,
    drain: Watch,
    client: ClientAddr,
    peer: Identity,
    local: IpAddr,
    security: Security,
}

impl Handler for Arrival {
    fn connect(self, incoming: Incoming) -> impl Future<Output = ()> + Send {
        in_two_parts(self.way(incoming))
    }

    fn malformed(&self, error: &InvalidRequest) {
        let report = self.report(&self.pod.workload(), None);
        report.finish(&Err(ProxyError::new(Phase::Request, Side::Downstream, error.clone())));
    }
}

impl Arrival {
    async fn way(self, mut incoming: Incoming) -> Option<Carrying> {
        let destination = self.pod.workload();
        let mut report = self.report(&destination, Some(incoming.request()));
        let dialled = tokio::select! {
            biased;
            error = cut(&self.drain) => Err(error),
            dialled = self.dial(&destination, &mut incoming, &mut report) => dialled,
        };
        let error = match dialled {
            Ok(Admitted { upstream, permit, occupied }) => match incoming.accept(&baggage(&destination)) {
                Ok(downstream) => {
                    return Some(carrying(downstream, upstream, report, self.drain, Some(permit), occupied));
                }
                Err(_) => ProxyError::new(Phase::Connect, Side::Downstream, Cause::Abandoned),
            },
            Err(error) => {
                self.paced(&mut incoming, &error).await;
                let policy = error.denial().and_then(|denial| denial.policy());
                incoming.refuse(error.status(), &error.cause.to_string(), policy.map(|policy| &**policy));
                error
            }
        };
        report.finish(&Err(error));
        None
    }

    /// A client that is refused much waits for it: each refusal is a decision, a count and a line in the log.
    async fn paced(&self, incoming: &mut Incoming, error: &ProxyError) {
        match &*error.cause {
            // Nobody who means well asks a pod for another's address.
            Cause::Refusal(Refusal::OtherAddress { .. }) => incoming.makes_no_sense(),
            // These are what an honest client may come upon, since its mesh is older, or its policy.
            Cause::Refusal(_) | Cause::Denied(_) => {
                let Some(wait) = self.pod.proxy.pace.of(self.client.ip()).refused.charge(1) else { return };
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = incoming.abandoned() => {}
                    () = self.drain.closing() => {}
                }
            }
            _ => {}
        }
    }

    async fn dial(
        &self,
        destination: &Workload,
        incoming: &mut Incoming,
        report: &mut Report,
    ) -> Result<Admitted, ProxyError> {
        let connection = self.check(destination, incoming.request(), report)?;
        tokio::select! {
            biased;
            // First: what is given up already shall cost nothing more.
            () = incoming.abandoned() => {
                Err(ProxyError::new(Phase::Connect, Side::Downstream, Cause::Abandoned))
            }
            admitted = admit(&self.pod, connection, report) => admitted,
        }
    }

    /// What is asked for, as far as it is this pod's.
    fn check(
        &self,
        destination: &Workload,
        request: &ConnectRequest,
        report: &mut Report,
    ) -> Result<Connection, ProxyError> {
        let target = authority::check(request, self.local, destination, &self.pod.proxy.mesh)
            .map_err(|refusal| ProxyError::new(Phase::Request, Side::Downstream, refusal))?;
        report.facts.destination.address = Some(target.get());
        report.facts.service = self.service(destination, request, target);
        Ok(Connection { peer: Some(self.peer.clone()), client: self.client, target })
    }

    fn report(&self, destination: &Arc<Workload>, request: Option<&ConnectRequest>) -> Report {
        let mut report = Report::new(&self.pod, Direction::Inbound, self.client);
        let facts = &mut report.facts;
        facts.security = self.security;
        // The address may be a gateway's or already another pod's: only a workload of the proved identity is meant.
        facts.source.workload =
            self.pod.workload_at(self.client.ip()).filter(|known| known.identity == self.peer);
        if facts.source.workload.is_none() {
            facts.source.baggage = request.map(|request| Box::new(self.said(&request.baggage)));
        }
        facts.source.identity = Some(self.peer.clone());
        facts.destination.workload = Some(destination.clone());
        facts.destination.identity = Some(destination.identity.clone());
        report
    }

    /// What a peer says of itself, unless it contradicts what it proved.
    fn said(&self, baggage: &Baggage) -> Baggage {
        Baggage { namespace: Some(self.peer.namespace().to_owned()), ..baggage.clone() }
    }

    /// The service that the client dialled, if it says so and the pod is a part of it; else the first with the port.
    fn service(
        &self,
        destination: &Workload,
        request: &ConnectRequest,
        target: Target,
    ) -> Option<Arc<Service>> {
        let mesh = &self.pod.proxy.mesh;
        let host = request.forwarded.as_ref().and_then(|forwarded| forwarded.host.as_deref());
        let mut services = destination.services.iter().filter_map(|member| {
            mesh.service(&member.service.namespace, &member.service.hostname).map(|s| (member, s))
        });
        let serves = |member: &Membership, service: &Service| {
            let own = member.ports.iter().any(|(_, port)| *port == target.port());
            own || service.ports.iter().any(|port| port.target == Some(target.port()))
        };
        let dialled = host.and_then(|host| services.clone().find(|(m, _)| &*m.service.hostname == host));
        let chosen = dialled.or_else(|| services.find(|(member, entry)| serves(member, &entry.service)));
        chosen.map(|(_, entry)| entry.service.clone())
    }
}
