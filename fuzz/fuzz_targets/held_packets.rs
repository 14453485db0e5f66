//! See `conet_fuzz_targets::held_packets`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| conet_fuzz_targets::held_packets(data));
