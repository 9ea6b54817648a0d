//! One tunnelled connection as ordinary bytes.
//!
//! Small writes are gathered until `poll_flush`, which the copy loop calls whenever it has nothing more to read: a
//! frame for each write of a chatty app would cost both proxies more than its bytes do. So whoever writes here by hand
//! must flush.
//!
//! **Invariant:** shutdown is END_STREAM and the end of the peer's bytes is its END_STREAM; the two directions end
//! independently. A reset with NO_ERROR or CANCEL reads as the end too (so Istio's proxies end connections); our own
//! tell an abort with CONNECT_ERROR (RFC 9113 8.5), which reads as a broken connection, and that policy wants it with
//! INADEQUATE_SECURITY (7): once a stream was answered 200 there is no place for words.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::client::Lease;
use super::window::Window;
use crate::copy::Carried;
use crate::tls::Broken;

/// Gathered bytes that are handed to HTTP/2 without waiting for a flush; at most a window's share is gathered.
const HAND_OVER: usize = 16 * 1024;

/// See the module. Dropping it before it was shut down aborts it; after that, what the peer still sends is refused
/// (CANCEL).
#[derive(Debug)]
pub struct HboneStream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// Received, not yet read.
    unread: Unread,
    /// Written, not yet handed to HTTP/2.
    gathered: BytesMut,
    finished: bool,
    ended: Option<Ended>,
    window: Window,
    /// Why the connection below ended.
    broken: Broken,
    /// A client's place on its connection.
    _lease: Option<Lease>,
}

#[derive(Clone, Copy, Debug)]
enum Ended {
    Cleanly,
    Failed(io::ErrorKind),
    Denied,
}

/// In an I/O error: the peer's policy, which had allowed the connection, does not any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other end's policy does not allow it any more")]
pub struct DeniedByPeer;

fn is_denial(error: &h2::Error) -> bool {
    error.is_reset() && error.is_remote() && error.reason() == Some(Reason::INADEQUATE_SECURITY)
}

impl HboneStream {
    pub(super) fn new(
        send: SendStream<Bytes>,
        receive: RecvStream,
        window: Window,
        broken: Broken,
        lease: Option<Lease>,
    ) -> Self {
        let (unread, gathered) = (Unread::default(), BytesMut::new());
        Self { send, receive, unread, gathered, finished: false, ended: None, window, broken, _lease: lease }
    }

    /// Ends both directions at once, and tells the peer that this is not how they should have ended. Bytes that are
    /// still on their way may be lost.
    pub fn abort(&mut self) {
        self.reset(Reason::CONNECT_ERROR);
    }

    /// The same, and the peer learns that policy wants it: [`DeniedByPeer`].
    pub fn deny(&mut self) {
        self.reset(Reason::INADEQUATE_SECURITY);
    }

    fn reset(&mut self, reason: Reason) {
        self.finished = true;
        self.gathered = BytesMut::new();
        self.send.send_reset(reason);
    }

    /// An error of ours with what is known of its cause.
    fn error(&self, kind: io::ErrorKind) -> io::Error {
        match self.broken.reason() {
            Some(reason) => io::Error::new(kind, reason.clone()),
            None => kind.into(),
        }
    }

    fn denied() -> io::Error {
        io::Error::new(io::ErrorKind::PermissionDenied, DeniedByPeer)
    }

    /// To a writer, a peer that has gone for whatever reason but policy is a broken pipe.
    fn write_error(&self, error: &h2::Error) -> io::Error {
        match self.broken.reason() {
            Some(_) => self.error(io::ErrorKind::BrokenPipe),
            None if is_denial(error) => Self::denied(),
            None => io::Error::new(io::ErrorKind::BrokenPipe, error.to_string()),
        }
    }

    /// Of a stream that takes nothing any more.
    fn reset_error(&mut self, cx: &mut Context<'_>) -> io::Error {
        match self.send.poll_reset(cx) {
            Poll::Ready(Ok(Reason::INADEQUATE_SECURITY)) => Self::denied(),
            _ => self.error(io::ErrorKind::BrokenPipe),
        }
    }

    /// Hands over all that is gathered, as the peer's window allows.
    fn poll_hand_over(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.is_empty() {
            self.send.reserve_capacity(self.gathered.len());
            let capacity = self.send.capacity();
            if capacity == 0 {
                match ready!(self.send.poll_capacity(cx)) {
                    Some(Ok(_)) => continue,
                    Some(Err(error)) => return Poll::Ready(Err(self.write_error(&error))),
                    None => return Poll::Ready(Err(self.reset_error(cx))),
                }
            }
            let bytes = self.gathered.split_to(capacity.min(self.gathered.len())).freeze();
            let sent = self.send.send_data(bytes, false);
            sent.map_err(|error| self.write_error(&error))?;
        }
        // Keeps no memory while the connection is idle.
        self.gathered = BytesMut::new();
        Poll::Ready(Ok(()))
    }

