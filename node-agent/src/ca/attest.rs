//! May this caller have that identity? A pure decision over what the API server said.
//!
//! Every pod's account may have its own identity. Only the mesh's ztunnel may ask for another, since it ends mutual TLS
//! for the pods of its node; what it may have is what its node runs, so a stolen node yields that node's identities only.
//!
//! **Invariant:** a fact that is missing is asked for, never assumed.

use std::collections::BTreeMap;

use mesh_core::identity::{Identity, InvalidIdentity, TrustDomain};

/// The audience that tokens for this CA have, as Istio's.
pub const AUDIENCE: &str = "istio-ca";

/// What a TokenReview said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Review {
    /// `status.authenticated`.
    pub authenticated: bool,
    /// `status.error`.
    pub error: Option<String>,
    /// `status.audiences`: those of the asked ones that the token is for.
    pub audiences: Vec<String>,
    /// `status.user.username`.
    pub username: String,
    /// `status.user.extra`.
    pub extra: BTreeMap<String, Vec<String>>,
}

/// A Kubernetes service account.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Who calls, from a review.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The account of the token.
    pub account: ServiceAccount,
    /// Where the token says that its pod runs.
    place: Place,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// Kubernetes 1.30 and later put it into the token.
    Node(String),
    /// Older ones name the pod.
    Pod { name: String, uid: String },
    /// A token that is bound to no pod.
    Unknown,
}

/// What the decision needs of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: String,
    /// `spec.serviceAccountName`, "default" if empty.
    pub service_account: String,
    /// `spec.nodeName`, empty before it is scheduled.
    pub node: String,
    /// `status.phase` is Succeeded or Failed. One that is terminating has not ended: it still answers its clients.
    pub ended: bool,
}

/// How fresh a list of pods has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// As the API server's cache has it, which costs it little.
    Cached,
    /// As it is now: a cache may not have a pod that was just made.
    Latest,
}

/// Something the API server knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The pod that the caller's token is bound to.
    CallerPod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// The pods of one namespace on one node.
    Pods {
        /// `spec.nodeName`.
        node: String,
        /// `metadata.namespace`.
        namespace: String,
        /// Which state of them.
        freshness: Freshness,
    },
}

/// Facts as far as they are known.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Answer to [`Fact::CallerPod`]; the inner `None`: there is no such pod.
    pub caller_pod: Option<Option<Pod>>,
    /// Answer to the last [`Fact::Pods`].
    pub pods: Option<(Freshness, Vec<Pod>)>,
}

/// The settings of the decision.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The only one whose identities this CA certifies.
    pub trust_domain: TrustDomain,
    /// Who may ask for others' identities.
    pub ztunnel: ServiceAccount,
    /// Who is a server besides, whose clients know it by DNS names.
    pub agent: ServiceAccount,
    /// These names.
    pub agent_names: Vec<String>,
}

/// Where the decision stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The caller may have a certificate for this identity.
    Issue(Identity),
    /// It may not.
    Refuse(Refusal),
    /// Decide again with this fact.
    Need(Fact),
}

/// Why a caller gets no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No `authorization: Bearer`.
    #[error("the request has no token (metadata \"authorization: Bearer …\")")]
    NoToken,
    /// The API server does not know the token.
    #[error("the API server does not accept the token: {0}")]
    Token(String),
    /// A token for another service.
    #[error("the token is not for audience {AUDIENCE:?}; mount a projected token with that audience")]
    Audience,
    /// A token of a person or a node.
    #[error("{0:?} is not a service account")]
    NotServiceAccount(String),
    /// An identity that is none.
    #[error("the identity asked for is malformed: {0}")]
    Malformed(#[from] InvalidIdentity),
    /// An identity of somebody else's mesh.
    #[error("{asked} is not of this mesh's trust domain {ours}")]
    TrustDomain {
        /// What was asked for.
        asked: Identity,
        /// Ours.
        ours: TrustDomain,
    },
    /// Only ztunnel acts for others.
    #[error("service account {caller} may only have its own identity, not {asked}")]
    NotOwn {
        /// Who asked.
        caller: String,
        /// For what.
        asked: Identity,
    },
    /// Nothing says which node the caller is on.
    #[error(
        "the token of {0} is not bound to a running pod, so the caller's node is not known; use a projected token"
    )]
    NoNode(String),
    /// The node runs no such pod.
    #[error("no running pod on node {node} has identity {asked}{}", if *ended { "; one that had it has ended" } else { "" })]
    NoPod {
        /// What was asked for.
        asked: Identity,
        /// The caller's node.
        node: String,
        /// There was one.
        ended: bool,
    },
}

impl Refusal {
    /// Short name for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::Token(_) => "bad_token",
            Self::Audience => "wrong_audience",
            Self::NotServiceAccount(_) => "not_service_account",
            Self::Malformed(_) => "malformed_identity",
            Self::TrustDomain { .. } => "wrong_trust_domain",
            Self::NotOwn { .. } => "foreign_identity",
            Self::NoNode(_) => "unknown_node",
            Self::NoPod { .. } => "no_pod_on_node",
        }
    }

    /// It is not known who calls, as opposed to: it is known, and may not.
    pub fn is_unauthenticated(&self) -> bool {
        matches!(self, Self::NoToken | Self::Token(_) | Self::Audience | Self::NotServiceAccount(_))
    }
}

