//! How much of something a peer may do: so much at once, and so much a second.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The longest that one has to wait for what was used in any case.
pub const MOST_OWED: Duration = Duration::from_secs(5);

/// A token bucket, kept as the time until which it is used up; clones are the same.
#[derive(Clone, Debug)]
pub struct Allowance {
    /// One use, and all that may be done at once, in time.
    each: Duration,
    burst: Duration,
    used_until: Arc<Mutex<Instant>>,
}

impl Allowance {
    /// Nothing is used yet.
    pub fn new(burst: u32, per_second: u32) -> Self {
        let each = Duration::from_secs(1) / per_second.max(1);
        Self { each, burst: each * burst, used_until: Arc::new(Mutex::new(Instant::now())) }
    }

    /// Uses it `times`.
    ///
    /// # Errors
    /// When it is used up: the time until one use is possible. Then nothing is used.
    pub fn take(&self, times: u32) -> Result<(), Duration> {
        self.take_at(Instant::now(), times)
    }

    fn take_at(&self, now: Instant, times: u32) -> Result<(), Duration> {
        let mut used_until = self.used_until.lock().unwrap_or_else(PoisonError::into_inner);
        let then = (*used_until).max(now) + self.each * times;
        if then - now > self.burst {
            return Err((then - now).saturating_sub(self.burst).max(self.each));
        }
        *used_until = then;
        Ok(())
    }

    /// Uses it `times` in any case, and says how long to wait then: until it is within what may be done at once. Nothing
    /// beyond [`MOST_OWED`] is remembered.
    pub fn charge(&self, times: u32) -> Option<Duration> {
        self.charge_at(Instant::now(), times)
    }

    fn charge_at(&self, now: Instant, times: u32) -> Option<Duration> {
        let mut used_until = self.used_until.lock().unwrap_or_else(PoisonError::into_inner);
        let within = now + self.burst;
        *used_until = ((*used_until).max(now) + self.each * times).min((*used_until).max(within + MOST_OWED));
        let wait = used_until.saturating_duration_since(within);
        (!wait.is_zero()).then_some(wait)
    }

    /// How long to wait until what was used is within what may be done at once.
    pub fn due(&self) -> Option<Duration> {
        let used_until = *self.used_until.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = used_until.saturating_duration_since(Instant::now() + self.burst);
        (!wait.is_zero()).then_some(wait)
    }

    /// Uses up what may be done at once, and `time` of what comes after that: the next use is possible when it is over.
    /// Fines add up to `most`.
    pub fn fine(&self, time: Duration, most: Duration) {
        self.fine_at(Instant::now(), time, most);
    }

    fn fine_at(&self, now: Instant, time: Duration, most: Duration) {
        let mut used_until = self.used_until.lock().unwrap_or_else(PoisonError::into_inner);
        *used_until = ((*used_until).max(now + self.burst) + time).min(now + self.burst + most);
    }

    /// Whether it is as if it had never been used.
    pub fn is_whole(&self) -> bool {
        self.is_whole_at(Instant::now())
    }

    fn is_whole_at(&self, now: Instant) -> bool {
        *self.used_until.lock().unwrap_or_else(PoisonError::into_inner) <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fine_takes_all_and_adds_up_to_a_bound() {
        let allowance = Allowance::new(10, 4);
        let start = Instant::now();
        let [each, second] = [250, 1000].map(Duration::from_millis);
        allowance.fine_at(start, second, 3 * second);
        assert_eq!(allowance.take_at(start, 1), Err(second + each));
        allowance.fine_at(start, second, 3 * second);
        assert_eq!(allowance.take_at(start + second, 1), Err(second + each));
        for _ in 0..10 {
            allowance.fine_at(start, second, 3 * second);
        }
        assert_eq!(allowance.take_at(start, 1), Err(3 * second + each));
        assert_eq!(allowance.take_at(start + 3 * second + each, 1), Ok(()));
    }

    #[test]
    fn what_is_used_in_any_case_is_waited_for_in_turn_and_up_to_a_bound() {
        let allowance = Allowance::new(10, 4);
        let start = Instant::now();
        let charge =
            |milliseconds, times| allowance.charge_at(start + Duration::from_millis(milliseconds), times);
        let milliseconds = |number| Some(Duration::from_millis(number));
        assert_eq!(charge(0, 10), None);
        assert_eq!((charge(0, 2), charge(0, 1)), (milliseconds(500), milliseconds(750)), "in turn");
        assert!(allowance.take_at(start + Duration::from_millis(750), 1).is_err());
        assert_eq!(charge(750, 1), milliseconds(250));
        assert_eq!(charge(1000, 1_000_000), Some(MOST_OWED));
        assert_eq!(charge(1000, 1), Some(MOST_OWED));
        assert_eq!(charge(60_000, 10), None, "no more is saved than the burst");
        allowance.fine_at(start, 20 * MOST_OWED, 20 * MOST_OWED);
        assert_eq!(charge(0, 1), Some(20 * MOST_OWED), "a fine is not shortened");
    }

    #[test]
    fn a_burst_then_a_rate() {
        let allowance = Allowance::new(10, 4);
        let start = Instant::now();
        let take =
            |milliseconds, times| allowance.take_at(start + Duration::from_millis(milliseconds), times);
        let each = Duration::from_millis(250);
        assert!(allowance.is_whole_at(start));
        assert_eq!(take(0, 11), Err(each));
        assert_eq!(take(0, 10), Ok(()), "a refusal uses nothing");
        assert_eq!(allowance.clone().take_at(start, 1), Err(each), "clones are the same");
        assert_eq!((take(250, 1), take(250, 1)), (Ok(()), Err(each)));
        assert!(!allowance.is_whole_at(start + Duration::from_millis(2749)));
        assert!(allowance.is_whole_at(start + Duration::from_millis(2750)));
        assert_eq!(
            (take(60_000, 10), take(60_000, 1)),
            (Ok(()), Err(each)),
            "no more is saved than the burst"
        );
    }
}
