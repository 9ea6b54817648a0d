//! The pods that this process serves now, found by their workloads: a connection between two of them needs no tunnel.
//!
//! **Invariant:** who is found here takes new connections; a pod that is removed, or drains, is not found any more.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use mesh_core::drain::Watch;
use mesh_core::workload::WorkloadUid;

use crate::proxy::Pod;

/// All of them; clones are the same. Found without a lock, changed by one writer.
#[derive(Clone, Default)]
pub struct Neighbours {
    pods: Arc<ArcSwap<HashMap<WorkloadUid, Entry>>>,
}

/// The registry keeps no pod alive, nor its sockets.
#[derive(Clone)]
struct Entry {
    pod: Weak<Pod>,
    drain: Watch,
}

/// One of them.
pub struct Neighbour {
    /// The pod.
    pub pod: Arc<Pod>,
    /// When its connections have to end.
    pub drain: Watch,
}

impl Neighbours {
    /// The pod that is this workload.
    pub fn find(&self, uid: &WorkloadUid) -> Option<Neighbour> {
        let pods = self.pods.load();
        let entry = pods.get(uid)?;
        Some(Neighbour { pod: entry.pod.upgrade()?, drain: entry.drain.clone() })
    }

    /// The pod takes connections, until `drain` says otherwise.
    pub fn put(&self, pod: &Arc<Pod>, drain: Watch) {
        let entry = Entry { pod: Arc::downgrade(pod), drain };
        self.change(|pods| drop(pods.insert(pod.described().uid.clone(), entry)));
    }

    /// The pod takes no more; another of the same workload may.
    pub fn remove(&self, pod: &Arc<Pod>) {
        let weak = Arc::downgrade(pod);
        self.change(|pods| pods.retain(|_, entry| !Weak::ptr_eq(&entry.pod, &weak)));
    }

    /// None takes any more.
    pub fn clear(&self) {
        self.pods.store(Arc::default());
    }

    fn change(&self, change: impl FnOnce(&mut HashMap<WorkloadUid, Entry>)) {
        let mut pods = HashMap::clone(&self.pods.load());
        change(&mut pods);
        self.pods.store(Arc::new(pods));
    }
}
