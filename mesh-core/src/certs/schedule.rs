//! When to renew a certificate, and when to try again. Pure: times and chance are arguments.

use std::time::{Duration, SystemTime};

/// Pause after the first failure.
pub const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Longest pause between two attempts.
pub const LAST_RETRY: Duration = Duration::from_secs(150);
/// Part of a lifetime by which renewals are spread, so that certificates issued together are not renewed together.
const SPREAD: f64 = 0.1;

/// Half of the lifetime, up to a tenth of it earlier by `chance` (0 to 1). The rest is time for a certificate
/// authority that is away to come back.
pub fn renew_at(not_before: SystemTime, not_after: SystemTime, chance: f64) -> SystemTime {
    let lifetime = not_after.duration_since(not_before).unwrap_or_default();
    not_before + lifetime.mul_f64(0.5 - SPREAD * chance.clamp(0.0, 1.0))
}

/// Doubles from [`FIRST_RETRY`] to [`LAST_RETRY`], shortened or lengthened by up to a fifth by `chance` (0 to 1).
pub fn retry_after(failures_before: u32, chance: f64) -> Duration {
    let doubled = FIRST_RETRY.saturating_mul(2_u32.saturating_pow(failures_before));
    doubled.min(LAST_RETRY).mul_f64(0.8 + 0.4 * chance.clamp(0.0, 1.0)).min(LAST_RETRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renews_around_half_of_the_lifetime() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let hours = |hours: f64| Duration::from_secs_f64(hours * 3600.0);
        for (lifetime, chance, expected) in [
            (hours(24.0), 0.0, hours(12.0)),
            (hours(24.0), 1.0, hours(9.6)),
            (hours(24.0), 7.0, hours(9.6)),
            (hours(1.0), 0.5, hours(0.45)),
            (Duration::ZERO, 0.5, Duration::ZERO),
        ] {
            let at = renew_at(start, start + lifetime, chance).duration_since(start).unwrap();
            assert!(at.abs_diff(expected) < Duration::from_millis(1), "{lifetime:?} {chance}: {at:?}");
        }
        // The wrong way round: at once.
        assert_eq!(renew_at(start, start - hours(1.0), 0.5), start);
    }

    #[test]
    fn backs_off() {
        for (failures, chance, expected) in [
            (0, 0.5, Duration::from_secs(1)),
            (0, 0.0, Duration::from_millis(800)),
            (0, 1.0, Duration::from_millis(1200)),
            (3, 0.5, Duration::from_secs(8)),
            (7, 0.5, Duration::from_secs(128)),
            (8, 0.5, LAST_RETRY),
            (40, 1.0, LAST_RETRY),
            (u32::MAX, 0.5, LAST_RETRY),
        ] {
            let pause = retry_after(failures, chance);
            assert!(pause.abs_diff(expected) < Duration::from_millis(1), "{failures} {chance}: {pause:?}");
        }
    }
}