    /// Waits for the peer's next bytes; None at their end.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        match self.ended {
            Some(Ended::Cleanly) => return Poll::Ready(Ok(None)),
            Some(Ended::Failed(kind)) => return Poll::Ready(Err(self.error(kind))),
            Some(Ended::Denied) => return Poll::Ready(Err(Self::denied())),
            None => {}
        }
        let ended = match ready!(self.receive.poll_data(cx)) {
            Some(Ok(bytes)) => return Poll::Ready(Ok(Some(bytes))),
            None => Ended::Cleanly,
            Some(Err(error)) => match error.reason() {
                Some(Reason::NO_ERROR | Reason::CANCEL) if error.is_reset() => Ended::Cleanly,
                _ if is_denial(&error) => Ended::Denied,
                _ => Ended::Failed(error.get_io().map_or(io::ErrorKind::ConnectionReset, io::Error::kind)),
            },
        };
        self.ended = Some(ended);
        self.poll_more(cx)
    }
}

/// Flow control bounds the bytes that are taken over: none are given back to the peer's window before they are read.
impl Carried for HboneStream {
    fn settle(&mut self, cx: &mut Context<'_>) {
        // The end is remembered, and told once all before it is read.
        while let Poll::Ready(Ok(Some(bytes))) = self.poll_more(cx) {
            self.unread.keep(&bytes);
        }
    }
}

/// Received bytes, in a form that takes little more than they do: short frames are put together.
#[derive(Debug, Default)]
struct Unread {
    frames: VecDeque<Bytes>,
    /// After these.
    last: BytesMut,
}

/// Frames of so many bytes are kept as they are.
const LONG: usize = 1024;

impl Unread {
    fn is_empty(&self) -> bool {
        self.frames.is_empty() && self.last.is_empty()
    }

    fn keep(&mut self, bytes: &Bytes) {
        if bytes.len() < LONG {
            return self.last.extend_from_slice(bytes);
        }
        if !self.last.is_empty() {
            self.frames.push_back(std::mem::take(&mut self.last).freeze());
        }
        self.frames.push_back(bytes.clone());
    }

    /// The next bytes, as many as are at hand and fit.
    fn take(&mut self, buf: &mut ReadBuf<'_>) -> usize {
        if self.frames.is_empty() {
            self.frames.push_back(std::mem::take(&mut self.last).freeze());
        }
        let Some(first) = self.frames.front_mut() else { return 0 };
        let length = first.len().min(buf.remaining());
        buf.put_slice(&first[..length]);
        first.advance(length);
        if first.is_empty() {
            self.frames.pop_front();
            if self.frames.is_empty() {
                // Keeps no memory while the connection is idle.
                self.frames = VecDeque::new();
            }
        }
        length
    }
}

impl Drop for HboneStream {
    fn drop(&mut self) {
        // A task that is dropped half-way must not look like one that has finished.
        if !self.finished {
            self.abort();
        }
    }
}

impl AsyncRead for HboneStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        while buf.remaining() > 0 {
            if self.unread.is_empty() {
                match self.poll_more(cx) {
                    Poll::Ready(Ok(Some(bytes))) => self.unread.frames.push_back(bytes),
                    // What came before is delivered first; the end is remembered.
                    _ if buf.filled().len() > before => break,
                    Poll::Ready(Ok(None)) => break,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return Poll::Pending,
                }
            }
            let length = self.unread.take(buf);
            // Only bytes that were read may be replaced by others. After a reset there is no window to open.
            let _ = self.receive.flow_control().release_capacity(length);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HboneStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let most = self.window.gathered();
        if self.gathered.len() >= most {
            match self.poll_hand_over(cx) {
                Poll::Ready(handed_over) => handed_over?,
                Poll::Pending if self.gathered.len() < most => {}
                Poll::Pending => return Poll::Pending,
            }
        }
        let length = buf.len().min(most - self.gathered.len());
        self.gathered.extend_from_slice(&buf[..length]);
        if self.gathered.len() >= HAND_OVER
            && let Poll::Ready(Err(error)) = self.poll_hand_over(cx)
        {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(length))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_hand_over(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.finished {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_hand_over(cx))?;
        self.finished = true;
        let sent = self.send.send_data(Bytes::new(), true);
        Poll::Ready(sent.map_err(|error| self.write_error(&error)))
    }
}
