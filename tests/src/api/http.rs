//! The transport: accepts TCP, speaks TLS and HTTP/1.1 or HTTP/2, finds out who the caller is, and hands each
//! request to `serve`. Outages that tests ask for happen here.
//! **Invariant:** a request is authenticated before anything of it but its line and headers is looked at.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderValue, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use mesh_core::{drain, listener};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::token::{API_AUDIENCE, Tokens, User};
use super::{Availability, Shared, Status, pki, serve};

/// How long a client may take for the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What serving needs.
pub(super) struct Server {
    pub(super) shared: Arc<Shared>,
    pub(super) tokens: Arc<Tokens>,
}

/// Accepts until the drain starts or the runtime ends.
pub(super) async fn accept(
    server: Arc<Server>,
    listener: TcpListener,
    tls: TlsAcceptor,
    drain: drain::Watch,
) {
    let serve = move |stream: TcpStream, _: SocketAddr| connection(server, stream, tls);
    listener::serve(listener, serve, drain).await;
}

/// Serves one connection until it ends or the server is told to refuse.
async fn connection(server: Arc<Server>, stream: TcpStream, tls: TlsAcceptor) {
    let mut availability = server.shared.availability.subscribe();
    let refused = async { drop(availability.wait_for(|now| *now == Availability::Refuse).await) };
    tokio::select! {
        biased;
        () = refused => {}
        () = serve_connection(server.clone(), stream, tls) => {}
    }
}

async fn serve_connection(server: Arc<Server>, stream: TcpStream, tls: TlsAcceptor) {
    // Small answers must not wait for acknowledgements; a socket that refuses this still works.
    drop(stream.set_nodelay(true));
    let Ok(Ok(stream)) = timeout(HANDSHAKE, tls.accept(stream)).await else { return };
    let certificates = stream.get_ref().1.peer_certificates();
    let certified = certificates.and_then(|chain| pki::user_of(chain.first()?));
    let service = hyper::service::service_fn(move |request| {
        let (server, certified) = (server.clone(), certified.clone());
        async move { Ok::<_, Infallible>(answer(&server, certified, request).await) }
    });
    let io = TokioIo::new(stream);
    // How a connection ends is the client's business.
    drop(auto::Builder::new(TokioExecutor::new()).serve_connection(io, service).await);
}

async fn answer(server: &Server, certified: Option<User>, request: Request<Incoming>) -> Response<Body> {
    // Copied out: a borrow held across an await would block whoever sets it.
    let availability = *server.shared.availability.borrow();
    match availability {
        Availability::Up => {}
        Availability::Fail(code) => return refusal(&Status::unavailable(code)),
        // The connection is about to be dropped; what arrived before gets no answer.
        Availability::Refuse => std::future::pending().await,
    }
    let authorization = request.headers().get(AUTHORIZATION);
    let user = match authenticate(server, certified, authorization) {
        Ok(user) => user,
        Err(status) => return refusal(&status),
    };
    match serve::request(server, &user, request).await {
        Ok(response) => response,
        Err(status) => refusal(&status),
    }
}

/// A bearer token counts before a client certificate; without either the caller is anonymous.
fn authenticate(
    server: &Server,
    certified: Option<User>,
    authorization: Option<&HeaderValue>,
) -> Result<User, Status> {
    let Some(header) = authorization else { return Ok(certified.unwrap_or_else(User::anonymous)) };
    let token = header.to_str().ok().and_then(|header| header.split_once(' '));
    let token =
        token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
    let cluster = server.shared.cluster();
    let checked = server.tokens.check(&cluster, token.unwrap_or_default(), &[API_AUDIENCE.to_owned()]);
    checked.map(|(user, _)| user).map_err(|_| Status::unauthorized())
}

/// The response for an error.
pub(super) fn refusal(status: &Status) -> Response<Body> {
    respond(status.code, "application/json", status.to_json().to_string().into())
}

/// A JSON response.
pub(super) fn json(code: u16, content_type: &'static str, value: &Value) -> Response<Body> {
    respond(code, content_type, value.to_string().into())
}

/// A response with a whole body.
pub(super) fn respond(code: u16, content_type: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Full::new(body).boxed_unsync());
    *response.status_mut() =
        http::StatusCode::from_u16(code).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
