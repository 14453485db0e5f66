//! See `conet_fuzz_targets::hostile_ring`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| conet_fuzz_targets::hostile_ring(data));