impl Caller {
    /// # Errors
    /// When the review does not name a service account that presented a token for this CA.
    pub fn from_review(review: &Review) -> Result<Self, Refusal> {
        if !review.authenticated {
            let why =
                review.error.clone().unwrap_or_else(|| "it is expired, revoked or of another cluster".into());
            return Err(Refusal::Token(why));
        }
        // An API server that does not know audiences leaves the list empty: such a token proves nothing here.
        if !review.audiences.iter().any(|audience| audience == AUDIENCE) {
            return Err(Refusal::Audience);
        }
        let account =
            review.username.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
        let (namespace, name) = account.ok_or_else(|| Refusal::NotServiceAccount(review.username.clone()))?;
        let extra = |key: &str| {
            let values = review.extra.get(&format!("authentication.kubernetes.io/{key}"));
            values.and_then(|values| values.first()).filter(|value| !value.is_empty()).cloned()
        };
        let place = match (extra("node-name"), extra("pod-name"), extra("pod-uid")) {
            (Some(node), _, _) => Place::Node(node),
            (None, Some(name), Some(uid)) => Place::Pod { name, uid },
            _ => Place::Unknown,
        };
        Ok(Self { account: ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() }, place })
    }
}

impl Caller {
    /// The node of its pod, if the token says it.
    pub fn node(&self) -> Option<&str> {
        match &self.place {
            Place::Node(node) => Some(node),
            Place::Pod { .. } | Place::Unknown => None,
        }
    }

    /// Name and UID of its pod, if the token says these and no node.
    pub fn pod(&self) -> Option<(&str, &str)> {
        match &self.place {
            Place::Pod { name, uid } => Some((name, uid)),
            Place::Node(_) | Place::Unknown => None,
        }
    }
}

/// The DNS names of a certificate for `identity`: the agent's in its own, if it asks for it itself. Others have none.
pub fn server_names<'a>(rules: &'a Rules, account: &ServiceAccount, identity: &Identity) -> &'a [String] {
    let own = identity.namespace() == account.namespace && identity.service_account() == account.name;
    if own && *account == rules.agent { &rules.agent_names } else { &[] }
}

impl std::fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Decides with the facts that are there; `asked` is `None` where the caller just wants its own.
pub fn attest(rules: &Rules, caller: &Caller, asked: Option<&Identity>, facts: &Facts) -> Verdict {
    decide(rules, caller, asked, facts).unwrap_or_else(Verdict::Refuse)
}

fn decide(
    rules: &Rules,
    caller: &Caller,
    asked: Option<&Identity>,
    facts: &Facts,
) -> Result<Verdict, Refusal> {
    let account = &caller.account;
    let own = Identity::new(rules.trust_domain.clone(), &account.namespace, &account.name)?;
    let Some(asked) = asked.filter(|asked| **asked != own) else {
        return Ok(Verdict::Issue(own));
    };
    if *asked.trust_domain() != rules.trust_domain {
        return Err(Refusal::TrustDomain { asked: asked.clone(), ours: rules.trust_domain.clone() });
    }
    if *account != rules.ztunnel {
        return Err(Refusal::NotOwn { caller: account.to_string(), asked: asked.clone() });
    }
    let node = match &caller.place {
        Place::Node(node) => node.clone(),
        Place::Unknown => return Err(Refusal::NoNode(account.to_string())),
        Place::Pod { name, uid } => match &facts.caller_pod {
            None => {
                let (namespace, name) = (account.namespace.clone(), name.clone());
                return Ok(Verdict::Need(Fact::CallerPod { namespace, name }));
            }
            // The UID too: a pod's name may be taken by another, on another node, while the token still lives.
            Some(Some(pod)) if pod.uid == *uid && !pod.node.is_empty() => pod.node.clone(),
            Some(_) => return Err(Refusal::NoNode(account.to_string())),
        },
    };
    let need = |freshness| {
        Verdict::Need(Fact::Pods { node: node.clone(), namespace: asked.namespace().to_owned(), freshness })
    };
    let Some((freshness, pods)) = &facts.pods else {
        return Ok(need(Freshness::Cached));
    };
    let has_it = |pod: &&Pod| pod.node == node && pod.service_account == asked.service_account();
    let (ended, running): (Vec<_>, Vec<_>) = pods.iter().filter(has_it).partition(|pod| pod.ended);
    match (running.is_empty(), freshness) {
        (false, _) => Ok(Verdict::Issue(asked.clone())),
        (true, Freshness::Cached) => Ok(need(Freshness::Latest)),
        (true, Freshness::Latest) => {
            Err(Refusal::NoPod { asked: asked.clone(), node, ended: !ended.is_empty() })
        }
    }
}

#[cfg(test)]
mod tests;
