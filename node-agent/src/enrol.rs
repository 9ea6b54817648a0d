//! Brings the node's pods into the mesh and out of it.
