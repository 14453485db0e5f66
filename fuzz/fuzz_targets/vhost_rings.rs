//! See `conet_fuzz_targets::vhost_rings`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| conet_fuzz_targets::vhost_rings(data));
