//! What the CA asks of the API server, and how.
//!
//! Two narrow views of it, so that the part that answers strangers cannot reach the Secret with the key.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::core::v1::{self as core, ConfigMap, Event, EventSource, ObjectReference, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::Status;
use serde_json::json;

use crate::ca::attest::{AUDIENCE, Freshness, Pod, Review};
use crate::cluster::hash;

/// Facts about callers.
pub trait Callers: Send + Sync + 'static {
    /// Whose is the token?
    fn review(&self, token: &str) -> impl Future<Output = Result<Review, ClusterError>> + Send;

    /// One pod, as it is now.
    fn pod(
        &self,
        namespace: &str,
        name: &str,
    ) -> impl Future<Output = Result<Option<Pod>, ClusterError>> + Send;

    /// The pods of one namespace on one node.
    fn pods(
        &self,
        node: &str,
        namespace: &str,
        freshness: Freshness,
    ) -> impl Future<Output = Result<Vec<Pod>, ClusterError>> + Send;
}

/// Files of a Secret, or of a ConfigMap.
pub type Files = BTreeMap<String, Vec<u8>>;

/// A Secret as it was read.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// What is in it.
    pub files: Files,
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
    /// `metadata.resourceVersion`.
    pub version: String,
}

/// Without what is in it.
impl Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stored").field("version", &self.version).finish_non_exhaustive()
    }
}

/// A certificate that only the user can renew has come down to a share of its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expiry {
    /// The Secret that it is in.
    pub secret: &'static str,
    /// Whose it is.
    pub subject: String,
    /// Of its life, no more than this is left: 50, 25 or 10.
    pub percent: u8,
    /// When it ends.
    pub until: SystemTime,
    /// In words.
    pub message: String,
}

/// The CA's own objects, in the mesh's own namespace.
pub trait Store: Send + Sync + 'static {
    /// A Secret; `None`: there is none.
    fn secret(&self, name: &str) -> impl Future<Output = Result<Option<Stored>, ClusterError>> + Send;

    /// Creates a Secret; false: one was there already, and stays.
    fn create_secret(
        &self,
        name: &str,
        files: Files,
    ) -> impl Future<Output = Result<bool, ClusterError>> + Send;

    /// Replaces the files of a Secret that was read in this version; false: it is another one by now, or gone.
    fn replace_secret(
        &self,
        name: &str,
        files: Files,
        version: &str,
    ) -> impl Future<Output = Result<bool, ClusterError>> + Send;

    /// One file of a ConfigMap; `None`: there is no such file.
    fn published(
        &self,
        name: &str,
        file: &str,
    ) -> impl Future<Output = Result<Option<String>, ClusterError>> + Send;

    /// Makes an Event on a Secret: one for each certificate and share of its life, whichever replica is first.
    fn tell(&self, expiry: &Expiry) -> impl Future<Output = Result<(), ClusterError>> + Send;

    /// Creates or changes that file.
    fn publish(
        &self,
        name: &str,
        file: &str,
        text: &str,
    ) -> impl Future<Output = Result<(), ClusterError>> + Send;
}

/// The API server did not do it.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// It answered with an error, or could not be reached.
    #[error("cannot {act}: {source}")]
    Api {
        /// What was tried.
        act: String,
        /// Why it failed.
        source: Box<kube::Error>,
    },
    /// It did not answer.
    #[error("cannot {act}: the API server did not answer within {} s", DEADLINE.as_secs())]
    Timeout {
        /// What was tried.
        act: String,
    },
}

/// The real API server.
#[derive(Clone)]
pub struct Cluster {
    client: kube::Client,
    namespace: String,
}

impl Cluster {
    /// `namespace` is the mesh's own, where [`Store`] keeps its objects.
    pub fn new(client: kube::Client, namespace: String) -> Self {
        Self { client, namespace }
    }

    fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn config_maps(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn secret_of(&self, name: &str, files: Files) -> Secret {
        Secret {
            metadata: self.metadata(name),
            data: Some(files.into_iter().map(|(key, value)| (key, ByteString(value))).collect()),
            type_: Some("Opaque".to_owned()),
            ..Secret::default()
        }
    }

    fn metadata(&self, name: &str) -> ObjectMeta {
        let labels = [("app.kubernetes.io/managed-by", "ambit-ca"), ("app.kubernetes.io/part-of", "ambit")];
        ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(self.namespace.clone()),
            labels: Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
            ..ObjectMeta::default()
        }
    }
}

impl Callers for Cluster {
    async fn review(&self, token: &str) -> Result<Review, ClusterError> {
        let spec =
            TokenReviewSpec { audiences: Some(vec![AUDIENCE.to_owned()]), token: Some(token.to_owned()) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let reviews = Api::<TokenReview>::all(self.client.clone());
        let parameters = PostParams::default();
        let status =
            call("review a token", reviews.create(&parameters, &review)).await?.status.unwrap_or_default();
        let user = status.user.unwrap_or_default();
        Ok(Review {
            authenticated: status.authenticated.unwrap_or(false),
            error: status.error.filter(|error| !error.is_empty()),
            audiences: status.audiences.unwrap_or_default(),
            username: user.username.unwrap_or_default(),
            extra: user.extra.unwrap_or_default(),
        })
    }

    async fn pod(&self, namespace: &str, name: &str) -> Result<Option<Pod>, ClusterError> {
        let pods = Api::<core::Pod>::namespaced(self.client.clone(), namespace);
        let found = call(&format!("get pod {namespace}/{name}"), pods.get_opt(name)).await?;
        Ok(found.map(pod))
    }

    async fn pods(
        &self,
        node: &str,
        namespace: &str,
        freshness: Freshness,
    ) -> Result<Vec<Pod>, ClusterError> {
        let pods = Api::<core::Pod>::namespaced(self.client.clone(), namespace);
        let parameters = ListParams::default().fields(&format!("spec.nodeName={node}"));
        let parameters = match freshness {
            Freshness::Cached => parameters.match_any(),
            Freshness::Latest => parameters,
        };
        let act = format!("list the pods of namespace {namespace} on node {node}");
        Ok(call(&act, pods.list(&parameters)).await?.items.into_iter().map(pod).collect())
    }
}

impl Store for Cluster {
    async fn secret(&self, name: &str) -> Result<Option<Stored>, ClusterError> {
        let secrets = self.secrets();
        let found = call(&format!("get Secret {}/{name}", self.namespace), secrets.get_opt(name)).await?;
        Ok(found.map(|secret| Stored {
            files: secret.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect(),
            annotations: secret.metadata.annotations.unwrap_or_default(),
            version: secret.metadata.resource_version.unwrap_or_default(),
        }))
    }

