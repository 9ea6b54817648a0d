//! libFuzzer's entry; the target is `mesh_fuzz::xds`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::xds::run(data));
