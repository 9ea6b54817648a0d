//! An API server in memory for the CA's tests: tokens, pods, Secrets and ConfigMaps, and a switch to be away.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use rcgen::{CertificateParams, KeyPair, SanType, SignatureAlgorithm};
use tokio::sync::watch;

use crate::ca::attest::{Freshness, Pod, Review};
use crate::ca::cluster::{Callers, ClusterError, Expiry, Files, Store, Stored};

/// Clones are the same API server.
#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Mutex<State>>);

#[derive(Default)]
pub(crate) struct State {
    pub(crate) away: bool,
    pub(crate) reviews: HashMap<String, Review>,
    /// By namespace and name.
    pub(crate) pods: BTreeMap<(String, String), Pod>,
    /// What its cache has not seen yet.
    pub(crate) uncached: Vec<String>,
    pub(crate) lists: Vec<Freshness>,
    pub(crate) secrets: BTreeMap<String, Files>,
    pub(crate) annotations: BTreeMap<String, String>,
    /// How often each was written.
    pub(crate) versions: BTreeMap<String, usize>,
    /// A Secret that another replica creates right before our own create.
    pub(crate) created_by_another: Option<(String, Files)>,
    pub(crate) maps: BTreeMap<(String, String), String>,
    pub(crate) writes: usize,
    pub(crate) told: Vec<Expiry>,
    /// Reviews wait while it shows true.
    pub(crate) holds_reviews: Option<watch::Receiver<bool>>,
    pub(crate) reviews_held: usize,
}

impl Fake {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn answer<T>(&self, answer: impl FnOnce(&mut State) -> T) -> Result<T, ClusterError> {
        let mut state = self.state();
        if state.away { Err(ClusterError::Timeout { act: "ask".into() }) } else { Ok(answer(&mut state)) }
    }

    /// A token of a service account, as the API server of 1.30 and later reviews it.
    pub(crate) fn token(&self, token: &str, account: &str, extra: &[(&str, &str)]) {
        let extra = extra
            .iter()
            .map(|(key, value)| (format!("authentication.kubernetes.io/{key}"), vec![(*value).to_owned()]));
        let review = Review {
            authenticated: true,
            error: None,
            audiences: vec!["istio-ca".into()],
            username: format!("system:serviceaccount:{account}"),
            extra: extra.collect(),
        };
        self.state().reviews.insert(token.into(), review);
    }

    pub(crate) fn pod(&self, namespace: &str, name: &str, pod: Pod) {
        self.state().pods.insert((namespace.into(), name.into()), pod);
    }
}

/// A running pod.
pub(crate) fn pod(service_account: &str, node: &str) -> Pod {
    Pod { uid: "u1".into(), service_account: service_account.into(), node: node.into(), ended: false }
}

impl Callers for Fake {
    async fn review(&self, token: &str) -> Result<Review, ClusterError> {
        let hold = self.state().holds_reviews.clone();
        if let Some(mut hold) = hold {
            self.state().reviews_held += 1;
            hold.wait_for(|held| !held).await.unwrap();
        }
        self.answer(|state| state.reviews.get(token).cloned().unwrap_or_default())
    }

    async fn pod(&self, namespace: &str, name: &str) -> Result<Option<Pod>, ClusterError> {
        self.answer(|state| state.pods.get(&(namespace.to_owned(), name.to_owned())).cloned())
    }

    async fn pods(
        &self,
        node: &str,
        namespace: &str,
        freshness: Freshness,
    ) -> Result<Vec<Pod>, ClusterError> {
        self.answer(|state| {
            state.lists.push(freshness);
            let seen = |name: &String| freshness == Freshness::Latest || !state.uncached.contains(name);
            let pods = state
                .pods
                .iter()
                .filter(|((ns, name), pod)| ns == namespace && pod.node == node && seen(name));
            pods.map(|(_, pod)| pod.clone()).collect()
        })
    }
}

impl Store for Fake {
    async fn secret(&self, name: &str) -> Result<Option<Stored>, ClusterError> {
        let found = self.answer(|state| {
            let version = state.versions.get(name).copied().unwrap_or_default().to_string();
            let annotations = state.annotations.clone();
            state.secrets.get(name).cloned().map(|files| Stored { files, annotations, version })
        });
        // Lets another replica in between two of our calls.
        tokio::task::yield_now().await;
        found
    }

    async fn create_secret(&self, name: &str, files: Files) -> Result<bool, ClusterError> {
        self.answer(|state| {
            if let Some((name, files)) = state.created_by_another.take() {
                state.secrets.insert(name, files);
            }
            let fresh = !state.secrets.contains_key(name);
            state.secrets.entry(name.to_owned()).or_insert(files);
            fresh
        })
    }

    async fn replace_secret(&self, name: &str, files: Files, version: &str) -> Result<bool, ClusterError> {
        self.answer(|state| {
            let there = state.versions.entry(name.to_owned()).or_default();
            let same = state.secrets.contains_key(name) && there.to_string() == version;
            if same {
                *there += 1;
                state.secrets.insert(name.to_owned(), files);
            }
            same
        })
    }

    async fn tell(&self, expiry: &Expiry) -> Result<(), ClusterError> {
        self.answer(|state| state.told.push(expiry.clone()))
    }

    async fn published(&self, name: &str, file: &str) -> Result<Option<String>, ClusterError> {
        self.answer(|state| state.maps.get(&(name.to_owned(), file.to_owned())).cloned())
    }

    async fn publish(&self, name: &str, file: &str, text: &str) -> Result<(), ClusterError> {
        self.answer(|state| {
            state.writes += 1;
            state.maps.insert((name.to_owned(), file.to_owned()), text.to_owned());
        })
    }
}

/// A CSR in PEM for a new key of that kind, with these URIs as names.
pub(crate) fn csr(kind: &'static SignatureAlgorithm, uris: &[&str]) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.serialize_request(&KeyPair::generate_for(kind).unwrap()).unwrap().pem().unwrap()
}
