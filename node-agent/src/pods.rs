//! The agent's side of the pod protocol: which pods ztunnel serves, and their sockets.
