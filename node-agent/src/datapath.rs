//! The eBPF datapath as the rest of the agent sees it.
