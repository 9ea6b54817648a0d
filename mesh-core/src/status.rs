//! A small HTTP/1.1 server for what people and kubelets ask a daemon: probes, metrics, dumps.
//!
//! Parts register a handler under a path; the server knows none of them. Handlers are synchronous, they answer from a
//! snapshot.
//!
//! **Invariant:** what a stranger can make it hold is bounded: connections, header bytes and time each have a limit,
//! and request bodies are never read.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Display;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::readiness::Readiness;

/// Connections served at once; more wait in the kernel's accept queue.
const MAX_CONNECTIONS: usize = 64;
/// A client has this long to send the head of each request, and as long between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest life of one connection: a scraper that keeps it open reconnects.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(600);
/// Connections that wait in the kernel.
const BACKLOG: u32 = 1024;
/// Memory for the head of a request.
const HEAD_LIMIT: usize = 16 * 1024;

type Handler = dyn Fn(&Request<()>) -> Response<Bytes> + Send + Sync;

/// What is served under which path.
#[derive(Clone, Default)]
pub struct Handlers {
    by_path: BTreeMap<&'static str, (Method, Arc<Handler>)>,
}

impl Handlers {
    /// Serves nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers GET (and HEAD) of exactly `path` with `handler`.
    #[must_use]
    pub fn get(
        self,
        path: &'static str,
        handler: impl Fn(&Request<()>) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        self.on(Method::GET, path, handler)
    }

    /// Answers POST of exactly `path` with `handler`.
    #[must_use]
    pub fn post(
        self,
        path: &'static str,
        handler: impl Fn(&Request<()>) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        self.on(Method::POST, path, handler)
    }

    /// Adds `/healthz/ready`: 200, or 503 with what is pending and why, see [`Readiness::pending`].
    #[must_use]
    pub fn readiness(self, readiness: Readiness) -> Self {
        self.get("/healthz/ready", move |_| match readiness.pending() {
            pending if pending.is_empty() => text(StatusCode::OK, "ready\n"),
            pending => {
                text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready, pending: {}\n", pending.join(", ")))
            }
        })
    }

    /// Adds `/healthz/live`: 200 for as long as the runtime answers.
    #[must_use]
    pub fn liveness(self) -> Self {
        self.liveness_of(|| Ok::<_, Infallible>(()))
    }

    /// Adds `/healthz/live`: 200 for as long as the runtime answers and `check` finds nothing, else 500 with what it
    /// found; only for what a new process would mend.
    #[must_use]
    pub fn liveness_of<E: Display>(self, check: impl Fn() -> Result<(), E> + Send + Sync + 'static) -> Self {
        self.get("/healthz/live", move |_| match check() {
            Ok(()) => text(StatusCode::OK, "live\n"),
            Err(unwell) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{unwell}\n")),
        })
    }

    fn on(
        mut self,
        method: Method,
        path: &'static str,
        handler: impl Fn(&Request<()>) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        self.by_path.insert(path, (method, Arc::new(handler)));
        self
    }

    fn answer(&self, request: &Request<()>) -> Response<Bytes> {
        let Some((method, handler)) = self.by_path.get(request.uri().path()) else {
            let paths: Vec<_> = self.by_path.keys().copied().collect();
            return text(StatusCode::NOT_FOUND, format!("not found; there is: {}\n", paths.join(" ")));
        };
        if request.method() != method && !(request.method() == Method::HEAD && method == Method::GET) {
            let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, format!("use {method}\n"));
            if let Ok(value) = HeaderValue::from_str(method.as_str()) {
                refused.headers_mut().insert(ALLOW, value);
            }
            return refused;
        }
        handler(request)
    }
}

/// A plain text answer.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Bytes> {
    reply(status, "text/plain; charset=utf-8", body.into())
}

/// A JSON answer, indented for people. A value that cannot be serialised gives a 500 that says so.
pub fn json(value: &impl serde::Serialize) -> Response<Bytes> {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => reply(StatusCode::OK, "application/json", body.into()),
        Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot be shown as JSON: {e}\n")),
    }
}

/// An answer with the given media type.
pub fn reply(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Bytes> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Opens the listening socket, so that a taken port is reported before anything starts. `[::]` stands for all
/// addresses of both families, and of IPv4 alone where the kernel has no IPv6.
///
/// # Errors
/// With the address in the message.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let without_v6 = |error: &io::Error| error.raw_os_error() == Some(libc::EAFNOSUPPORT);
    let bound = match listen(address) {
        Err(error) if is_any(address) && without_v6(&error) => {
            listen((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        bound => bound,
    };
    bound.map_err(|e| io::Error::new(e.kind(), format!("cannot listen on {address}: {e}")))
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if is_any(address) {
        // Whatever `net.ipv6.bindv6only` says.
        socket2::SockRef::from(&socket).set_only_v6(false)?;
    }
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// `[::]`
fn is_any(address: SocketAddr) -> bool {
    address.ip() == Ipv6Addr::UNSPECIFIED
}

/// Serves until `shutdown` completes; open connections are closed then.
pub async fn serve(listener: TcpListener, handlers: Handlers, shutdown: impl Future<Output = ()>) {
    let handlers = Arc::new(handlers);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        tokio::select! {
            () = &mut shutdown => return,
            Some(_) = connections.join_next() => {}
            (accepted, place) = accepted => match accepted {
                Ok((stream, _)) => {
                    let handlers = handlers.clone();
                    connections.spawn(async move {
                        let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection(stream, handlers)).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "status server: accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn connection(stream: TcpStream, handlers: Arc<Handlers>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (head, _unread) = request.into_parts();
        let response = handlers.answer(&Request::from_parts(head, ()));
        async move { Ok::<_, Infallible>(response.map(Full::new)) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "status server: connection failed");
    }
}

#[cfg(test)]
mod tests;
