//! The API server as one stream of typed events.
//!
//! Lists and watches with the kube client's watcher, which resumes, lists again where it must, and backs off. Each
//! object is first read as plain JSON and then decoded by itself. **Invariant:** an object that cannot be decoded is
//! reported by name and skipped, it never ends a stream; no other module but `cluster` and `ca` knows the kube client.

mod optional;
mod raw;

use std::future::Future;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream, Stream};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tracing::{info, warn};

use crate::causes::chain;
use crate::index::event::{Event, Kind, Object};
use raw::Raw;

/// Where events come from: the API server, or a test's script.
pub trait Source: Send + 'static {
    /// The next event; none when there will be no more.
    fn next(&mut self) -> impl Future<Output = Option<Event>> + Send;
}

/// The API server.
pub struct ApiServer {
    events: BoxStream<'static, Event>,
}

impl ApiServer {
    /// Starts to list and watch all kinds, once `next` is called.
    pub fn new(client: &Client) -> Self {
        let events = stream::select_all([
            watch::<Namespace>(client, Kind::Namespace, |object| Object::Namespace(Box::new(object))),
            watch::<Node>(client, Kind::Node, |object| Object::Node(Box::new(object))),
            watch::<Pod>(client, Kind::Pod, |object| Object::Pod(Box::new(object))),
            watch::<Service>(client, Kind::Service, |object| Object::Service(Box::new(object))),
            watch::<EndpointSlice>(client, Kind::EndpointSlice, |object| {
                Object::EndpointSlice(Box::new(object))
            }),
            watch::<NetworkPolicy>(client, Kind::NetworkPolicy, |object| {
                Object::NetworkPolicy(Box::new(object))
            }),
            api_groups(client.clone()),
            optional::watch(
                client,
                Kind::PeerAuthentication,
                &PEER_AUTHENTICATION,
                |object| Object::PeerAuthentication(Box::new(object)),
                optional::PERIOD,
            ),
            optional::watch(
                client,
                Kind::AuthorizationPolicy,
                &AUTHORIZATION_POLICY,
                |object| Object::AuthorizationPolicy(Box::new(object)),
                optional::PERIOD,
            ),
            optional::watch(
                client,
                Kind::ServiceEntry,
                &SERVICE_ENTRY,
                |object| Object::ServiceEntry(Box::new(object)),
                optional::PERIOD,
            ),
            optional::watch(
                client,
                Kind::WorkloadEntry,
                &WORKLOAD_ENTRY,
                |object| Object::WorkloadEntry(Box::new(object)),
                optional::PERIOD,
            ),
        ]);
        Self { events: events.boxed() }
    }
}

impl Source for ApiServer {
    async fn next(&mut self) -> Option<Event> {
        self.events.next().await
    }
}

fn watch<K>(client: &Client, kind: Kind, wrap: fn(K) -> Object) -> BoxStream<'static, Event>
where
    K: Resource<DynamicType = ()> + DeserializeOwned + 'static,
{
    let mut failing = false;
    let api: Api<Raw<K>> = Api::all(client.clone());
    events(api, kind, wrap)
        .filter_map(move |event| {
            std::future::ready(event.map_err(|error| report(kind, &error, &mut failing)).ok().inspect(|_| {
                if std::mem::take(&mut failing) {
                    info!(?kind, "watching again");
                }
            }))
        })
        .boxed()
}

/// The API groups that are served, now and whenever they have changed: a CNI brings its own.
fn api_groups(client: Client) -> BoxStream<'static, Event> {
    let look = move |known: Option<Vec<String>>| {
        let client = client.clone();
        async move {
            loop {
                if known.is_some() {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                match client.list_api_groups().await {
                    Ok(list) => {
                        let groups: Vec<String> = list.groups.into_iter().map(|group| group.name).collect();
                        if known.as_ref() != Some(&groups) {
                            return Some((Event::ApiGroups(groups.clone()), Some(groups)));
                        }
                    }
                    Err(error) => {
                        tracing::debug!("cannot ask which API groups there are: {}", chain(&error));
                        tokio::time::sleep(BACKOFF_MAX).await;
                    }
                }
            }
        }
    };
    stream::unfold(None, look).boxed()
}

/// What one kind's watcher says, tried again and again.
fn events<K, T>(
    api: Api<Raw<K>>,
    kind: Kind,
    wrap: fn(T) -> Object,
) -> impl Stream<Item = Result<Event, watcher::Error>> + Send + 'static
where
    K: Resource<DynamicType: Clone + Send + Sync> + 'static,
    T: DeserializeOwned + 'static,
{
    watcher(api, watcher::Config::default())
        .backoff(Doubling(BACKOFF_MIN))
        .map(move |event| event.map(|event| translate(kind, event, wrap)))
}

/// Once loudly, then quietly: the API server may be away for long.
fn report(kind: Kind, error: &watcher::Error, failing: &mut bool) {
    let error = chain(error);
    if std::mem::replace(failing, true) {
        tracing::debug!(?kind, "still cannot watch: {error}");
    } else {
        warn!(?kind, "cannot watch, will retry; what is known stays in use: {error}");
    }
}

fn translate<K, T>(kind: Kind, event: watcher::Event<Raw<K>>, wrap: fn(T) -> Object) -> Event
where
    T: DeserializeOwned,
{
    match event {
        watcher::Event::Init => Event::Restarted(kind),
        watcher::Event::InitDone => Event::Listed(kind),
        watcher::Event::Delete(raw) => Event::Deleted(kind, raw.name()),
        watcher::Event::Apply(raw) | watcher::Event::InitApply(raw) => {
            let name = raw.name();
            match raw.decode() {
                Ok(object) => Event::Applied(wrap(object)),
                Err(error) => Event::Unreadable { kind, name, reason: error.to_string() },
            }
        }
    }
}

/// Pauses between attempts; with jitter, since every agent of the cluster loses the API server at the same time.
struct Doubling(Duration);

impl Iterator for Doubling {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.0.mul_f32(rand::random_range(0.5..1.0));
        self.0 = (self.0 * 2).min(BACKOFF_MAX);
        Some(pause)
    }
}

impl Backoff for Doubling {
    fn reset(&mut self) {
        self.0 = BACKOFF_MIN;
    }
}

/// Istio's, as its users have it; the newest version that is served is watched.
const PEER_AUTHENTICATION: optional::Resource = optional::Resource {
    group: "security.istio.io",
    versions: &["v1", "v1beta1"],
    kind: "PeerAuthentication",
    plural: "peerauthentications",
};

/// The same.
const AUTHORIZATION_POLICY: optional::Resource = optional::Resource {
    group: "security.istio.io",
    versions: &["v1", "v1beta1"],
    kind: "AuthorizationPolicy",
    plural: "authorizationpolicies",
};

/// The same.
const SERVICE_ENTRY: optional::Resource = optional::Resource {
    group: "networking.istio.io",
    versions: &["v1", "v1beta1"],
    kind: "ServiceEntry",
    plural: "serviceentries",
};

/// The same.
const WORKLOAD_ENTRY: optional::Resource = optional::Resource {
    group: "networking.istio.io",
    versions: &["v1", "v1beta1"],
    kind: "WorkloadEntry",
    plural: "workloadentries",
};

const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// How long a CNI's kinds may be there before they count.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
