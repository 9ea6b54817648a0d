#![no_std]
//! Layouts that kernel programs and user space share.
