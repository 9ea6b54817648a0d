//! HTTP/2 settings of both ends, and the pings that find a dead peer.
//!
//! **Invariant:** the connection's window is that of all its streams together, so a reader that has stopped reading
//! holds up its own stream and no other; what it can make us keep is one stream window.

use std::time::Duration;

use h2::{Ping, PingPong};

use super::conduct::Conduct;
use super::window::{self, Window};

/// Streams that a server takes at once on one connection.
pub const MAX_STREAMS: u32 = 200;
/// See the module.
const CONNECTION_WINDOW: u32 = MAX_STREAMS * window::LARGEST;
/// Largest frame that we take, in bytes: fewer frames for bulk. A frame is kept until it is whole, so it is never larger
/// than what a stream may hold.
const MAX_FRAME: u32 = 1 << 20;
/// Request heads are small: an authority, baggage and a few identifiers.
const CLIENT_HEADER_LIST: u32 = 16 * 1024;
/// Istio's servers take as much.
const SERVER_HEADER_LIST: u32 = 64 * 1024;
/// What unread frames may cost beside their bytes before h2 closes the connection as abuse, in bytes, however small the
/// window; it counts up to 256 for a frame that is shorter, which is about what it takes. Streams whose other side takes
/// nothing do not leave them there (`HboneStream::settle`), so this is about those that come before one's task has its
/// turn: a burst of small writes is no abuse, nor is one on each of a connection's streams where processors are busy.
const DATA_FRAME_BUDGET: usize = 4 << 20;
/// Clients that give up before they are answered are no attack as long as each holds a stream.
const PENDING_RESETS: usize = MAX_STREAMS as usize;
/// Streams that we reset and still know, so that what was under way for them is ignored.
const RESET_STREAMS: usize = MAX_STREAMS as usize;
/// Streams that a peer may open against the rules (over the limit, malformed) in the life of a connection.
const LOCAL_ERRORS: usize = 1024;

/// Time for the TLS handshake and the HTTP/2 preface together.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// When to ask whether the peer is alive.
#[derive(Clone, Copy, Debug)]
pub struct KeepAlive {
    /// Time between two pings, on busy connections too.
    pub interval: Duration,
    /// Time for the answer.
    pub timeout: Duration,
}

impl Default for KeepAlive {
    fn default() -> Self {
        Self { interval: Duration::from_secs(10), timeout: Duration::from_secs(20) }
    }
}

pub(super) fn client(window: &Window) -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(window.now())
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(window.now().min(MAX_FRAME))
        .max_header_list_size(CLIENT_HEADER_LIST)
        .max_send_buffer_size(window.queued())
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(Some(LOCAL_ERRORS))
        .data_frame_budget(DATA_FRAME_BUDGET);
    builder
}

pub(super) fn server(max_streams: u32, window: &Window) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(max_streams)
        .initial_window_size(window.now())
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(window.now().min(MAX_FRAME))
        .max_header_list_size(SERVER_HEADER_LIST)
        .max_send_buffer_size(window.queued())
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(Some(LOCAL_ERRORS))
        .data_frame_budget(DATA_FRAME_BUDGET);
    builder
}

/// Why a peer is given up.
#[derive(Clone, Copy, Debug)]
pub(super) enum Dead {
    /// It does not answer a ping in time.
    Silent,
    /// It has answered one, but not our settings, which came first (RFC 9113 6.5.3).
    Unsettled,
}

/// Pings until the peer does not answer in time; then it is dead and this returns.
pub(super) async fn until_dead(pings: Option<PingPong>, keep_alive: KeepAlive, conduct: &Conduct) -> Dead {
    // h2 hands them out once, and nobody else asks.
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        tokio::time::sleep(keep_alive.interval).await;
        match tokio::time::timeout(keep_alive.timeout, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) if conduct.is_settled() => {}
            Ok(Ok(_)) => return Dead::Unsettled,
            // The connection is over; whoever drives it says why.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return Dead::Silent,
        }
    }
}
