//! The eBPF object of a bound is what its source says.

use std::path::Path;

#[test]
fn the_committed_object_is_what_clang_makes_of_its_source() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("bpf");
    conet_testkit::bpf::assert_object_is_made_of_its_source(&directory, "minimal");
}
