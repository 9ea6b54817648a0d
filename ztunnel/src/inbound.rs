//! Connections to pods over HBONE: terminate, authorize, connect, copy.

pub mod authority;
