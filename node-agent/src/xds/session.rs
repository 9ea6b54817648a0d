//! One client's state: what it holds, what it lacks, what it has not answered yet.
//!
//! A step machine without I/O: requests and changes go in, responses come out of `next`. Changes that come while an
//! answer is awaited are collected by name, so a slow client costs one name per resource however often it changes,
//! and is brought up to date by one response, or by parts of it where it understands that. Of what a stranger says it
//! holds only what there is for it is remembered. **Invariant:** one response without ACK or NACK per type.

use std::collections::{BTreeMap, HashMap, HashSet};

use mesh_core::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use mesh_core::xds::IN_PARTS;
use prost_types::Any;

use super::scope::{Scope, View};
use super::snapshot::{Name, Snapshot, Type, Version};

/// What a client did wrong, so that its stream has to end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Subscribed to single resources.
    #[error("subscription to {0:?}: only wildcard subscriptions are served here (no names, or \"*\")")]
    Names(String),
    /// Names more that there is nothing of than any client could hold.
    #[error("{0} names, of which there is nothing here: at most {MOST_GONE} are answered")]
    TooMany(usize),
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

/// Names that a stranger may say it holds although there is no such thing (any more).
pub const MOST_GONE: usize = 10_000;

/// State of one client.
#[derive(Debug, Default)]
pub struct Session {
    subscriptions: BTreeMap<Type, Subscription>,
    nonces: u64,
    /// The client has answered before it asked for workloads, so it will not: clients say at once what they want.
    policies_alone: bool,
    /// It takes responses in parts.
    in_parts: bool,
    scope: Scope,
}

#[derive(Debug)]
struct Subscription {
    /// What the client was sent, or said it holds.
    held: HashMap<Name, Held>,
    /// Names that it asked about and that nothing has: to be answered so.
    gone: Vec<String>,
    pending: Pending,
    /// The last response was a part.
    continued: bool,
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