    async fn create_secret(&self, name: &str, files: Files) -> Result<bool, ClusterError> {
        let (secrets, parameters) = (self.secrets(), PostParams::default());
        let act = format!("create Secret {}/{name}", self.namespace);
        let secret = self.secret_of(name, files);
        done_unless(call(&act, secrets.create(&parameters, &secret)).await, Status::is_already_exists)
    }

    async fn replace_secret(&self, name: &str, files: Files, version: &str) -> Result<bool, ClusterError> {
        let (secrets, parameters) = (self.secrets(), PostParams::default());
        let act = format!("replace Secret {}/{name}", self.namespace);
        let mut secret = self.secret_of(name, files);
        secret.metadata.resource_version = Some(version.to_owned());
        let other = |status: &Status| status.is_conflict() || status.is_not_found();
        done_unless(call(&act, secrets.replace(name, &parameters, &secret)).await, other)
    }

    async fn tell(&self, expiry: &Expiry) -> Result<(), ClusterError> {
        let Expiry { secret, subject, percent, until, message } = expiry;
        let until = until.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let own = hash(&[subject.clone(), percent.to_string(), until.to_string()]);
        let now = Time(k8s_openapi::jiff::Timestamp::now());
        // Half of its life is time enough to replace it.
        let (kind, reason) =
            if *percent < 50 { ("Warning", "CertificateExpiring") } else { ("Normal", "CertificateAges") };
        let event = Event {
            metadata: self.metadata(&format!("{secret}.{own:016x}")),
            involved_object: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Secret".to_owned()),
                namespace: Some(self.namespace.clone()),
                name: Some((*secret).to_owned()),
                ..ObjectReference::default()
            },
            type_: Some(kind.to_owned()),
            reason: Some(reason.to_owned()),
            message: Some(message.clone()),
            source: Some(EventSource { component: Some("ambit-ca".to_owned()), host: None }),
            count: Some(1),
            first_timestamp: Some(now.clone()),
            last_timestamp: Some(now),
            ..Event::default()
        };
        let events = Api::<Event>::namespaced(self.client.clone(), &self.namespace);
        let act = format!("write an Event of Secret {}/{secret}", self.namespace);
        let told = call(&act, events.create(&PostParams::default(), &event)).await;
        done_unless(told, Status::is_already_exists).map(drop)
    }

    async fn published(&self, name: &str, file: &str) -> Result<Option<String>, ClusterError> {
        let maps = self.config_maps();
        let found = call(&format!("get ConfigMap {}/{name}", self.namespace), maps.get_opt(name)).await?;
        Ok(found.and_then(|map| map.data.unwrap_or_default().remove(file)))
    }

    async fn publish(&self, name: &str, file: &str, text: &str) -> Result<(), ClusterError> {
        let maps = self.config_maps();
        let map = ConfigMap {
            metadata: self.metadata(name),
            data: Some([(file.to_owned(), text.to_owned())].into()),
            ..ConfigMap::default()
        };
        let (post, patch) = (PostParams::default(), PatchParams::default());
        let act = format!("create ConfigMap {}/{name}", self.namespace);
        if done_unless(call(&act, maps.create(&post, &map)).await, Status::is_already_exists)? {
            return Ok(());
        }
        let change = Patch::Merge(json!({"data": {file: text}}));
        let act = format!("change ConfigMap {}/{name}", self.namespace);
        call(&act, maps.patch(name, &patch, &change)).await.map(drop)
    }
}

fn pod(pod: core::Pod) -> Pod {
    let spec = pod.spec.unwrap_or_default();
    let phase = pod.status.and_then(|status| status.phase);
    Pod {
        uid: pod.metadata.uid.unwrap_or_default(),
        service_account: spec
            .service_account_name
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "default".to_owned()),
        node: spec.node_name.unwrap_or_default(),
        ended: matches!(phase.as_deref(), Some("Succeeded" | "Failed")),
    }
}

/// False where the API server answered with this.
fn done_unless<T>(
    result: Result<T, ClusterError>,
    other: impl Fn(&Status) -> bool,
) -> Result<bool, ClusterError> {
    match result {
        Ok(_) => Ok(true),
        Err(ClusterError::Api { source, .. }) if matches!(&*source, kube::Error::Api(status) if other(status)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

async fn call<T>(act: &str, call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, ClusterError> {
    within(DEADLINE, act, call).await
}

async fn within<T>(
    deadline: Duration,
    act: &str,
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ClusterError> {
    match tokio::time::timeout(deadline, call).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(source)) => Err(ClusterError::Api { act: act.to_owned(), source: Box::new(source) }),
        Err(_) => Err(ClusterError::Timeout { act: act.to_owned() }),
    }
}

/// For one call; callers of ours wait meanwhile.
const DEADLINE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
