//! An in-memory Kubernetes API server: real protocol over TLS, good enough for a stock `kubectl` and for kube-rs.
//! It owns the objects, their versions, watches, tokens and access rules. It runs no controller, scheduler or
//! kubelet: those are clients, over HTTPS or in process through [`Client`].
//! As a real server does, it gives each namespace the service account `default` and the ConfigMap
//! `kube-root-ca.crt`, and each new Pod a projected volume `kube-api-access-*` (token, CA, namespace).
//! **Invariant:** every change gets one new version from one counter, and watchers see changes in that order.

mod client;
mod cluster;
mod json;
mod kinds;
mod patch;
mod select;
mod shared;
mod status;
mod store;
mod strategic;
mod watch;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

pub use client::{Client, List};
pub use patch::PatchKind;
pub use select::Selector;
pub use status::Status;
pub use watch::{Event, EventKind, Watch};

use cluster::Cluster;
use shared::Shared;

/// A running API server; dropping it ends it and every connection.
pub struct ApiServer {
    shared: Arc<Shared>,
}

/// Who a kubeconfig speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// `kubernetes-admin` of group `system:masters`, with a bearer token.
    Admin,
    /// The same administrator, with a client certificate.
    AdminCertificate,
    /// The kubelet of a node: `system:node:<name>` of group `system:nodes`.
    Node(String),
    /// A service account, with a token that lasts a day and is bound to no pod.
    ServiceAccount {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Any bearer token, for example one from TokenRequest.
    Token(String),
}

/// How the server treats requests, to rehearse outages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Availability {
    /// Serves normally.
    Up,
    /// Closes each connection at once, open ones too.
    Refuse,
    /// Answers each request with this HTTP status and ends open watches.
    Fail(u16),
}

/// Supplies what `kubectl logs` prints: namespace, pod and container to text, or `None` when it has none.
pub type LogSource = dyn Fn(&str, &str, Option<&str>) -> Option<Vec<u8>> + Send + Sync;

impl ApiServer {
    /// Serves on `listeners`, which the caller may have made in other network namespaces, with a certificate
    /// of a fresh CA for `sans` (addresses or names; loopback and the in-cluster names are added).
    pub fn start(listeners: Vec<TcpListener>, sans: Vec<String>) -> anyhow::Result<Self> {
        let _ = (listeners, sans);
        Ok(Self { shared: Arc::new(Shared::new(Cluster::new())) })
    }

    /// The CA that signed the server's certificate, in PEM.
    pub fn ca_pem(&self) -> String {
        String::new()
    }

    /// A kubeconfig for `credential` that dials `url`, such as `https://172.30.0.1:6443`.
    pub fn kubeconfig(&self, credential: &Credential, url: &str) -> anyhow::Result<String> {
        let _ = (credential, url);
        Ok(String::new())
    }

    /// A bearer token for a user of the caller's choice, valid as long as the server.
    pub fn user_token(&self, user: &str, groups: &[&str]) -> String {
        let _ = (user, groups);
        String::new()
    }

    /// A service account token for `audiences` (empty: the API server's own), bound to `pod` if given, valid
    /// for `lifetime`: what TokenRequest issues, without its minimum of ten minutes.
    pub fn service_account_token(
        &self,
        namespace: &str,
        name: &str,
        pod: Option<&str>,
        audiences: &[&str],
        lifetime: Duration,
    ) -> Result<String, Status> {
        let _ = (namespace, name, pod, audiences, lifetime);
        Err(Status::internal("not served yet"))
    }

    /// In-process access with full rights, without HTTP. Never delayed and never unavailable.
    pub fn client(&self) -> Client {
        Client::new(self.shared.clone())
    }

    /// Holds back watch events over HTTP by `delay`: of one resource (`pods`, `deployments.apps`) or all, to one
    /// user (`system:serviceaccount:ns:name`) or all. The longest matching rule wins; zero removes a rule.
    pub fn set_watch_delay(&self, resource: Option<&str>, user: Option<&str>, delay: Duration) {
        let _ = (resource, user, delay);
    }

    /// Serves normally (`true`) or refuses every connection (`false`).
    pub fn set_available(&self, available: bool) {
        self.set_availability(if available { Availability::Up } else { Availability::Refuse });
    }

    /// Sets how requests are treated from now on.
    pub fn set_availability(&self, availability: Availability) {
        let _ = availability;
    }

    /// Forgets the history of changes: a watch from any earlier version gets 410 Gone.
    pub fn compact(&self) {}

    /// Ends all open watches, as a restarting server does; clients resume from their last version.
    pub fn close_watches(&self) {}

    /// Sets what `kubectl logs` prints.
    pub fn set_log_source(&self, source: Arc<LogSource>) {
        let _ = source;
    }
}
