//! libFuzzer's entry; the target is `mesh_fuzz::discovery`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::discovery::run(data));
