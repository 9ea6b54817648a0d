//! Carries bytes between two connections, each direction on its own until its end.
//!
//! No memory is kept for an idle connection: bytes are read into a buffer of the thread and kept only when the other
//! side does not take them at once. A direction that ends is passed on as a half-close; the other goes on.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Which of the two connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that was accepted.
    Downstream,
    /// The one that was dialled for it.
    Upstream,
}

/// A connection whose bytes are carried.
pub trait Carried: AsyncRead + AsyncWrite + Unpin {
    /// Called when nobody reads, since the other side takes nothing: what has arrived may be brought into a form that
    /// takes less memory. Wakes when more has come.
    fn settle(&mut self, _cx: &mut Context<'_>) {}
}

impl Carried for tokio::net::TcpStream {}
impl Carried for tokio::io::DuplexStream {}

impl<T: Carried> Carried for &mut T {
    fn settle(&mut self, cx: &mut Context<'_>) {
        (**self).settle(cx);
    }
}

/// Told of bytes when they have been written to the other side.
pub trait Meter: Send + Sync {
    /// `bytes` more came from `side`.
    fn carried(&self, side: Side, bytes: u64);

    /// Bytes that may be read at once: so much may be left over when the other side stops taking them.
    fn most_at_once(&self) -> usize {
        usize::MAX
    }
}

/// The simplest meter; readable at any time.
#[derive(Debug, Default)]
pub struct Traffic {
    from_downstream: AtomicU64,
    from_upstream: AtomicU64,
}

impl Traffic {
    /// Bytes that came from `side` so far.
    pub fn from(&self, side: Side) -> u64 {
        match side {
            Side::Downstream => self.from_downstream.load(Ordering::Relaxed),
            Side::Upstream => self.from_upstream.load(Ordering::Relaxed),
        }
    }
}

impl Meter for Traffic {
    fn carried(&self, side: Side, bytes: u64) {
        let counter = match side {
            Side::Downstream => &self.from_downstream,
            Side::Upstream => &self.from_upstream,
        };
        counter.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// How it ended.
#[derive(Debug)]
pub enum Outcome<Reason> {
    /// Both sides have ended; which one did first.
    Finished {
        /// First to end.
        first: Side,
    },
    /// A connection broke. Bytes that it had sent before were handed to the other one, those for it are lost.
    Broken {
        /// Which one.
        side: Side,
        /// How.
        error: io::Error,
    },
    /// We ended it.
    Cancelled(Reason),
}

/// Copies both ways until both directions have ended, a connection breaks, or `cancel` completes. Pass `&mut` of a
/// connection that is to be treated specially afterwards, e.g. reset because the other one broke.
pub async fn both<Down, Up, Reason>(
    mut downstream: Down,
    mut upstream: Up,
    meter: &impl Meter,
    cancel: impl Future<Output = Reason>,
) -> Outcome<Reason>
where
    Down: Carried,
    Up: Carried,
{
    let mut request = Direction::new(Side::Downstream);
    let mut response = Direction::new(Side::Upstream);
    let mut first = None;
    let copying = poll_fn(|cx| {
        // A reset is told by the kernel once, here to the writer: from then on the connection reads as if it had ended.
        let there = request.poll(cx, &mut downstream, &mut upstream, meter)?.is_ready();
        response.source_reset |= request.sink_reset();
        let back = response.poll(cx, &mut upstream, &mut downstream, meter)?.is_ready();
        request.source_reset |= response.sink_reset();
        first = first.or(match (there, back) {
            (true, _) => Some(request.ended_by()),
            (false, true) => Some(response.ended_by()),
            (false, false) => None,
        });
        match first {
            Some(first) if there && back => Poll::Ready(Ok::<_, Failed>(first)),
            _ => Poll::Pending,
        }
    });
    tokio::select! {
        biased;
        reason = cancel => Outcome::Cancelled(reason),
        copied = copying => match copied {
            Ok(first) => Outcome::Finished { first },
            Err(Failed { side, error }) => Outcome::Broken { side, error },
        },
    }
}

/// Bytes read at once at first, and after so many bytes of the connection: bulk pays for larger reads, chat does not.
const STEPS: [(u64, usize); 3] = [(10 << 20, 256 * 1024), (128 << 10, 64 * 1024), (0, 8 * 1024)];

/// Reads in a row before other tasks of the thread get their turn.
const TURN: u32 = 32;

thread_local! {
    /// Lent to one read at a time.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

struct Failed {
    side: Side,
    error: io::Error,
}

/// One direction: what `source` sends.
struct Direction {
    source: Side,
    /// Read, not yet taken by the other side.
    left: Vec<u8>,
    written: usize,
    total: u64,
    unflushed: bool,
    /// A write to the source has found it reset.
    source_reset: bool,
    phase: Phase,
}

enum Phase {
    Copying,
    /// The source has ended: the sink is told.
    Closing,
    /// The source has broken: what it sent before is still passed on.
    Breaking(io::Error),
    Done,
    /// The sink takes no more. What it has sent itself is the other direction's business, which ends by itself.
    SinkGone(io::ErrorKind),
}

impl Direction {
    fn new(source: Side) -> Self {
        Self {
            source,
            left: Vec::new(),
            written: 0,
            total: 0,
            unflushed: false,
            source_reset: false,
            phase: Phase::Copying,
        }
    }

    fn sink_reset(&self) -> bool {
        matches!(self.phase, Phase::SinkGone(io::ErrorKind::ConnectionReset))
    }

    fn sink(&self) -> Side {
        match self.source {
            Side::Downstream => Side::Upstream,
            Side::Upstream => Side::Downstream,
        }
    }

    fn ended_by(&self) -> Side {
        if matches!(self.phase, Phase::SinkGone(_)) { self.sink() } else { self.source }
    }

    fn poll<R: Carried, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        meter: &impl Meter,
    ) -> Result<Poll<()>, Failed> {
        match self.phase {
            Phase::Done => return Ok(Poll::Ready(())),
            Phase::SinkGone(_) => {
                reader.settle(cx);
                return Ok(Poll::Ready(()));
            }
            _ => {}
        }
        match self.poll_io(cx, reader, writer, meter) {
            Poll::Pending => {
                if !self.left.is_empty() {
                    reader.settle(cx);
                }
                Ok(Poll::Pending)
            }
            Poll::Ready(Ok(())) => {
                self.phase = Phase::Done;
                Ok(Poll::Ready(()))
            }
            Poll::Ready(Err(failed)) if failed.side == self.sink() && is_gone(&failed.error) => {
                self.phase = Phase::SinkGone(failed.error.kind());
                // The other direction has to learn of it.
                cx.waker().wake_by_ref();
                Ok(Poll::Ready(()))
            }
            Poll::Ready(Err(failed)) => Err(failed),
        }
    }

    fn poll_io<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        meter: &impl Meter,
    ) -> Poll<Result<(), Failed>> {
        for _ in 0..TURN {
            ready!(self.poll_left(cx, writer, meter))?;
            match &mut self.phase {
                Phase::Copying => match self.poll_read(cx, reader, writer, meter) {
                    Poll::Ready(read) => read?,
                    Poll::Pending => {
                        ready!(self.poll_flush(cx, writer))?;
                        return Poll::Pending;
                    }
                },
                Phase::Closing => {
                    let closed = ready!(Pin::new(writer).poll_shutdown(cx));
                    return Poll::Ready(closed.map_err(|error| self.write_failed(error)));
                }
                Phase::Breaking(error) => {
                    let error = std::mem::replace(error, io::ErrorKind::ConnectionReset.into());
                    if self.poll_flush(cx, writer).is_pending() {
                        self.phase = Phase::Breaking(error);
                        return Poll::Pending;
                    }
                    return Poll::Ready(Err(Failed { side: self.source, error }));
                }
                Phase::Done | Phase::SinkGone(_) => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_flush<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Poll<Result<(), Failed>> {
        if self.unflushed {
            ready!(Pin::new(writer).poll_flush(cx)).map_err(|error| self.write_failed(error))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what an earlier turn could not.
    fn poll_left<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
        meter: &impl Meter,
    ) -> Poll<Result<(), Failed>> {
        while self.written < self.left.len() {
            let polled = Pin::new(&mut *writer).poll_write(cx, &self.left[self.written..]);
            let written = self.count(ready!(polled), meter)?;
            self.written += written;
        }
        if !self.left.is_empty() {
            self.left = Vec::new();
            self.written = 0;
        }
        Poll::Ready(Ok(()))
    }

    /// One read, and as much of it written as the other side takes at once.
    fn poll_read<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        meter: &impl Meter,
    ) -> Poll<Result<(), Failed>> {
        let size = STEPS.iter().find(|(from, _)| self.total >= *from).map_or(8 * 1024, |(_, size)| *size);
        let size = size.min(meter.most_at_once()).max(1024);
        let mut buffer = BUFFER.take();
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        let mut read = ReadBuf::new(&mut buffer[..size]);
        let polled = Pin::new(reader).poll_read(cx, &mut read);
        let length = read.filled().len();
        let result = match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) if length == 0 => {
                self.phase = if self.source_reset {
                    Phase::Breaking(io::ErrorKind::ConnectionReset.into())
                } else {
                    Phase::Closing
                };
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Ok(())) => Poll::Ready(self.write_now(cx, &buffer[..length], writer, meter)),
            Poll::Ready(Err(error)) => {
                self.phase = Phase::Breaking(error);
                Poll::Ready(Ok(()))
            }
        };
        BUFFER.set(buffer);
        result
    }

    fn write_now<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        mut bytes: &[u8],
        writer: &mut W,
        meter: &impl Meter,
    ) -> Result<(), Failed> {
        while !bytes.is_empty() {
            match Pin::new(&mut *writer).poll_write(cx, bytes) {
                Poll::Ready(written) => {
                    let written = self.count(written, meter)?;
                    bytes = &bytes[written..];
                }
                Poll::Pending => {
                    self.left = bytes.to_vec();
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, written: io::Result<usize>, meter: &impl Meter) -> Result<usize, Failed> {
        match written {
            Ok(0) => Err(self.write_failed(io::ErrorKind::WriteZero.into())),
            Ok(written) => {
                self.unflushed = true;
                self.total += written as u64;
                meter.carried(self.source, written as u64);
                Ok(written)
            }
            Err(error) => Err(self.write_failed(error)),
        }
    }

    fn write_failed(&self, error: io::Error) -> Failed {
        Failed { side: self.sink(), error }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}

#[cfg(test)]
mod tests;
