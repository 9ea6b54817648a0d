//! The datapath in the kernel it is for: two pods, a router, the real `Datapath`, and one test for each trap.

mod captured;
mod carried;
mod clsact;
mod cost;
mod cycles;
mod dns;
mod fail_closed;
mod families;
mod family;
mod faults;
mod foreign;
mod guard;
mod handover;
mod inbound;
mod kinds;
mod lifecycle;
mod local;
mod older;
mod outbound;
mod packets;
mod probes;
mod proxy;
mod refuse;
mod revoked;
mod upheaval;
mod world;
