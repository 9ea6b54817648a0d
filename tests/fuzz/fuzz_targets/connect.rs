//! libFuzzer's entry; the target is `mesh_fuzz::connect`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::connect::run(data));
