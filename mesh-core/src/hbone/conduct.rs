//! How a peer behaves on its connection: what it sends that serves nothing is counted, and too much of it ends the
//! connection. What serves something is not counted so, but takes time too: a client that sends more of it than it may
//! is read more slowly, over all its connections.
//!
//! **Invariant:** one peer's frames take a bounded time before other tasks get their turn, whatever it sends.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Sleep;

use super::frames::Frames;
use crate::allowance::Allowance;

/// Frames that carry nothing, at once and a second. A peer that pings for keep-alive sends one in ten seconds, one that
/// opens windows as bytes are taken (and in large steps) none.
const CHATTER: (u32, u32) = (2000, 500);
/// Frames that are dealt with before other tasks get their turn. It is asked before each read, which may bring as many
/// as there are in one TLS record: 1,800.
const TURN: u32 = 256;
/// A frame is as much work as so many bytes, more or less: larger ones are bulk, which is nobody's trouble.
const BULK: usize = 256;

/// Too much of what serves nothing; for people.
pub(super) type Abuse = &'static str;
const TOO_MUCH_CHATTER: Abuse = "too many frames that carry nothing";
pub(super) const TOO_MUCH_WASTE: Abuse = "too many requests that make no sense or are given up at once";
/// What h2 counts: resets before a request was looked at, streams over the limit, heads without end, unread short frames.
pub(super) const TOO_MUCH_FOR_HTTP2: Abuse =
    "more resets, refused streams, header fields or short frames than HTTP/2 is to bear";

/// Says how fast a client is read.
pub trait Pacer: std::fmt::Debug + Send + Sync {
    /// So many frames have been read of it; how long the next ones have to wait.
    fn charge(&self, frames: u32) -> Option<Duration>;
}

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
    /// What the peer may send, over all its connections.
    paced: Option<Arc<dyn Pacer>>,
    /// Until it may be read again.
    pause: Option<Pin<Box<Sleep>>>,
    /// Frames, and TLS records, of which others have not had their turn yet.
    owed: u32,
    conduct: Conduct,
}

impl<IO> Watched<IO> {
    pub(super) fn new(io: IO, frames: Frames, conduct: Conduct, paced: Option<Arc<dyn Pacer>>) -> Self {
        let chatter = Allowance::new(CHATTER.0, CHATTER.1);
        Self { io, frames, chatter, paced, pause: None, owed: 0, conduct }
    }

    /// What one read has brought: at most one TLS record, which takes as much as a frame.
    fn watch(&mut self, bytes: &[u8]) {
        let seen = self.frames.read(bytes);
        let bulk = u32::try_from(bytes.len() / BULK).unwrap_or(u32::MAX);
        self.owed += seen.frames.max(1).saturating_sub(bulk);
        if seen.settled {
            self.conduct.shared.settled.store(true, Ordering::Relaxed);
        }
        if seen.chatter > 0 && self.chatter.take(seen.chatter).is_err() {
            self.conduct.abuse(TOO_MUCH_CHATTER);
        }
    }
}

impl<IO> Watched<IO> {
    /// Ready unless others have their turn first, or the peer has had more than it may.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.owed >= TURN {
            let owed = std::mem::take(&mut self.owed);
            let wait = self.paced.as_ref().and_then(|paced| paced.charge(owed));
            let Some(wait) = wait else {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            };
            self.pause = Some(Box::pin(tokio::time::sleep(wait)));
        }
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        Poll::Ready(())
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
        ready!(self.poll_turn(cx));
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::test_http2 as http2;

    /// Each read brings one of these; then nothing comes.
    struct Records(VecDeque<Vec<u8>>);

    impl AsyncRead for Records {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let Some(record) = self.0.pop_front() else { return Poll::Pending };
            buf.put_slice(&record);
            Poll::Ready(Ok(()))
        }
    }

    impl Pacer for Allowance {
        fn charge(&self, frames: u32) -> Option<Duration> {
            Allowance::charge(self, frames)
        }
    }

    /// A client's bytes, one such piece in each record.
    fn watched(bytes: &[u8], record: usize, paced: Option<Allowance>) -> Watched<Records> {
        let records = bytes.chunks(record).map(<[u8]>::to_vec).collect();
        let paced = paced.map(|paced| Arc::new(paced) as Arc<dyn Pacer>);
        Watched::new(Records(records), Frames::of_server(), Conduct::new(Allowance::new(0, 1)), paced)
    }

    /// Reads within each turn until nothing comes.
    fn turns(mut watched: Watched<Records>) -> Vec<usize> {
        let (mut turns, mut buffer) = (vec![0], vec![0; 1 << 15]);
        while !watched.io.0.is_empty() {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            match Pin::new(&mut watched).poll_read(&mut cx, &mut ReadBuf::new(&mut buffer)) {
                Poll::Ready(read) => {
                    read.unwrap();
                    *turns.last_mut().unwrap() += 1;
                }
                Poll::Pending => turns.push(0),
            }
        }
        turns
    }

    #[tokio::test]
    async fn others_have_their_turn_between_frames_and_between_records() {
        let most = TURN as usize;
        let one = http2::frame(http2::kind::DATA, 0, 1, &[7; 100_000]);
        let small = turns(watched(&one, 1, None));
        assert!(small.len() > 300 && small.iter().all(|reads| *reads <= most), "{small:?}");
        assert_eq!(turns(watched(&one, 16_384, None)).len(), 1, "bulk needs no turns");
        let many = http2::frame(http2::kind::DATA, 0, 1, b"x").repeat(10_000);
        let many = turns(watched(&many, 100, None));
        assert!(many.iter().all(|reads| *reads <= most.div_ceil(10)), "{many:?}");
    }

    /// Whether all is read without a wait.
    fn at_once(frame: &[u8], count: usize, paced: &Allowance) -> bool {
        let mut watched = watched(&frame.repeat(count), 4 * frame.len(), Some(paced.clone()));
        let (mut cx, mut buffer) = (Context::from_waker(std::task::Waker::noop()), vec![0; 1 << 15]);
        while !watched.io.0.is_empty() && watched.pause.is_none() {
            let _ = Pin::new(&mut watched).poll_read(&mut cx, &mut ReadBuf::new(&mut buffer));
        }
        watched.pause.is_none()
    }

    #[tokio::test]
    async fn who_sends_more_frames_than_it_may_is_read_more_slowly_on_all_its_connections() {
        let frames = Allowance::new(5_000, 5_000);
        let [small, large] = [1, 4096].map(|size| http2::frame(http2::kind::DATA, 0, 1, &vec![7; size]));
        let begun = tokio::time::Instant::now();
        assert!(at_once(&small, 4_900, &frames));
        let mut all = vec![0; 2_000 * small.len()];
        watched(&small.repeat(2_000), 100, Some(frames.clone())).read_exact(&mut all).await.unwrap();
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(300), "{took:?}");
        assert!(!at_once(&small, 3_000, &frames), "on another connection");
        assert!(at_once(&large, 3_000, &frames), "bulk");
        assert!(at_once(&small, 4_900, &Allowance::new(5_000, 5_000)), "another client");
    }
}
