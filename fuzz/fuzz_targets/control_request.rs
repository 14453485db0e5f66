//! See `conet_fuzz_targets::control_request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| conet_fuzz_targets::control_request(data));
