//! What the model is fed with: typed objects of the API server, in the order of a list-and-watch.
//!
//! After `Restarted(kind)` come all objects of the kind as `Applied`, then `Listed(kind)`: what was not among them no
//! longer exists, which is how deletions are noticed that happened while the connection was down.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;

/// Kinds that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `v1`
    Namespace,
    /// `v1`
    Node,
    /// `v1`
    Pod,
    /// `v1`
    Service,
    /// `discovery.k8s.io/v1`
    EndpointSlice,
    /// `networking.k8s.io/v1`
    NetworkPolicy,
    /// `security.istio.io/v1`, or v1beta1; the cluster may not have it.
    PeerAuthentication,
    /// The same.
    AuthorizationPolicy,
    /// `networking.istio.io/v1`, or v1beta1; the cluster may not have it.
    ServiceEntry,
    /// The same.
    WorkloadEntry,
}

impl Kind {
    /// Those that have to be known before anything is served.
    pub const ALL: [Self; 9] = [
        Self::Namespace,
        Self::Node,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::PeerAuthentication,
        Self::AuthorizationPolicy,
        Self::ServiceEntry,
        Self::WorkloadEntry,
    ];
}

/// Namespace and name; the namespace is empty for kinds that have none.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// A namespaced name.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// The name of a Namespace or Node.
    pub fn cluster_wide(name: &Arc<str>) -> Self {
        Self { namespace: Arc::from(""), name: Arc::clone(name) }
    }

    fn of(meta: &ObjectMeta) -> Self {
        Self::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.namespace {
            "" => f.write_str(&self.name),
            namespace => write!(f, "{namespace}/{}", self.name),
        }
    }
}

/// One object; boxed, since they are large and are moved through channels.
#[derive(Clone, Debug)]
pub enum Object {
    /// A namespace.
    Namespace(Box<Namespace>),
    /// A node.
    Node(Box<Node>),
    /// A pod.
    Pod(Box<Pod>),
    /// A service.
    Service(Box<Service>),
    /// Some endpoints of a service.
    EndpointSlice(Box<EndpointSlice>),
    /// What the CNI lets reach some pods.
    NetworkPolicy(Box<NetworkPolicy>),
    /// Who has to prove itself to pods.
    PeerAuthentication(Box<Custom>),
    /// Who may connect to pods.
    AuthorizationPolicy(Box<Custom>),
    /// A service that is not Kubernetes'.
    ServiceEntry(Box<Custom>),
    /// An endpoint that is no pod.
    WorkloadEntry(Box<Custom>),
}

/// An object of a kind that a CustomResourceDefinition defines.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Custom {
    /// `group/version` that it is written in.
    #[serde(default)]
    pub api_version: String,
    /// As of every object.
    pub metadata: ObjectMeta,
    /// Null if there is none.
    #[serde(default)]
    pub spec: Value,
    /// The same.
    #[serde(default)]
    pub status: Value,
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Node(_) => Kind::Node,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::NetworkPolicy(_) => Kind::NetworkPolicy,
            Self::PeerAuthentication(_) => Kind::PeerAuthentication,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::ServiceEntry(_) => Kind::ServiceEntry,
            Self::WorkloadEntry(_) => Kind::WorkloadEntry,
        }
    }

    /// Its name.
    pub fn name(&self) -> ObjectName {
        ObjectName::of(match self {
            Self::Namespace(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::Pod(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::EndpointSlice(object) => &object.metadata,
            Self::NetworkPolicy(object) => &object.metadata,
            Self::PeerAuthentication(object)
            | Self::AuthorizationPolicy(object)
            | Self::ServiceEntry(object)
            | Self::WorkloadEntry(object) => &object.metadata,
        })
    }
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A list of this kind begins.
    Restarted(Kind),
    /// This object is as given.
    Applied(Object),
    /// This object is gone.
    Deleted(Kind, ObjectName),
    /// This object exists, but cannot be decoded.
    Unreadable {
        /// Its kind.
        kind: Kind,
        /// Its name.
        name: ObjectName,
        /// Why not.
        reason: String,
    },
    /// The list of this kind is complete.
    Listed(Kind),
    /// The API groups that are served now.
    ApiGroups(Vec<String>),
}
