//! The datapath in the kernel it is for: two pods, a router, the real `Datapath`, and one test for each trap.

mod fail_closed;
mod family;
mod guard;
mod inbound;
mod lifecycle;
mod local;
mod outbound;
mod packets;
mod proxy;
mod world;
