//! What strangers were told and have not taken yet: bounded in bytes, for each namespace and for all of them.
//!
//! A client decides how fast it takes a response, which is in memory meanwhile, encoded. So its bytes are counted from
//! before it is encoded until HTTP/2 has sent the last of them or given it up: the count is released by the bytes
//! themselves, wherever they wait, whatever became of the stream.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http_body_util::BodyExt;
use tonic::body::Body;

use crate::xds::snapshot::Name;

/// All that is counted, by namespace. Clones count together.
#[derive(Clone, Debug, Default)]
pub(super) struct Unsent(Arc<Mutex<HashMap<Name, usize>>>);

/// So many bytes, until dropped.
#[derive(Debug)]
struct Share {
    unsent: Unsent,
    namespace: Name,
    bytes: usize,
}

impl Unsent {
    /// For a stream of this namespace.
    pub(super) fn account(&self, namespace: &Name) -> Account {
        Account { unsent: self.clone(), namespace: Name::clone(namespace), due: Arc::default() }
    }

    /// None: it would be too much. What is more than a namespace may have is counted as that, and so told alone.
    fn take(&self, namespace: &Name, bytes: usize) -> Option<Share> {
        let bytes = bytes.min(MOST_OF_NAMESPACE);
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = counted.values().sum();
        let own = counted.get(namespace).copied().unwrap_or_default();
        if own + bytes > MOST_OF_NAMESPACE || all + bytes > MOST {
            return None;
        }
        counted.insert(Name::clone(namespace), own + bytes);
        Some(Share { unsent: self.clone(), namespace: Name::clone(namespace), bytes })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut counted = self.unsent.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = counted.get_mut(&self.namespace) {
            *own -= self.bytes;
            if *own == 0 {
                counted.remove(&self.namespace);
            }
        }
    }
}

/// One stream's. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Account {
    unsent: Unsent,
    namespace: Name,
    /// Of what is about to be encoded.
    due: Arc<Mutex<Vec<Share>>>,
}

impl Account {
    /// Counts a response before it is encoded; false: it must not be.
    pub(super) fn charge(&self, bytes: usize) -> bool {
        let share = self.unsent.take(&self.namespace, bytes);
        let fits = share.is_some();
        self.due.lock().unwrap_or_else(PoisonError::into_inner).extend(share);
        fits
    }

    /// These bytes are what was counted: so it is until they are dropped.
    fn carry(&self, data: Bytes) -> Bytes {
        let due = mem::take(&mut *self.due.lock().unwrap_or_else(PoisonError::into_inner));
        if due.is_empty() { data } else { Bytes::from_owner(Counted { data, _due: due }) }
    }
}

struct Counted {
    data: Bytes,
    _due: Vec<Share>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

/// Lets the bytes of a response carry what was counted for them, if an account is among its extensions.
pub(super) fn counted(mut response: http::Response<Body>) -> http::Response<Body> {
    let Some(account) = response.extensions_mut().remove::<Account>() else { return response };
    response.map(|body| Body::new(body.map_frame(move |frame| frame.map_data(|data| account.carry(data)))))
}

/// Of all namespaces: the agent's memory is half a gigabyte.
const MOST: usize = 128 << 20;
/// Of one: all that a namespace may have of ServiceEntries, with as much again of WorkloadEntries and pods.
const MOST_OF_NAMESPACE: usize = 32 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn each_namespace_and_all_together_have_a_bound() {
        let unsent = Unsent::default();
        let take = |namespace: &str, mib: usize| unsent.take(&namespace.into(), mib * MIB);
        let [first, second] = [take("shop", 20), take("shop", 12)];
        assert!(first.is_some() && second.is_some() && take("shop", 1).is_none());
        let huge = take("bank", 1000);
        assert!(huge.is_some() && take("bank", 1).is_none(), "what is larger is told alone");
        let others = ["a", "b"].map(|namespace| take(namespace, 32));
        assert!(others.iter().all(Option::is_some) && take("c", 1).is_none(), "all have so much already");
        drop(second);
        assert!(take("c", 12).is_some() && take("shop", 12).is_some());
        drop((first, huge, others));
        assert!(unsent.0.lock().unwrap().is_empty());
    }

    #[test]
    fn the_bytes_release_what_was_counted_for_them() {
        let unsent = Unsent::default();
        let account = unsent.account(&"shop".into());
        assert!(account.charge(MIB) && account.charge(MIB));
        let (both, more) =
            (account.carry(Bytes::from_static(b"both")), account.carry(Bytes::from_static(b"more")));
        let counted = || unsent.0.lock().unwrap().get("shop").copied();
        drop((account, more));
        assert_eq!(counted(), Some(2 * MIB), "the stream has ended, its last bytes wait");
        let part = both.slice(1..);
        drop(both);
        assert_eq!((&*part, counted()), (&b"oth"[..], Some(2 * MIB)));
        drop(part);
        assert_eq!(counted(), None);
    }
}
