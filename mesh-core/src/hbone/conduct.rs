//! How a peer behaves on its connection: what it sends that serves nothing is counted, and too much of it ends the
//! connection.
//!
//! **Invariant:** one peer's frames take a bounded time before other tasks get their turn, whatever it sends.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use super::allowance::Allowance;
use super::frames::Frames;

/// Frames that carry nothing, at once and a second. A peer that pings for keep-alive sends one in ten seconds, one that
/// opens windows as bytes are taken (and in large steps) none.
const CHATTER: (u32, u32) = (2000, 500);
/// Frames that are dealt with before other tasks get their turn: some ten microseconds.
const TURN: u32 = 256;

/// Too much of what serves nothing; for people.
pub(super) type Abuse = &'static str;
const TOO_MUCH_CHATTER: Abuse = "too many frames that carry nothing";
pub(super) const TOO_MUCH_WASTE: Abuse = "too many requests given up or malformed";
/// What h2 counts: resets before a request was looked at, streams over the limit, heads without end, unread short frames.
pub(super) const TOO_MUCH_FOR_HTTP2: Abuse =
    "more resets, refused streams, header fields or short frames than HTTP/2 is to bear";

/// What is known of one peer's conduct; clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Conduct {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    abuse: OnceLock<Abuse>,
    told: Notify,
    settled: AtomicBool,
    wasted: Allowance,
}

impl Conduct {
    /// Of a peer that may waste so much of our work.
    pub(super) fn new(wasted: Allowance) -> Self {
        let (abuse, told, settled) = (OnceLock::new(), Notify::new(), AtomicBool::new(false));
        Self { shared: Arc::new(Shared { abuse, told, settled, wasted }) }
    }

    /// Some work was for nothing.
    pub(super) fn wasted(&self) {
        if self.shared.wasted.take(1).is_err() {
            self.abuse(TOO_MUCH_WASTE);
        }
    }

    fn abuse(&self, what: Abuse) {
        let _ = self.shared.abuse.set(what);
        self.shared.told.notify_one();
    }

    fn is_abuse(&self) -> bool {
        self.shared.abuse.get().is_some()
    }

    /// Completes when it is too much. For one who waits.
    pub(super) async fn abused(&self) -> Abuse {
        loop {
            if let Some(what) = self.shared.abuse.get() {
                return what;
            }
            self.shared.told.notified().await;
        }
    }

    /// Whether the peer has acknowledged settings.
    pub(super) fn is_settled(&self) -> bool {
        self.shared.settled.load(Ordering::Relaxed)
    }
}

/// A connection below HTTP/2 that watches what the peer sends. Once that is abuse no more is read.
#[derive(Debug)]
pub(super) struct Watched<IO> {
    io: IO,
    frames: Frames,
    chatter: Allowance,
    /// Frames of which others have not had their turn yet.
    owed: u32,
    conduct: Conduct,
}

impl<IO> Watched<IO> {
    pub(super) fn new(io: IO, frames: Frames, conduct: Conduct) -> Self {
        let chatter = Allowance::new(CHATTER.0, CHATTER.1);
        Self { io, frames, chatter, owed: 0, conduct }
    }

    fn watch(&mut self, bytes: &[u8]) {
        let seen = self.frames.read(bytes);
        self.owed += seen.frames;
        if seen.settled {
            self.conduct.shared.settled.store(true, Ordering::Relaxed);
        }
        if seen.chatter > 0 && self.chatter.take(seen.chatter).is_err() {
            self.conduct.abuse(TOO_MUCH_CHATTER);
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Watched<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.conduct.is_abuse() {
            // Whoever waits for that has been told.
            return Poll::Pending;
        }
        if self.owed >= TURN {
            self.owed -= TURN;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.watch(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Watched<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
