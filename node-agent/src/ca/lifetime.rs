//! How long a connection to the CA lives: until nobody has asked anything on it for a while, and never for long.
//!
//! **Invariant:** keepalives keep nothing alive; only a request in work does, and that has a deadline of its own.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// Bounds of a connection's life.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Without a request in work.
    pub idle: Duration,
    /// Altogether; the peer is asked to go then.
    pub age: Duration,
    /// From then on until a peer that stays is cut.
    pub grace: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { idle: IDLE, age: AGE, grace: super::REQUEST_DEADLINE }
    }
}

/// The requests of one connection that are in work. Clones count together.
#[derive(Clone, Debug)]
pub struct Requests(Arc<Mutex<Count>>);

#[derive(Clone, Copy, Debug)]
struct Count {
    in_work: usize,
    /// Since when there has been none.
    idle: Instant,
}

impl Count {
    /// When the connection is to end, if nothing happens before; to be asked again then.
    fn end(self, now: Instant, idle: Duration, oldest: Instant) -> Instant {
        let since = if self.in_work == 0 { self.idle } else { now };
        oldest.min(since + idle)
    }
}

/// A request in work until it is dropped.
#[derive(Debug)]
pub struct InWork(Requests);

impl Requests {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Count { in_work: 0, idle: Instant::now() })))
    }

    /// A request begins.
    pub fn begin(&self) -> InWork {
        self.change(|count| count.in_work += 1);
        InWork(self.clone())
    }

    fn change<T>(&self, change: impl FnOnce(&mut Count) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for InWork {
    fn drop(&mut self) {
        self.0.change(|count| {
            count.in_work -= 1;
            count.idle = Instant::now();
        });
    }
}

/// The clock of one connection.
pub(super) struct Lifetime {
    requests: Requests,
    idle: Duration,
    /// The latest end.
    oldest: Instant,
    alarm: Pin<Box<Sleep>>,
}

impl Lifetime {
    pub(super) fn new(bounds: Bounds) -> Self {
        let oldest = Instant::now() + bounds.age + bounds.grace;
        let alarm = Box::pin(tokio::time::sleep_until(oldest));
        Self { requests: Requests::new(), idle: bounds.idle, oldest, alarm }
    }

    pub(super) fn requests(&self) -> &Requests {
        &self.requests
    }

    /// Ready once the connection is to end; until then the task is woken when it may be.
    pub(super) fn poll_over(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            let now = Instant::now();
            let end = self.requests.change(|count| *count).end(now, self.idle, self.oldest);
            if end <= now {
                return Poll::Ready(());
            }
            self.alarm.as_mut().reset(end);
            std::task::ready!(self.alarm.as_mut().poll(context));
        }
    }
}

/// A ztunnel connects for each certificate; what stays open after its answer is of no use to it.
const IDLE: Duration = Duration::from_secs(30);
/// Replicas share the load again.
const AGE: Duration = Duration::from_secs(30 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn ends_when_idle_or_old() {
        let began = Instant::now();
        for (in_work, idle_since, now, expect) in [
            (0, 0, 0, 30),
            (0, 0, 29, 30),
            (0, 12, 20, 42),
            // Whether it has ended meanwhile is asked again by then.
            (1, 0, 40, 70),
            (2, 12, 40, 70),
            // It never gets older than that, not for a request either.
            (0, 80, 80, 90),
            (1, 0, 89, 90),
        ] {
            let count = Count { in_work, idle: began + idle_since * SECOND };
            let end = count.end(began + now * SECOND, 30 * SECOND, began + 90 * SECOND);
            assert_eq!(end - began, expect * SECOND, "{in_work} {idle_since} {now}");
        }
    }

    #[test]
    fn is_idle_from_the_end_of_the_last_request() {
        let requests = Requests::new();
        let count = || requests.change(|count| *count);
        let began = count().idle;
        let (first, second) = (requests.begin(), requests.clone().begin());
        drop(first);
        assert_eq!(count().in_work, 1);
        drop(second);
        assert!(count().in_work == 0 && count().idle > began);
    }
}
