//! How many bytes one stream may hold in this process. Whoever shares memory among connections says so, and may say
//! otherwise later: open tunnels follow (SETTINGS_INITIAL_WINDOW_SIZE, RFC 9113 6.9.2).

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// Bytes, by default and at most: 8 Gb/s at a round trip of 1 ms. Istio has 4 MiB here and 16 MiB for the connection,
/// where four stalled readers stop the rest.
pub const LARGEST: u32 = 1 << 20;
/// Bytes, at least: 250 Mb/s at a round trip of 1 ms.
pub const SMALLEST: u32 = 32 << 10;

/// Only one change may be under way; the next is tried after this.
const RETRY: Duration = Duration::from_millis(500);
/// A peer that does not acknowledge a change for so many tries breaks the protocol (RFC 9113 6.5.3).
const TRIES: u32 = 20;

/// What one stream may hold; clones are the same.
#[derive(Clone, Debug)]
pub struct Window {
    bytes: watch::Receiver<u32>,
}

impl Window {
    /// As large as the sender says, within [`SMALLEST`] and [`LARGEST`].
    pub fn following(bytes: watch::Receiver<u32>) -> Self {
        Self { bytes }
    }

    /// Bytes of one stream that a peer may have sent and nobody has taken yet.
    pub fn now(&self) -> u32 {
        (*self.bytes.borrow()).clamp(SMALLEST, LARGEST)
    }

    /// Bytes that may be gathered before they are sent, or be left over of one read.
    pub fn gathered(&self) -> usize {
        self.now() as usize / 4
    }

    /// Bytes that HTTP/2 may queue of one stream.
    pub(super) fn queued(&self) -> usize {
        self.now() as usize / 2
    }
}

impl Default for Window {
    /// [`LARGEST`], for ever.
    fn default() -> Self {
        Self { bytes: watch::channel(LARGEST).1 }
    }
}

/// Brings one tunnel's streams to the window that is wanted.
#[derive(Debug)]
pub(super) struct Resizing {
    window: Window,
    current: u32,
    tries: u32,
    not_before: Instant,
}

/// The peer does not acknowledge settings.
#[derive(Debug)]
pub(super) struct Unacknowledged;

impl Resizing {
    /// The tunnel was made with a window of `current`.
    pub(super) fn new(window: Window, current: u32) -> Self {
        Self { window, current, tries: 0, not_before: Instant::now() }
    }

    /// Waits until the streams should have another window. May be dropped while waiting.
    pub(super) async fn due(&mut self) -> u32 {
        tokio::time::sleep_until(self.not_before).await;
        loop {
            self.window.bytes.mark_unchanged();
            let wanted = self.window.now();
            if wanted != self.current {
                return wanted;
            }
            // An error: nobody is left who could change it.
            if self.window.bytes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// What came of asking for it.
    pub(super) fn asked(&mut self, wanted: u32, asked: Result<(), h2::Error>) -> Result<(), Unacknowledged> {
        if asked.is_ok() {
            (self.current, self.tries) = (wanted, 0);
            return Ok(());
        }
        self.tries += 1;
        self.not_before = Instant::now() + RETRY;
        if self.tries < TRIES { Ok(()) } else { Err(Unacknowledged) }
    }
}