    /// Whether its client is told of some resources alone.
    pub fn is_a_stranger_s(&self) -> bool {
        self.scope != Scope::Everything
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// When the client asks for what is not served; its stream should end with the reason.
    pub fn receive(
        &mut self,
        request: DeltaDiscoveryRequest,
        snapshot: &Snapshot,
    ) -> Result<Received, BadRequest> {
        let Some(r#type) = Type::of(&request.type_url) else { return Ok(Received::Ignored) };
        let knows = |feature: &str| {
            request.node.iter().any(|node| node.client_features.iter().any(|one| one == feature))
        };
        self.in_parts |= knows(IN_PARTS);
        let view = View { snapshot, scope: &self.scope };
        let names = &request.resource_names_subscribe;
        let asked_for_addresses = self.subscriptions.contains_key(&Type::Address);
        let Some(subscription) = self.subscriptions.get_mut(&r#type) else {
            if let Some(name) = names.first().filter(|_| !names.iter().any(|name| name == "*")) {
                return Err(BadRequest::Names(name.chars().take(253).collect()));
            }
            let mut subscription = Subscription::new(r#type, request.initial_resource_versions, view)?;
            subscription.asked_about(r#type, names, view)?;
            self.subscriptions.insert(r#type, subscription);
            return Ok(Received::Subscribed(r#type));
        };
        subscription.asked_about(r#type, names, view)?;
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
        let Self { subscriptions, nonces, policies_alone, in_parts, scope } = self;
        let view = View { snapshot, scope };
        let most = if *in_parts { PART } else { usize::MAX };
        let [addresses, policies] = [Type::Address, Type::Authorization];
        // A client that comes back asks for policies first, and may have had others than these with its workloads.
        let naming = subscriptions.get(&addresses).map_or(!*policies_alone, Subscription::is_pending);
        if let Some(subscription) = subscriptions.get_mut(&policies) {
            let last = if naming { Last::Held } else { Last::Told };
            let next = subscription.next(policies, view, nonces, last, most);
            if next.is_some() || subscription.lacks(policies, view) {
                return next;
            }
        }
        subscriptions.get_mut(&addresses)?.next(addresses, view, nonces, Last::Told, most)
    }
}

impl Subscription {
    /// What a client that was connected before says it holds, name to version; a version that is not one of ours
    /// equals none, so that resource is sent again. What a stranger says is not kept where there is no such thing.
    fn new(
        r#type: Type,
        initial: impl IntoIterator<Item = (String, String)>,
        view: View<'_>,
    ) -> Result<Self, BadRequest> {
        let (mut held, mut gone) = (HashMap::new(), Vec::new());
        for (name, version) in initial {
            let version = Held { version: Version::parse(&version), named: false };
            match view.name(r#type, &name) {
                Some(name) => drop(held.insert(Name::clone(name), version)),
                None if *view.scope == Scope::Everything => drop(held.insert(Name::from(name), version)),
                None => gone.push(name),
            }
        }
        let many = gone.len();
        let new = Self { held, gone, pending: Pending::Start, continued: false, outstanding: None };
        if many > MOST_GONE { Err(BadRequest::TooMany(many)) } else { Ok(new) }
    }

    /// All are told everything: of single names there is to say only that there is nothing.
    fn asked_about(&mut self, r#type: Type, names: &[String], view: View<'_>) -> Result<(), BadRequest> {
        let unknown = |name: &&String| {
            *name != "*" && !self.held.contains_key(name.as_str()) && view.find(r#type, name).is_none()
        };
        let unknown: Vec<String> = names.iter().filter(unknown).cloned().collect();
        self.gone.extend(unknown);
        let many = self.gone.len();
        if many > MOST_GONE { Err(BadRequest::TooMany(many)) } else { Ok(()) }
    }

    fn next(
        &mut self,
        r#type: Type,
        view: View<'_>,
        nonces: &mut u64,
        last: Last,
        most: usize,
    ) -> Option<DeltaDiscoveryResponse> {
        if self.outstanding.is_some() {
            return None;
        }
        let pending = std::mem::replace(&mut self.pending, Pending::Names(HashSet::new()));
        let must_answer = matches!(pending, Pending::Start) || self.continued;
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
        let Difference { resources, mut removed, rest } = self.difference(r#type, names, view, most);
        removed.extend(std::mem::take(&mut self.gone));
        self.continued = !rest.is_empty();
        if let Pending::Names(pending) = &mut self.pending {
            pending.extend(rest);
        }
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
            continues: self.continued,
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

    /// What the client lacks and what it has too much of these names; noted as told. No more than about so many bytes.
    fn difference(&mut self, r#type: Type, names: HashSet<Name>, view: View<'_>, most: usize) -> Difference {
        let (names, removed): (Vec<_>, Vec<_>) =
            names.into_iter().partition(|name| view.find(r#type, name).is_some());
        // All at once and first: another may have what they had.
        let removed = removed.into_iter().filter(|name| self.held.remove(name).is_some());
        let removed: Vec<String> = removed.map(|name| name.to_string()).collect();
        let (mut resources, mut bytes) = (Vec::new(), 0);
        let mut names = names.into_iter();
        while bytes < most
            && let Some(name) = names.next()
        {
            let Some(resource) = view.find(r#type, &name) else { continue };
            let held = Held { version: Some(resource.version), named: resource.named };
            let known = self.held.insert(Name::clone(&name), held);
            if known.is_some_and(|known| known.version == held.version) {
                continue;
            }
            bytes += resource.bytes.len() + name.len();
            resources.push(Resource {
                version: resource.version.text(),
                resource: Some(Any { type_url: r#type.url().to_owned(), value: resource.bytes.to_vec() }),
                name: name.to_string(),
                aliases: Vec::new(),
            });
        }
        Difference { resources, removed, rest: names.collect() }
    }
}

/// What a client is to be told.
struct Difference {
    resources: Vec<Resource>,
    removed: Vec<String>,
    /// Names for the next part.
    rest: Vec<Name>,
}

/// Bytes of one part of a response: a mesh of some size is never in memory once more for a client.
const PART: usize = 4 << 20;

#[cfg(test)]
mod tests;
