//! The certificate authority role.
