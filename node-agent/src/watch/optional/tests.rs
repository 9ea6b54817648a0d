//! A kind that comes, goes and comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};

use super::super::{PEER_AUTHENTICATION, optional};
use crate::cluster::fake_api::{client, failure};
use crate::index::event::{Event, Kind, Object};

const PERIOD: Duration = Duration::from_millis(20);

/// What the API server knows at the moment.
const NOTHING: usize = 0;
const BETA: usize = 1;
const BOTH: usize = 2;

fn served() -> (u16, Value) {
    let resource = json!({"name": "peerauthentications", "singularName": "", "namespaced": true,
                          "kind": "PeerAuthentication", "verbs": ["list", "watch"]});
    (200, json!({"groupVersion": "x", "resources": [resource]}))
}

fn answer(known: usize, request: &str) -> (u16, Value) {
    let beta = request.contains("/v1beta1");
    let object = |version: &str| {
        json!({"apiVersion": format!("security.istio.io/{version}"), "kind": "PeerAuthentication",
               "metadata": {"namespace": "shop", "name": version, "resourceVersion": "7"}})
    };
    let version = if beta { "v1beta1" } else { "v1" };
    if known == NOTHING || (known == BETA && !beta) {
        return failure(404, "NotFound", "the server could not find the requested resource");
    }
    match request {
        // Every watch ends with news that it is too old, and what is there is listed again.
        _ if request.contains("watch=true") => {
            (200, json!({"type": "ERROR", "object": failure(410, "Expired", "").1}))
        }
        _ if request.contains("/peerauthentications") => {
            (200, json!({"metadata": {"resourceVersion": "7"}, "items": [object(version)]}))
        }
        _ => served(),
    }
}

fn short(event: Event) -> String {
    match event {
        Event::Restarted(Kind::PeerAuthentication) => "restarted".to_owned(),
        Event::Listed(Kind::PeerAuthentication) => "listed".to_owned(),
        Event::Applied(object @ Object::PeerAuthentication(_)) => object.name().to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_kind_is_watched_from_when_it_is_there_and_forgotten_when_it_stays_away() {
    let known = Arc::new(AtomicUsize::new(NOTHING));
    let now = Arc::clone(&known);
    let (client, _) = client(move |request| answer(now.load(Ordering::SeqCst), request));
    let wrap = |object| Object::PeerAuthentication(Box::new(object));
    let mut events =
        optional::watch(&client, Kind::PeerAuthentication, &PEER_AUTHENTICATION, wrap, PERIOD).map(short);
    let mut next = async |count: usize| events.by_ref().take(count).collect::<Vec<_>>().await.join(" ");
    assert_eq!(next(2).await, "restarted listed", "that there are none is known");
    known.store(BETA, Ordering::SeqCst);
    assert_eq!(next(3).await, "restarted shop/v1beta1 listed", "an old Istio's");
    known.store(NOTHING, Ordering::SeqCst);
    let gone = Instant::now();
    // The watcher begins a list that fails; only the second one is true.
    let mut seen = next(2).await;
    while !seen.ends_with("restarted listed") {
        seen = format!("{seen} {}", next(1).await);
    }
    assert!(!seen.contains("shop"), "{seen}");
    assert!(gone.elapsed() >= PERIOD, "an API server that restarts knows nothing for a moment");
    known.store(BOTH, Ordering::SeqCst);
    assert_eq!(next(3).await, "restarted shop/v1 listed", "the newest version");
}
