//! Is this pod to be in the mesh, and if not, why not.
//!
//! Asked for by the label `istio.io/dataplane-mode: ambient` on the pod or its namespace, the pod's own label first;
//! `none` on the pod opts out. What cannot or must not be captured is refused although it was asked for, and only a
//! refusal is worth telling the pod's owner.

use std::collections::BTreeMap;
use std::fmt;

use super::Config;
use super::namespace::Namespace;
use super::pod::Pod;

/// The label that asks for the mesh (Istio: `istio.io/dataplane-mode`).
pub const MODE_LABEL: &str = "istio.io/dataplane-mode";

/// What a label asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To be in the mesh.
    Ambient,
    /// Not to be.
    Off,
}

impl Mode {
    /// Reads the label; other values (Istio has more modes) ask for nothing here.
    pub(super) fn of(labels: Option<&BTreeMap<String, String>>) -> Option<Self> {
        match labels?.get(MODE_LABEL)?.as_str() {
            "ambient" => Some(Self::Ambient),
            "none" => Some(Self::Off),
            _ => None,
        }
    }
}

/// Whether a pod belongs in the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It does.
    Member,
    /// Nobody asked for it, or it opted out.
    NotAsked,
    /// Asked for, but not possible.
    Refused(Refusal),
}

/// Why a pod that was asked to be in the mesh is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Shares its node's network namespace.
    HostNetwork,
    /// Another mesh's proxy runs in the pod; which mesh.
    OtherMesh(&'static str),
    /// Runs in a sandbox with a network stack of its own; its RuntimeClass.
    Sandboxed(String),
    /// The mesh's own namespace.
    SystemNamespace,
    /// A namespace that the agent's settings exclude.
    ExcludedNamespace,
}

impl Refusal {
    /// Word for a condition's `reason`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::HostNetwork => "HostNetwork",
            Self::OtherMesh(_) => "OtherMesh",
            Self::Sandboxed(_) => "SandboxedRuntime",
            Self::SystemNamespace => "SystemNamespace",
            Self::ExcludedNamespace => "ExcludedNamespace",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HostNetwork => f.write_str(
                "the pod uses its node's network (hostNetwork), so its traffic cannot be told from the node's; \
                 run it without hostNetwork to have it in the mesh",
            ),
            Self::OtherMesh(mesh) => write!(
                f,
                "a proxy of {mesh} runs in the pod; switch its injection off and restart the pod to have it in this mesh"
            ),
            Self::Sandboxed(class) => write!(
                f,
                "the pod's runtime ({class}) gives it a network stack of its own, in which nothing can be captured; run it \
                 without that runtimeClassName to have it in the mesh"
            ),
            Self::SystemNamespace => {
                f.write_str("the pod is in the mesh's own namespace, which the mesh needs in order to start")
            }
            Self::ExcludedNamespace => {
                f.write_str("the pod's namespace is excluded by the agent's setting --exclude-namespaces")
            }
        }
    }
}

/// Decides for one pod. Namespace first among the refusals: it holds whatever the pod is.
pub(super) fn membership(config: &Config, pod: &Pod, namespace: Option<&Namespace>) -> Membership {
    let asked = pod.mode.or_else(|| namespace.and_then(|namespace| namespace.mode));
    if asked != Some(Mode::Ambient) {
        return Membership::NotAsked;
    }
    let refusal = if *pod.name.namespace == *config.system_namespace {
        Some(Refusal::SystemNamespace)
    } else if config.excluded_namespaces.contains(&*pod.name.namespace) {
        Some(Refusal::ExcludedNamespace)
    } else if pod.host_network {
        Some(Refusal::HostNetwork)
    } else if let Some(class) = &pod.sandbox {
        Some(Refusal::Sandboxed(class.clone()))
    } else {
        pod.other_mesh.map(Refusal::OtherMesh)
    };
    refusal.map_or(Membership::Member, Membership::Refused)
}

/// Whether pods of a RuntimeClass run in a sandbox with a network stack of its own. Its name is all there is to tell: what
/// a handler does is in the runtime's configuration. One that is not known is found out once its pod runs.
pub(super) fn is_sandbox(class: &str) -> bool {
    let class = class.to_ascii_lowercase();
    SANDBOXES.iter().any(|name| class.contains(name))
}

/// Names that gVisor and Kata Containers are installed under.
const SANDBOXES: [&str; 3] = ["gvisor", "runsc", "kata"];

/// Finds another mesh's proxy in a pod, by what its injector leaves: the mesh, annotations, container names.
pub(super) fn other_mesh<'a>(
    annotations: Option<&BTreeMap<String, String>>,
    mut containers: impl Iterator<Item = &'a str>,
) -> Option<&'static str> {
    let annotated = |key: &str| annotations.is_some_and(|annotations| annotations.contains_key(key));
    let by_annotation = OTHER_MESHES.iter().find(|(_, annotation, _)| annotated(annotation));
    by_annotation.map(|(mesh, ..)| *mesh).or_else(|| {
        containers
            .find_map(|name| OTHER_MESHES.iter().find(|(.., container)| *container == name))
            .map(|(mesh, ..)| *mesh)
    })
}

/// Mesh, the annotation its injector records its work in, and the name of its proxy's container.
const OTHER_MESHES: [(&str, &str, &str); 4] = [
    ("Istio (sidecar)", "sidecar.istio.io/status", "istio-proxy"),
    ("Linkerd", "linkerd.io/created-by", "linkerd-proxy"),
    ("Kuma", "kuma.io/sidecar-injected", "kuma-sidecar"),
    ("Consul", "consul.hashicorp.com/connect-inject-status", "consul-dataplane"),
];
