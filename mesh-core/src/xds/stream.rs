//! The client's half of delta xDS (SotW is not spoken), pure: responses in, requests out.
//!
//! Subscribes to everything of each type (no names), acknowledges or refuses each response, remembers the versions
//! of what was accepted, and states them when a new stream starts, so that an unchanged mesh is not sent again.

use std::collections::HashMap;

use super::{Effect, Handler, IN_PARTS, Rejected, Update};
use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, ErrorDetail, Node};

/// `google.rpc.Code.INVALID_ARGUMENT`.
const INVALID_ARGUMENT: i32 = 3;

/// How many rejections one NACK tells about; the log has all of them.
const NACK_REASONS: usize = 20;

/// The state that outlives a stream.
#[derive(Debug)]
pub struct Session {
    node: Node,
    subscriptions: Vec<Subscription>,
}

#[derive(Debug)]
struct Subscription {
    type_url: &'static str,
    versions: HashMap<String, String>,
    answered: bool,
}

/// What to do after a response.
#[derive(Debug)]
pub struct Reply {
    /// ACK or NACK, to be sent.
    pub request: DeltaDiscoveryRequest,
    /// What was skipped, for the log.
    pub rejected: Vec<Rejected>,
}

impl Session {
    /// A client that wants every resource of these types.
    pub fn new(mut node: Node, types: &[&'static str]) -> Self {
        node.client_features.push(IN_PARTS.to_owned());
        let subscriptions = types
            .iter()
            .map(|type_url| Subscription { type_url, versions: HashMap::new(), answered: false })
            .collect();
        Self { node, subscriptions }
    }

    /// The first requests of a new stream, one a type.
    pub fn start(&self) -> Vec<DeltaDiscoveryRequest> {
        self.subscriptions
            .iter()
            .enumerate()
            .map(|(index, subscription)| DeltaDiscoveryRequest {
                node: (index == 0).then(|| self.node.clone()),
                type_url: subscription.type_url.to_owned(),
                initial_resource_versions: subscription.versions.clone().into_iter().collect(),
                ..Default::default()
            })
            .collect()
    }

    /// Whether each type has been answered once, on this or an earlier stream: the mesh is known as a whole.
    pub fn is_complete(&self) -> bool {
        self.subscriptions.iter().all(|subscription| subscription.answered)
    }

    /// Types that have not been answered yet.
    pub fn pending(&self) -> impl Iterator<Item = &'static str> {
        self.subscriptions.iter().filter(|s| !s.answered).map(|s| s.type_url)
    }

    /// Applies a response and says what to reply.
    pub fn receive(&mut self, response: DeltaDiscoveryResponse, handler: &mut impl Handler) -> Reply {
        let DeltaDiscoveryResponse { resources, type_url, nonce, removed_resources, continues, .. } =
            response;
        let Some(subscription) = self.subscriptions.iter_mut().find(|s| s.type_url == type_url) else {
            let reason = "this type was not asked for".to_owned();
            let rejected = Rejected { name: type_url.clone(), reason, effect: Effect::Nothing };
            return reply(type_url, nonce, vec![rejected]);
        };
        let mut versions = Vec::with_capacity(resources.len());
        let mut updates = Vec::with_capacity(resources.len());
        for resource in resources {
            versions.push((resource.name.clone(), resource.version));
            updates.push(Update { name: resource.name, body: resource.resource });
        }
        let rejected = handler.apply(&type_url, updates, &removed_resources);
        for (name, version) in versions {
            // A refused resource keeps the version of its last good form: the server will send it again.
            if !rejected.iter().any(|other| other.name == name) {
                subscription.versions.insert(name, version);
            }
        }
        for name in &removed_resources {
            subscription.versions.remove(name);
        }
        subscription.answered |= !continues;
        reply(type_url, nonce, rejected)
    }
}

fn reply(type_url: String, nonce: String, rejected: Vec<Rejected>) -> Reply {
    let error_detail = (!rejected.is_empty())
        .then(|| ErrorDetail { code: INVALID_ARGUMENT, message: nack_message(&rejected) });
    let request =
        DeltaDiscoveryRequest { type_url, response_nonce: nonce, error_detail, ..Default::default() };
    Reply { request, rejected }
}

