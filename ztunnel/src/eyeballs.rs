//! Two ways to the same endpoint, one of each IP family: the second is tried when the first has not answered for a while
//! (Happy Eyeballs, RFC 8305 section 5).

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

/// What the first has before the second begins (RFC 8305: "Connection Attempt Delay").
pub const HEAD_START: Duration = Duration::from_millis(250);

/// What the first of the two that succeeds returns; the other one is dropped.
///
/// # Errors
/// The first one's, when neither succeeds.
pub async fn race<T, E>(
    first: impl Future<Output = Result<T, E>>,
    second: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let (mut first, mut second) = (pin!(first), pin!(second));
    tokio::select! {
        biased;
        result = &mut first => return match result {
            Ok(won) => Ok(won),
            Err(error) => second.await.map_err(|_| error),
        },
        () = tokio::time::sleep(HEAD_START) => {}
    }
    tokio::select! {
        biased;
        result = &mut first => match result {
            Ok(won) => Ok(won),
            Err(error) => second.await.map_err(|_| error),
        },
        result = &mut second => match result {
            Ok(won) => Ok(won),
            Err(_) => first.await,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::time::Instant;

    use tokio::sync::Notify;

    use super::*;

    type Outcome = Result<&'static str, &'static str>;

    #[tokio::test]
    async fn the_second_has_its_turn_when_the_first_does_not_answer() {
        let unused = async { panic!("the first has answered") };
        assert_eq!(race(ready(Outcome::Ok("first")), unused).await, Ok("first"));
        assert_eq!(race(ready(Err("first")), ready(Ok("second"))).await, Ok("second"));
        assert_eq!(race(ready(Outcome::Err("first")), ready(Err("second"))).await, Err("first"));
        let started = Instant::now();
        assert_eq!(race(pending::<Outcome>(), ready(Ok("second"))).await, Ok("second"));
        assert!(started.elapsed() >= HEAD_START);
    }

    #[tokio::test]
    async fn the_first_may_still_win_once_the_second_has_begun() {
        for (first, second, expect) in
            [(Ok("first"), Outcome::Err("second"), Ok("first")), (Err("first"), Err("second"), Err("first"))]
        {
            let begun = Notify::new();
            let slow = async {
                begun.notified().await;
                first
            };
            let refused = async {
                begun.notify_one();
                second
            };
            assert_eq!(race(slow, refused).await, expect);
        }
        let begun = Notify::new();
        let late = async {
            begun.notified().await;
            Err("first")
        };
        let slower = async {
            begun.notify_one();
            tokio::task::yield_now().await;
            Outcome::Ok("second")
        };
        assert_eq!(race(late, slower).await, Ok("second"), "the first has failed meanwhile");
    }
}
