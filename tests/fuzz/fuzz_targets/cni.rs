//! libFuzzer's entry; the target is `mesh_fuzz::cni`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::cni::run(data));
