//! One client's state: what it holds, what it lacks, what it has not answered yet.
//!
//! A step machine without I/O: requests and changes go in, responses come out of `next`. Changes that come while an
//! answer is awaited are collected by name, so a slow client costs one name per resource however often it changes,
//! and is brought up to date by one response. **Invariant:** one response without ACK or NACK per type.

use std::collections::{BTreeMap, HashMap, HashSet};

use mesh_core::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use prost_types::Any;

use super::scope::{Scope, View};
use super::snapshot::{Name, Snapshot, Type, Version};

/// What a client did wrong, so that its stream has to end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Subscribed to single resources.
    #[error("subscription to {0:?}: only wildcard subscriptions are served here (no names, or \"*\")")]
    Names(String),
}

/// What a request amounted to, for the log and the metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// The first of its type.
    Subscribed(Type),
    /// The client has applied the last response.
    Acked(Type),
    /// The client refused some of the last response.
    Nacked {
        /// Of this type.
        r#type: Type,
        /// Which resources the response had, at most [`NACK_NAMES`].
        names: Vec<Name>,
        /// What the client says.
        message: String,
    },
    /// Nothing to do: a type that is not served, or an answer to an older response.
    Ignored,
}

/// How many resource names of a refused response are told.
pub const NACK_NAMES: usize = 10;

/// State of one client.
#[derive(Debug, Default)]
pub struct Session {
    subscriptions: BTreeMap<Type, Subscription>,
    nonces: u64,
    /// The client has answered before it asked for workloads, so it will not: clients say at once what they want.
    policies_alone: bool,
    scope: Scope,
}

#[derive(Debug)]
struct Subscription {
    /// What the client was sent, or said it holds.
    held: HashMap<Name, Held>,
    pending: Pending,
    outstanding: Option<Outstanding>,
}

/// What a client has under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    /// None: not one of ours.
    version: Option<Version>,
    /// It is about those alone that name it, as far as is known.
    named: bool,
}

/// What to compare with the snapshot before the next response.
#[derive(Debug)]
enum Pending {
    /// Everything, and answer even if there is nothing to tell: clients wait for the first response of each type.
    Start,
    /// Everything.
    All,
    /// These names.
    Names(HashSet<Name>),
}

/// What becomes of policies that have to come after the workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    Told,
    /// Not yet.
    Held,
}

#[derive(Debug)]
struct Outstanding {
    nonce: String,
    names: Vec<Name>,
}

