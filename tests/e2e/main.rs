//! The end-to-end suite: scenarios in a running lab with the real daemons. One lab serves most of them, so they take
//! turns; those that need the mesh to be absent at first, or break more than one pod, have a lab of their own.

mod authorization;
mod ca;
mod captured;
mod certificates;
mod cluster;
mod demo;
mod dns;
mod entries;
mod envoy;
mod fail_closed;
mod families;
mod fixture;
mod interrupts;
mod kinds;
mod membership;
mod outages;
mod probes;
mod program;
mod programs;
mod refusals;
mod reuse;
mod rights;
mod services;
mod shared;
mod starts;
mod strict;
mod traffic;
mod upgrades;
mod xds;
