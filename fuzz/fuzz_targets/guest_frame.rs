//! See `conet_fuzz_targets::guest_frame`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| conet_fuzz_targets::guest_frame(data));
