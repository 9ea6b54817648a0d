//! The tasks of a process: each has a name, all end together.
//!
//! **Invariant:** a part that ends by itself ends the process, with an error; SIGTERM ends it without one.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, bail};
use mesh_core::drain;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// The parts that run.
#[derive(Debug, Default)]
pub struct Parts {
    tasks: JoinSet<(&'static str, anyhow::Result<()>)>,
    shutdown: CancellationToken,
}

impl Parts {
    /// What a part waits for to end.
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Starts a part.
    pub fn spawn(&mut self, name: &'static str, run: impl Future<Output = ()> + Send + 'static) {
        self.try_spawn(name, async {
            run.await;
            Ok::<(), std::convert::Infallible>(())
        });
    }

    /// Starts a part that may fail.
    pub fn try_spawn<E>(
        &mut self,
        name: &'static str,
        run: impl Future<Output = Result<(), E>> + Send + 'static,
    ) where
        E: Into<anyhow::Error>,
    {
        self.tasks.spawn(async move { (name, run.await.map_err(Into::into)) });
    }

    /// Runs until SIGTERM or SIGINT, then until the parts have ended or a deadline has passed.
    ///
    /// # Errors
    /// When a part failed, or ended by itself.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let terminated = drain::terminated().context("cannot handle signals")?;
        let mut result = tokio::select! {
            signal = terminated => {
                info!(signal, "stopping");
                Ok(())
            }
            Some(ended) = self.tasks.join_next() => ended_early(ended),
        };
        self.shutdown.cancel();
        let rest = async {
            while let Some(ended) = self.tasks.join_next().await {
                let ended = ended.context("a part died").and_then(|(name, ended)| ended.context(name));
                result = std::mem::replace(&mut result, Ok(())).and(ended);
            }
        };
        if tokio::time::timeout(STOP_DEADLINE, rest).await.is_err() {
            warn!("not everything has ended in time");
        }
        result
    }
}

fn ended_early(ended: Result<(&'static str, anyhow::Result<()>), JoinError>) -> anyhow::Result<()> {
    let (name, result) = ended.context("a part died")?;
    result.context(name)?;
    bail!("{name} ended by itself")
}

/// For steps under way and open streams.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
