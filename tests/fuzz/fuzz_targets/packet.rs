//! libFuzzer's entry; the target is `mesh_fuzz::packet`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::packet::run(data));
