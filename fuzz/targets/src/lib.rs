//! The bodies of the fuzz targets.
//!
//! A target is a function of bytes that must return, whatever the bytes. The
//! libFuzzer binaries in `fuzz/` wrap them, and the test `corpus` of this crate
//! replays every file of `fuzz/corpus/`, so that a corpus guards ordinary builds
//! too. They live apart from `fuzz/` because that needs a fuzzing runtime and a
//! nightly compiler, and apart from `testkit` because they depend on everything
//! and `testkit` on nothing.
//!
//! To add one: a function here, a row in [`TARGETS`], a binary in `fuzz/`, files in
//! `fuzz/corpus/NAME/` written by `examples/seed_corpus.rs`.

mod session;
mod socket;

pub use session::session_packet;
pub use socket::saved_socket;

/// A function that must return, whatever the bytes.
pub type Target = fn(&[u8]);

/// Every target, by the name of its corpus.
pub const TARGETS: &[(&str, Target)] =
    &[("saved_socket", saved_socket), ("session_packet", session_packet)];
