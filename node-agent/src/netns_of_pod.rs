//! Finds the network namespace of a running pod through its cgroup.
