#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "kernel contexts are raw pointers that the verifier checks")]
//! The kernel's side of the mesh, one file a hook. What the hooks look up is in `maps`, what they decide in
//! `mesh-ebpf-abi`, where it is tested.
//!
//! **Invariant:** a miss never lets out or in what an enrolled pod should not send or get; each file says how.

mod connect;
mod guard;
mod maps;
mod older;
mod probe;
mod refuse;
mod sk_lookup;
mod skb;

/// Logs in debug builds; nothing is left of the call, nor of its arguments, in others.
macro_rules! debug {
    ($($arg:tt)*) => {
        #[cfg(feature = "log")]
        aya_log_ebpf::debug!($($arg)*);
    };
}
use debug;

/// Never runs: the verifier refuses a program that could get here.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers for tracing and socket storage are for GPL-compatible programs; the kernel reads this section.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
