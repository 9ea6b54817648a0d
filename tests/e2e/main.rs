//! The end-to-end suite: scenarios in a running lab with the real daemons. One lab serves all scenarios of a module,
//! so they take turns.

mod cluster;
mod shared;
