//! How well the certificates are kept fresh: for metrics, and to say so before it is too late. Pure.

use std::time::SystemTime;

/// Percent of a life that is left when something is said, each once.
const THRESHOLDS: [u8; 3] = [50, 25, 10];

/// All certificates of a process together, so that the number of identities does not multiply metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// In use, and renewed in time so far.
    pub fresh: usize,
    /// In use, while the last attempt to renew it failed.
    pub failing: usize,
    /// Not there, or over.
    pub missing: usize,
    /// When the first of those that are there ends.
    pub soonest: Option<SystemTime>,
    /// Attempts that failed, ever.
    pub failures: u64,
    /// The least share of a life that is left among those whose renewal fails, as the threshold that it is at or below.
    pub reached: Option<u8>,
}

impl Health {
    /// Counts one more. `life` is from when to when it is valid, `failing` whether the last attempt to get one failed.
    pub(super) fn count(&mut self, life: Option<(SystemTime, SystemTime)>, failing: bool, now: SystemTime) {
        let Some((from, until)) = life else {
            self.missing += 1;
            return;
        };
        self.soonest = Some(self.soonest.map_or(until, |soonest| soonest.min(until)));
        match (now < until, failing) {
            (false, _) => self.missing += 1,
            (true, true) => self.failing += 1,
            (true, false) => self.fresh += 1,
        }
        if failing {
            let lowest = reached(from, until, now).into_iter().chain(self.reached).min();
            self.reached = lowest;
        }
    }
}

/// The lowest threshold that a life from `from` to `until` has come down to.
pub fn reached(from: SystemTime, until: SystemTime, now: SystemTime) -> Option<u8> {
    let life = until.duration_since(from).unwrap_or_default();
    let left = until.duration_since(now).unwrap_or_default();
    THRESHOLDS.into_iter().rev().find(|percent| left <= life.mul_f64(f64::from(*percent) / 100.0))
}

/// Says each threshold once, from the first to the last, and again after all was well.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alarm(Option<u8>);

impl Alarm {
    /// What is to be said now that this threshold is reached.
    pub fn due(&mut self, reached: Option<u8>) -> Option<u8> {
        let due = reached.filter(|reached| self.0.is_none_or(|said| *reached < said));
        self.0 = reached.and(due.or(self.0));
        due
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn thresholds_are_reached_from_above() {
        for (now, expected) in [
            (0, None),
            (1000, None),
            (1499, None),
            (1500, Some(50)),
            (1749, Some(50)),
            (1750, Some(25)),
            (1900, Some(10)),
            (2000, Some(10)),
            (9000, Some(10)),
        ] {
            assert_eq!(reached(at(1000), at(2000), at(now)), expected, "{now}");
        }
    }

    #[test]
    fn each_threshold_is_said_once() {
        let mut alarm = Alarm::default();
        let steps = [None, Some(50), Some(50), Some(10), Some(50), Some(10), None, Some(25), Some(25)];
        let said = steps.map(|reached| alarm.due(reached));
        assert_eq!(said, [None, Some(50), None, Some(10), None, None, None, Some(25), None]);
    }

    #[test]
    fn counts_what_is_fresh_failing_and_missing() {
        let mut health = Health::default();
        let life = |until| Some((at(0), at(until)));
        health.count(life(1000), false, at(700));
        assert_eq!(health.reached, None, "renewal does not fail");
        health.count(life(2000), true, at(700));
        assert_eq!(health.reached, None, "more than half is left");
        for (life, failing) in
            [(life(900), true), (life(1300), true), (life(600), true), (None, true), (None, false)]
        {
            health.count(life, failing, at(700));
        }
        let expected = Health {
            fresh: 1,
            failing: 3,
            missing: 3,
            soonest: Some(at(600)),
            failures: 0,
            reached: Some(10),
        };
        assert_eq!(health, expected);
    }
}
