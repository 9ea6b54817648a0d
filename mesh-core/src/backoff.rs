//! How long to wait before trying again.

use std::time::Duration;

/// Doubling delays between a first and a last one.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    last: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts with `first`, never exceeds `last`.
    pub fn new(first: Duration, last: Duration) -> Self {
        Self { first, last, next: first }
    }

    /// What Istio's data planes use for their control connections: 10 ms doubling to 15 s.
    pub fn control_plane() -> Self {
        Self::new(Duration::from_millis(10), Duration::from_secs(15))
    }

    /// The delay before the next try.
    pub fn delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).min(self.last);
        delay
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_last_and_starts_over() {
        let mut backoff = Backoff::control_plane();
        let delays: Vec<u128> = (0..13).map(|_| backoff.delay().as_millis()).collect();
        assert_eq!(delays, [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 15000, 15000]);
        backoff.reset();
        assert_eq!(backoff.delay().as_millis(), 10);
    }
}