fn nack_message(rejected: &[Rejected]) -> String {
    let mut reasons: Vec<String> =
        rejected.iter().take(NACK_REASONS).map(|r| format!("{}: {}", r.name, r.reason)).collect();
    if rejected.len() > NACK_REASONS {
        reasons.push(format!("and {} more", rejected.len() - NACK_REASONS));
    }
    reasons.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::discovery::Resource;

    const A: &str = "type/a";
    const B: &str = "type/b";

    /// Refuses resources whose name starts with "bad".
    #[derive(Default)]
    struct Recorder(Vec<String>);

    impl Handler for Recorder {
        fn apply(&mut self, _type_url: &str, updates: Vec<Update>, removed: &[String]) -> Vec<Rejected> {
            self.0.extend(removed.iter().map(|name| format!("-{name}")));
            let (bad, good): (Vec<_>, Vec<_>) = updates.into_iter().partition(|u| u.name.starts_with("bad"));
            self.0.extend(good.into_iter().map(|u| format!("+{}", u.name)));
            let refuse = |u: Update| Rejected { name: u.name, reason: "no".into(), effect: Effect::Nothing };
            bad.into_iter().map(refuse).collect()
        }
    }

    fn response(
        type_url: &str,
        nonce: &str,
        resources: &[(&str, &str)],
        removed: &[&str],
    ) -> DeltaDiscoveryResponse {
        let resource = |(name, version): &(&str, &str)| Resource {
            name: (*name).into(),
            version: (*version).into(),
            ..Default::default()
        };
        DeltaDiscoveryResponse {
            type_url: type_url.into(),
            nonce: nonce.into(),
            resources: resources.iter().map(resource).collect(),
            removed_resources: removed.iter().map(|name| (*name).into()).collect(),
            ..Default::default()
        }
    }

    fn session() -> Session {
        Session::new(Node { id: "ztunnel~node".into(), ..Default::default() }, &[A, B])
    }

    #[test]
    fn first_requests_name_types_and_the_node_once() {
        let requests = session().start();
        assert_eq!(requests.iter().map(|r| r.type_url.as_str()).collect::<Vec<_>>(), [A, B]);
        assert!(requests[0].node.is_some() && requests[1].node.is_none());
        assert!(
            requests.iter().all(|r| r.response_nonce.is_empty() && r.resource_names_subscribe.is_empty())
        );
    }

    #[test]
    fn acknowledges_and_is_complete_when_both_types_came() {
        let (mut session, mut recorder) = (session(), Recorder::default());
        let reply = session.receive(response(A, "n1", &[("x", "1")], &[]), &mut recorder);
        assert_eq!((reply.request.response_nonce.as_str(), reply.request.error_detail), ("n1", None));
        assert!(reply.request.node.is_none() && !session.is_complete());
        assert_eq!(session.pending().collect::<Vec<_>>(), [B]);
        session.receive(response(B, "n2", &[], &[]), &mut recorder);
        assert!(session.is_complete());
    }

    /// Of half a mesh nobody can say what is not in it: which policies there are, for one.
    #[test]
    fn is_not_complete_before_the_last_part() {
        let (mut session, mut recorder) = (session(), Recorder::default());
        assert_eq!(session.start()[0].node.as_ref().unwrap().client_features, [IN_PARTS]);
        session.receive(response(B, "1", &[], &[]), &mut recorder);
        for (nonce, name, continues) in [("2", "x", true), ("3", "y", true), ("4", "z", false)] {
            let part = DeltaDiscoveryResponse { continues, ..response(A, nonce, &[(name, "1")], &[]) };
            assert!(!session.is_complete());
            assert_eq!(session.receive(part, &mut recorder).request.response_nonce, nonce);
        }
        assert!(session.is_complete());
        assert_eq!(recorder.0, ["+x", "+y", "+z"]);
        let later = DeltaDiscoveryResponse { continues: true, ..response(A, "5", &[("x", "2")], &[]) };
        session.receive(later, &mut recorder);
        assert!(session.is_complete(), "it was known as a whole");
    }

    #[test]
    fn refuses_the_bad_and_applies_the_rest() {
        let (mut session, mut recorder) = (session(), Recorder::default());
        let resources = [("x", "1"), ("bad-1", "1"), ("y", "1")];
        let reply = session.receive(response(A, "n1", &resources, &["z"]), &mut recorder);
        let detail = reply.request.error_detail.unwrap();
        assert_eq!((detail.code, detail.message.as_str()), (INVALID_ARGUMENT, "bad-1: no"));
        assert_eq!(recorder.0, ["-z", "+x", "+y"]);
    }

    #[test]
    fn a_new_stream_states_the_accepted_versions() {
        let (mut session, mut recorder) = (session(), Recorder::default());
        session.receive(response(A, "1", &[("x", "1"), ("y", "1"), ("bad", "1")], &[]), &mut recorder);
        session.receive(response(A, "2", &[("x", "2")], &["y"]), &mut recorder);
        let held = session.start().remove(0).initial_resource_versions;
        assert_eq!(held.into_iter().collect::<Vec<_>>(), [("x".to_owned(), "2".to_owned())]);
    }

    #[test]
    fn long_refusals_are_cut() {
        let (mut session, mut recorder) = (session(), Recorder::default());
        let names: Vec<String> = (0..30).map(|i| format!("bad-{i}")).collect();
        let resources: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "1")).collect();
        let reply = session.receive(response(A, "1", &resources, &[]), &mut recorder);
        assert!(reply.request.error_detail.unwrap().message.ends_with("and 10 more"));
        assert_eq!(reply.rejected.len(), 30);
    }

    #[test]
    fn an_unknown_type_is_refused() {
        let (mut session, mut recorder) = (session(), Recorder::default());
        let reply = session.receive(response("type/c", "1", &[("x", "1")], &[]), &mut recorder);
        assert!(reply.request.error_detail.is_some() && recorder.0.is_empty());
        assert_eq!(reply.request.type_url, "type/c");
    }
}
