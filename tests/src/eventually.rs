//! Waiting for conditions.

use std::time::{Duration, Instant};

/// Try `condition` until it holds. When `timeout` is over, the error says what was waited for and what the last
/// attempt saw.
pub fn eventually<T>(
    what: &str,
    timeout: Duration,
    mut condition: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(10);
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("not within {timeout:?}: {what}")));
            }
            Err(_) => {}
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_first_success() {
        let mut attempts = 0;
        let result = eventually("three attempts", Duration::from_secs(5), || {
            attempts += 1;
            anyhow::ensure!(attempts == 3, "only {attempts}");
            Ok(attempts)
        });
        assert_eq!(result.ok(), Some(3));
    }

    #[test]
    fn a_failure_tells_what_was_seen_last() {
        let result: anyhow::Result<()> = eventually("the sun", Duration::ZERO, || anyhow::bail!("a cloud"));
        let text = format!("{:#}", result.expect_err("never holds"));
        assert!(text.contains("the sun") && text.contains("a cloud"), "{text}");
    }
}