impl Session {
    /// Of a client that is told of these resources alone. The default is told of all.
    pub fn new(scope: Scope) -> Self {
        Self { scope, ..Self::default() }
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// When the client asks for what is not served; its stream should end with the reason.
    pub fn receive(&mut self, request: DeltaDiscoveryRequest) -> Result<Received, BadRequest> {
        let Some(r#type) = Type::of(&request.type_url) else { return Ok(Received::Ignored) };
        if let Some(name) = request.resource_names_subscribe.iter().find(|name| *name != "*") {
            return Err(BadRequest::Names(name.chars().take(253).collect()));
        }
        let asked_for_addresses = self.subscriptions.contains_key(&Type::Address);
        let Some(subscription) = self.subscriptions.get_mut(&r#type) else {
            self.subscriptions.insert(r#type, Subscription::new(request.initial_resource_versions));
            return Ok(Received::Subscribed(r#type));
        };
        let answers = |outstanding: &mut Outstanding| outstanding.nonce == request.response_nonce;
        let Some(outstanding) = subscription.outstanding.take_if(answers) else {
            return Ok(Received::Ignored);
        };
        self.policies_alone |= !asked_for_addresses;
        Ok(match request.error_detail {
            None => Received::Acked(r#type),
            Some(error) => Received::Nacked { r#type, names: outstanding.names, message: error.message },
        })
    }

    /// Notes that resources changed.
    pub fn changed(&mut self, r#type: Type, names: impl IntoIterator<Item = Name>, snapshot: &Snapshot) {
        let Some(subscription) = self.subscriptions.get_mut(&r#type) else { return };
        let Pending::Names(pending) = &mut subscription.pending else { return };
        let view = View { snapshot, scope: &self.scope };
        // Of what the client does not have and may not see it is told nothing, not even later.
        let held = &subscription.held;
        pending.extend(
            names.into_iter().filter(|name| held.contains_key(name) || view.find(r#type, name).is_some()),
        );
        // Names of resources that came and went while the client did not answer: bounded by comparing all instead.
        if pending.len() > snapshot.count(r#type) + subscription.held.len() {
            subscription.pending = Pending::All;
        }
    }

    /// The next response, if a type has something to tell and no response without an answer. A workload must never
    /// name a policy that its proxy does not know, and no policy may be about nobody in between: policies that are new
    /// come before the workloads; those that are gone, or are from now on about those alone that name them, after them.
    pub fn next(&mut self, snapshot: &Snapshot) -> Option<DeltaDiscoveryResponse> {
        let Self { subscriptions, nonces, policies_alone, scope } = self;
        let view = View { snapshot, scope };
        let [addresses, policies] = [Type::Address, Type::Authorization];
        // A client that comes back asks for policies first, and may have had others than these with its workloads.
        let naming = subscriptions.get(&addresses).map_or(!*policies_alone, Subscription::is_pending);
        if let Some(subscription) = subscriptions.get_mut(&policies) {
            let last = if naming { Last::Held } else { Last::Told };
            let next = subscription.next(policies, view, nonces, last);
            if next.is_some() || subscription.lacks(policies, view) {
                return next;
            }
        }
        subscriptions.get_mut(&addresses)?.next(addresses, view, nonces, Last::Told)
    }
}

impl Subscription {
    /// What a client that was connected before says it holds, name to version; a version that is not one of ours
    /// equals none, so that resource is sent again.
    fn new(initial: impl IntoIterator<Item = (String, String)>) -> Self {
        let held = |version: String| Held { version: Version::parse(&version), named: false };
        let held = initial.into_iter().map(|(name, version)| (Name::from(name), held(version)));
        Self { held: held.collect(), pending: Pending::Start, outstanding: None }
    }

    fn next(
        &mut self,
        r#type: Type,
        view: View<'_>,
        nonces: &mut u64,
        last: Last,
    ) -> Option<DeltaDiscoveryResponse> {
        if self.outstanding.is_some() {
            return None;
        }
        let pending = std::mem::replace(&mut self.pending, Pending::Names(HashSet::new()));
        let must_answer = matches!(pending, Pending::Start);
        let mut names = match pending {
            Pending::Names(names) => names,
            Pending::Start | Pending::All => {
                view.names(r#type).chain(self.held.keys()).map(Name::clone).collect()
            }
        };
        if last == Last::Held {
            let later = names.extract_if(|name| self.is_last(r#type, name, view)).collect();
            self.pending = Pending::Names(later);
        }
        let (resources, removed) = self.difference(r#type, names, view);
        if resources.is_empty() && removed.is_empty() && !must_answer {
            return None;
        }
        *nonces += 1;
        let nonce = nonces.to_string();
        let told = resources.iter().map(|resource| &resource.name).chain(&removed);
        let names = told.take(NACK_NAMES).map(|name| Name::from(name.as_str())).collect();
        self.outstanding = Some(Outstanding { nonce: nonce.clone(), names });
        Some(DeltaDiscoveryResponse {
            type_url: r#type.url().to_owned(),
            nonce,
            resources,
            removed_resources: removed,
            ..Default::default()
        })
    }

    /// Whether there is something to compare with the snapshot.
    fn is_pending(&self) -> bool {
        !matches!(&self.pending, Pending::Names(names) if names.is_empty())
    }

    /// Whether the client loses it, or it is about fewer than what the client has under this name.
    fn is_last(&self, r#type: Type, name: &Name, view: View<'_>) -> bool {
        let at_large = || self.held.get(name).is_some_and(|held| !held.named);
        view.find(r#type, name).is_none_or(|resource| resource.named && at_large())
    }

    /// Whether the client is yet to be told of a resource before the workloads.
    fn lacks(&self, r#type: Type, view: View<'_>) -> bool {
        match &self.pending {
            Pending::Start | Pending::All => true,
            Pending::Names(names) => names.iter().any(|name| !self.is_last(r#type, name, view)),
        }
    }

    /// What the client lacks and what it has too much of these names; noted as told.
    fn difference(
        &mut self,
        r#type: Type,
        names: HashSet<Name>,
        view: View<'_>,
    ) -> (Vec<Resource>, Vec<String>) {
        let (mut resources, mut removed) = (Vec::new(), Vec::new());
        for name in names {
            match view.find(r#type, &name) {
                Some(resource) => {
                    let held = Held { version: Some(resource.version), named: resource.named };
                    let known = self.held.insert(Name::clone(&name), held);
                    if known.is_some_and(|known| known.version == held.version) {
                        continue;
                    }
                    resources.push(Resource {
                        version: resource.version.text(),
                        resource: Some(Any {
                            type_url: r#type.url().to_owned(),
                            value: resource.bytes.to_vec(),
                        }),
                        name: name.to_string(),
                        aliases: Vec::new(),
                    });
                }
                None if self.held.remove(&name).is_some() => removed.push(name.to_string()),
                None => {}
            }
        }
        (resources, removed)
    }
}
