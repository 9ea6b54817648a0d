//! Several ways to the same endpoint: the next is tried when the last has not answered for a while, or has failed
//! (Happy Eyeballs, RFC 8305 section 5).

use std::collections::VecDeque;
use std::pin::pin;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::time::Instant;

/// What each has before the next begins (RFC 8305: "Connection Attempt Delay").
pub const HEAD_START: Duration = Duration::from_millis(250);

/// One of them.
pub type Way<'a, T, E> = BoxFuture<'a, Result<T, E>>;

/// What the first of them that succeeds returns; the other ones are dropped.
///
/// # Errors
/// The first one's, when none succeeds.
pub async fn race<'a, T: Send, E: Send>(
    first: Way<'a, T, E>,
    others: impl IntoIterator<Item = Way<'a, T, E>>,
) -> Result<T, E> {
    let all = std::iter::once(first).chain(others).enumerate();
    let numbered = all.map(|(number, way)| async move { (number, way.await) }.boxed());
    let mut waiting = numbered.collect::<VecDeque<_>>();
    let mut begun: FuturesUnordered<_> = waiting.pop_front().into_iter().collect();
    let mut failed: Option<(usize, E)> = None;
    let mut pause = pin!(tokio::time::sleep(HEAD_START));
    loop {
        tokio::select! {
            biased;
            Some((number, result)) = begun.next() => {
                let error = match result {
                    Ok(won) => return Ok(won),
                    Err(error) => error,
                };
                let earliest = match failed.take() {
                    Some(earlier) if earlier.0 < number => earlier,
                    _ => (number, error),
                };
                match waiting.pop_front() {
                    Some(next) => begun.push(next),
                    None if begun.is_empty() => return Err(earliest.1),
                    None => {}
                }
                failed = Some(earliest);
                pause.as_mut().reset(Instant::now() + HEAD_START);
            }
            () = &mut pause, if !waiting.is_empty() => {
                begun.extend(waiting.pop_front());
                pause.as_mut().reset(Instant::now() + HEAD_START);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use tokio::sync::Notify;

    use super::*;

    type Outcome = Result<&'static str, &'static str>;

    fn never<'a>() -> Way<'a, &'static str, &'static str> {
        pending().boxed()
    }

    fn at_once<'a>(outcome: Outcome) -> Way<'a, &'static str, &'static str> {
        ready(outcome).boxed()
    }

    #[tokio::test]
    async fn the_next_has_its_turn_when_the_last_does_not_answer() {
        let unused = || async { panic!("the first has answered") }.boxed();
        assert_eq!(race(at_once(Ok("first")), [unused()]).await, Ok("first"));
        assert_eq!(race(at_once(Ok("alone")), []).await, Ok("alone"));
        assert_eq!(race(at_once(Err("first")), [at_once(Ok("second"))]).await, Ok("second"));
        assert_eq!(race(at_once(Err("1")), [at_once(Err("2")), at_once(Err("3"))]).await, Err("1"));
        let started = Instant::now();
        assert_eq!(race(never(), [never(), never(), at_once(Ok("fourth"))]).await, Ok("fourth"));
        let took = started.elapsed();
        assert!(took >= 3 * HEAD_START, "{took:?}");
        let late = async {
            tokio::task::yield_now().await;
            Err("first")
        };
        assert_eq!(race(late.boxed(), [at_once(Err("second"))]).await, Err("first"), "in their order");
    }

    #[tokio::test]
    async fn the_first_may_still_win_once_the_next_has_begun() {
        for (first, second, expect) in [(Ok("1"), Err("2"), Ok("1")), (Err("1"), Err("2"), Err("1"))] {
            let begun = Notify::new();
            let slow = async {
                begun.notified().await;
                first
            };
            let refused = async {
                begun.notify_one();
                second
            };
            assert_eq!(race(slow.boxed(), [refused.boxed()]).await, expect);
        }
        let begun = Notify::new();
        let late = async {
            begun.notified().await;
            Err("first")
        };
        let slower = async {
            begun.notify_one();
            tokio::task::yield_now().await;
            Ok("second")
        };
        assert_eq!(
            race(late.boxed(), [slower.boxed()]).await,
            Ok("second"),
            "the first has failed meanwhile"
        );
    }
}
