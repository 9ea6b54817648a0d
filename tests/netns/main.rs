//! The datapath in the kernel it is for: two pods, a router, the real `Datapath`, and one test for each trap.

mod outbound;
mod proxy;
mod world;
