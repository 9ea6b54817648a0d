//! An in-memory Kubernetes API server: real protocol over TLS, good enough for a stock `kubectl` and for kube-rs.
//! It owns the objects, their versions, watches, tokens and access rules. It runs no controller, scheduler or
//! kubelet: those are clients, over HTTPS or in process through [`Client`].
//! As a real server does, it gives each namespace the service account `default` and the ConfigMap
//! `kube-root-ca.crt`, and each new Pod a projected volume `kube-api-access-*` (token, CA, namespace).
//! **Invariant:** every change gets one new version from one counter, and watchers see changes in that order.

mod admission;
mod bootstrap;
mod cascade;
mod client;
mod cluster;
mod columns;
mod convert;
mod defaults;
mod definition;
mod discovery;
mod events;
mod families;
mod form;
mod http;
mod jsonpath;
mod kinds;
mod listing;
mod managed;
mod meta;
mod openapi;
mod options;
mod patch;
mod pki;
mod protobuf;
mod rbac;
mod request;
mod review;
mod rules;
mod schema;
mod select;
mod selectable;
mod serve;
mod shared;
mod status;
mod store;
mod strategic;
mod stream;
mod structure;
mod subresource;
mod table;
mod token;
mod types;
mod validate;
mod watch;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

pub use client::{Client, List};
pub use patch::PatchKind;
pub use select::Selector;
pub use status::Status;
pub use watch::{Event, EventKind, Watch};

use anyhow::Context as _;
use cluster::Cluster;
use http::Server;
use mesh_core::drain::{self, Drain};
use pki::Authority;
use serde_json::json;
use shared::Shared;
use token::{Grant, Tokens, User};
use tokio::runtime::{Builder, Runtime};
use tokio_rustls::TlsAcceptor;

use crate::stack::Stack;

/// A running API server; dropping it ends it and every connection.
pub struct ApiServer {
    shared: Arc<Shared>,
    tokens: Arc<Tokens>,
    authority: Authority,
    /// Held as long as connections are to be accepted: a lost drain is an order to end.
    _drain: Drain,
    runtime: Option<Runtime>,
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

/// What a user asked of the server.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asked {
    /// `get`, `list`, `watch`, `create`, …
    pub verb: String,
    /// Empty for the core group.
    pub group: String,
    /// Plural, with its subresource: `pods/status`. The path, when it names no resource.
    pub resource: String,
    /// Empty for the cluster's scope.
    pub namespace: String,
    /// Empty for collections, and for what is created.
    pub name: String,
    /// Whether the user may.
    pub granted: bool,
}

/// Supplies what `kubectl logs` prints: namespace, pod and container to text, or `None` when it has none.
pub type LogSource = dyn Fn(&str, &str, Option<&str>) -> Option<Vec<u8>> + Send + Sync;

/// Lifetime of the token in a service account's kubeconfig.
const DAY: Duration = Duration::from_secs(24 * 3600);

impl ApiServer {
    /// Serves on `listeners`, which the caller may have made in other network namespaces, with a certificate
    /// of a fresh CA for `sans` (addresses or names; loopback and the in-cluster names are added). Services get
    /// addresses of the families of `stack`. It runs on threads of its own.
    pub fn start(listeners: Vec<TcpListener>, sans: Vec<String>, stack: Stack) -> anyhow::Result<Self> {
        let authority = Authority::new()?;
        let tls = TlsAcceptor::from(Arc::new(authority.server_config(sans)?));
        let cluster =
            Cluster::new(authority.pem(), stack).context("the objects every cluster starts with")?;
        let (shared, tokens) = (Arc::new(Shared::new(cluster)), Arc::new(Tokens::new()?));
        let runtime =
            Builder::new_multi_thread().worker_threads(2).thread_name("apiserver").enable_all().build()?;
        let server = Arc::new(Server { shared: shared.clone(), tokens: tokens.clone() });
        let (drain, watch) = drain::new();
        let inside = runtime.enter();
        for listener in listeners {
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            runtime.spawn(http::accept(server.clone(), listener, tls.clone(), watch.clone()));
        }
        drop(inside);
        Ok(Self { shared, tokens, authority, _drain: drain, runtime: Some(runtime) })
    }

