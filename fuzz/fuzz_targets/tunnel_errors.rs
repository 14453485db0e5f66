//! See `conet_fuzz_targets::tunnel_errors`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| conet_fuzz_targets::tunnel_errors(data));
