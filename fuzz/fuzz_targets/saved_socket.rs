//! See `conet_fuzz_targets::saved_socket`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| conet_fuzz_targets::saved_socket(data));
