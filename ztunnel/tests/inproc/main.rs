//! A whole ztunnel in this process, with an agent and a certificate authority of the test's own; no privileges.
//!
//! Every pod is an address of 127.0.0.0/8, and its "outbound listener" listens at the address that its application
//! dials: what capture does in a cluster, plain binding does here.

mod abuse;
mod account;
mod agent;
mod bad_input;
mod bad_resources;
mod certificates;
mod descriptors;
mod dns;
mod endpoints;
mod footprint;
mod lifecycle;
mod limits;
mod logs;
mod near;
mod policy;
mod revocation;
mod traffic;
mod world;
