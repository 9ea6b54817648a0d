//! Clients that know who has to answer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::http;

/// Who answered the calls of `ask`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Calls answered by whom they were meant for.
    pub right: u64,
    /// Answers of others, in full.
    pub wrong: Vec<String>,
    /// Calls without an answer, by the cause.
    pub failed: BTreeMap<String, u64>,
}

impl Asked {
    fn count(&mut self, name: &str, answer: anyhow::Result<http::Answer>) {
        match answer {
            Err(error) => *self.failed.entry(error.root_cause().to_string()).or_default() += 1,
            Ok(answer) => {
                let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
                if answer.success() && body["service"] == name {
                    self.right += 1;
                } else {
                    self.wrong.push(format!("asked {name}, got {} {}", answer.status, answer.body.trim()));
                }
            }
        }
    }
}

/// Call `name=url` in turns until told to stop; prints the counts.
pub(super) async fn run(targets: &[String], parallel: usize, stop: &CancellationToken) -> anyhow::Result<()> {
    let targets = targets.iter().map(|target| target.split_once('=').context("a target is name=url"));
    let targets: Vec<(String, String)> = targets
        .map(|target| target.map(|(name, url)| (name.to_owned(), url.to_owned())))
        .collect::<Result<_, _>>()?;
    let asked = Arc::new(Mutex::new(Asked::default()));
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..parallel.max(1) {
        let (targets, asked, stop) = (targets.clone(), asked.clone(), stop.clone());
        workers.spawn(async move {
            for (name, url) in targets.iter().cycle().skip(number) {
                if stop.is_cancelled() {
                    return;
                }
                let answer = http::get(url, &[], Duration::from_secs(2)).await;
                asked.lock().unwrap_or_else(PoisonError::into_inner).count(name, answer);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
    }
    while workers.join_next().await.is_some() {}
    println!("{}", serde_json::to_string(&*asked.lock().unwrap_or_else(PoisonError::into_inner))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_one_who_was_meant_is_right() {
        let mut asked = Asked::default();
        let answer = |status, body: &str| Ok(http::Answer { status, body: body.to_owned() });
        asked.count("one", answer(200, r#"{"service":"one"}"#));
        asked.count("one", answer(200, r#"{"service":"two"}"#));
        asked.count("one", answer(200, "gibberish"));
        asked.count("one", answer(503, r#"{"service":"one"}"#));
        asked.count("one", Err(anyhow::anyhow!("reset").context("read the answer")));
        assert_eq!((asked.right, asked.wrong.len()), (1, 3));
        assert_eq!(asked.failed, BTreeMap::from([("reset".to_owned(), 1)]));
    }
}
