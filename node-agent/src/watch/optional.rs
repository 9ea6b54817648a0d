//! A kind that the cluster may not have: it is watched once it is there.
//!
//! **Invariant:** a kind that has gone takes its objects with it only when it stays away for a while: an API server that
//! starts says of a kind that it does not know yet that there is none.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::watcher;
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use tracing::info;

use super::raw::Raw;
use super::{events, report};
use crate::causes::chain;
use crate::index::event::{Event, Kind, Object};

/// Where a kind is served.
pub(super) struct Resource {
    pub(super) group: &'static str,
    /// Best first.
    pub(super) versions: &'static [&'static str],
    pub(super) kind: &'static str,
    pub(super) plural: &'static str,
}

/// Looks for a kind that is not there come this often, with jitter: every agent of the cluster looks.
pub(super) const PERIOD: Duration = Duration::from_secs(5);
/// So many looks in a row have to miss a kind that was there.
const GONE: u32 = 4;

/// Events of the kind: of an empty list where it is not there. It is looked for every `period`.
pub(super) fn watch<T>(
    client: &Client,
    kind: Kind,
    resource: &'static Resource,
    wrap: fn(T) -> Object,
    period: Duration,
) -> BoxStream<'static, Event>
where
    T: DeserializeOwned + 'static,
{
    let watch = Watch {
        client: client.clone(),
        kind,
        resource,
        wrap,
        period,
        watching: None,
        known: true,
        misses: GONE - 1,
        failing: false,
        ready: VecDeque::new(),
    };
    let next = |mut watch: Watch<T>| async move {
        let event = watch.next().await;
        Some((event, watch))
    };
    stream::unfold(watch, next).boxed()
}

struct Watch<T> {
    client: Client,
    kind: Kind,
    resource: &'static Resource,
    wrap: fn(T) -> Object,
    period: Duration,
    watching: Option<BoxStream<'static, Result<Event, watcher::Error>>>,
    /// The model may have objects of the kind, or waits to be told that there are none.
    known: bool,
    misses: u32,
    failing: bool,
    ready: VecDeque<Event>,
}

impl<T: DeserializeOwned + 'static> Watch<T> {
    async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return event;
            }
            let Some(watching) = &mut self.watching else {
                self.look().await;
                continue;
            };
            match watching.next().await {
                Some(Ok(event)) => {
                    (self.failing, self.known, self.misses) = (false, true, 0);
                    return event;
                }
                Some(Err(error)) if is_gone(&error) => {
                    self.watching = None;
                    // Discovery may still name it: without a pause this would ask again at once, and again.
                    pause(self.period).await;
                }
                Some(Err(error)) => report(self.kind, &error, &mut self.failing),
                None => self.watching = None,
            }
        }
    }

    /// Looks whether the kind is there, and pauses when it is not.
    async fn look(&mut self) {
        match find(&self.client, self.resource).await {
            Ok(Some(resource)) => {
                info!(kind = ?self.kind, version = resource.api_version, "the cluster has this kind; watching it");
                let api: Api<Raw<DynamicObject>> = Api::all_with(self.client.clone(), &resource);
                self.watching = Some(events(api, self.kind, self.wrap).boxed());
                return;
            }
            Ok(None) => self.misses += 1,
            Err(error) => tracing::debug!(kind = ?self.kind, "cannot ask for the kind: {}", chain(&error)),
        }
        if self.known && self.misses >= GONE {
            info!(kind = ?self.kind, "the cluster does not have this kind; it is watched once it is there");
            self.known = false;
            self.ready.extend([Event::Restarted(self.kind), Event::Listed(self.kind)]);
            return;
        }
        pause(self.period).await;
    }
}

async fn pause(period: Duration) {
    tokio::time::sleep(period.mul_f32(rand::random_range(0.5..1.0))).await;
}

/// The best version that is served.
async fn find(client: &Client, resource: &Resource) -> Result<Option<ApiResource>, kube::Error> {
    let &Resource { group, versions, kind, plural } = resource;
    for version in versions {
        match client.list_api_group_resources(&format!("{group}/{version}")).await {
            Ok(list) if list.resources.iter().any(|resource| resource.name == plural) => {
                return Ok(Some(ApiResource {
                    group: group.to_owned(),
                    version: (*version).to_owned(),
                    api_version: format!("{group}/{version}"),
                    kind: kind.to_owned(),
                    plural: plural.to_owned(),
                }));
            }
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn is_gone(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchStartFailed};
    matches!(
        error,
        InitialListFailed(kube::Error::Api(status)) | WatchStartFailed(kube::Error::Api(status)) if status.code == 404
    )
}

#[cfg(test)]
mod tests;
