//! See `conet_fuzz_targets::session_image`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| conet_fuzz_targets::session_image(data));
