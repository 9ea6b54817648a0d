//! The CNI side: the chained plugin's server, and its installation on the node.