    /// The CA that signed the server's certificate, in PEM.
    pub fn ca_pem(&self) -> String {
        self.authority.pem()
    }

    /// A kubeconfig for `credential` that dials `url`, such as `https://172.30.0.1:6443`.
    pub fn kubeconfig(&self, credential: &Credential, url: &str) -> anyhow::Result<String> {
        const MASTERS: &str = "system:masters";
        let user = match credential {
            Credential::Admin => json!({"token": self.user_token("kubernetes-admin", &[MASTERS])}),
            Credential::AdminCertificate => {
                let client = self.authority.client("kubernetes-admin", MASTERS)?;
                json!({
                    "client-certificate-data": meta::base64(client.certificate.as_bytes()),
                    "client-key-data": meta::base64(client.key.as_bytes()),
                })
            }
            Credential::Node(name) => {
                json!({"token": self.user_token(&format!("system:node:{name}"), &["system:nodes"])})
            }
            Credential::ServiceAccount { namespace, name } => {
                json!({"token": self.service_account_token(namespace, name, None, &[], DAY)?})
            }
            Credential::Token(token) => json!({"token": token}),
        };
        let ca = meta::base64(self.ca_pem().as_bytes());
        // JSON is YAML, so every client reads it.
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab", "preferences": {},
            "clusters": [{"name": "lab", "cluster": {"server": url, "certificate-authority-data": ca}}],
            "users": [{"name": "lab", "user": user}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        });
        Ok(serde_json::to_string_pretty(&config)?)
    }

    /// A bearer token for a user of the caller's choice, valid as long as the server.
    pub fn user_token(&self, user: &str, groups: &[&str]) -> String {
        self.tokens.fix(User::new(user, groups))
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
        let audiences = audiences.iter().map(|audience| (*audience).to_owned()).collect();
        let pod = pod.map(|pod| (pod, None));
        let grant = Grant { namespace, account: name, pod, audiences, lifetime };
        Ok(self.tokens.issue(&self.shared.cluster(), grant)?.0)
    }

    /// In-process access with full rights, without HTTP. Never delayed and never unavailable.
    pub fn client(&self) -> Client {
        Client::new(self.shared.clone())
    }

    /// Holds back watch events over HTTP by `delay`: of one resource (`pods`, `deployments.apps`) or all, to one
    /// user (`system:serviceaccount:ns:name`) or all. The longest matching rule wins; zero removes a rule.
    pub fn set_watch_delay(&self, resource: Option<&str>, user: Option<&str>, delay: Duration) {
        self.shared.delays.send_modify(|delays| delays.set(resource, user, delay));
    }

    /// Serves normally (`true`) or refuses every connection (`false`).
    pub fn set_available(&self, available: bool) {
        self.set_availability(if available { Availability::Up } else { Availability::Refuse });
    }

    /// Sets how requests are treated from now on.
    pub fn set_availability(&self, availability: Availability) {
        self.shared.availability.send_replace(availability);
    }

    /// What a user (`system:serviceaccount:ns:name`) has asked for over HTTP until now.
    pub fn asked_by(&self, user: &str) -> BTreeSet<Asked> {
        self.shared.asked(user)
    }

    /// Forgets the history of changes: a watch that has to resume from before gets 410 Gone.
    pub fn compact(&self) {
        self.shared.change(|cluster| cluster.store.compact());
    }

    /// Ends all open watches, as a restarting server does; clients resume from their last version.
    pub fn close_watches(&self) {
        self.shared.closed_watches.send_modify(|closed| *closed += 1);
    }

    /// Sets what `kubectl logs` prints.
    pub fn set_log_source(&self, source: Arc<LogSource>) {
        self.shared.set_logs(source);
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Not the blocking way: the server may be dropped inside another runtime.
            runtime.shutdown_background();
        }
    }
}
