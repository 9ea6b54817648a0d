//! libFuzzer's entry; the target is `mesh_fuzz::csr`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::csr::run(data));
