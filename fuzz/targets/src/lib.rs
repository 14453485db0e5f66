//! The bodies of the fuzz targets.
//!
//! A target is a function of bytes that must return, whatever the bytes. The
//! libFuzzer binaries in `fuzz/` wrap them, and the test `corpus` of this crate
//! replays every file of `fuzz/corpus/`, so that a corpus guards ordinary builds
//! too. They live apart from `fuzz/` because that needs a fuzzing runtime and a
//! nightly compiler, and apart from `testkit` because they depend on everything
//! and `testkit` on nothing.
//!
//! To add one: a function here or in its own crate, a row in [`TARGETS`], a binary in
//! `fuzz/`, files in `fuzz/corpus/NAME/` written by real encoders.

pub mod image;
mod session;
mod session_image;
mod socket;

pub use conet_hostinject::fuzz_support::{vhost_messages, vhost_rings};
pub use conet_transport::fuzz_support::hostile_ring;
pub use conet_wire::control::fuzz_request as control_request;
pub use image::process_image;
pub use session::session_packet;
pub use session_image::{session_image, session_images};
pub use socket::saved_socket;

/// A datagram at a tunnel; see [`conet_tunnel::fuzz_support`].
pub fn tunnel_packet(data: &[u8]) {
    // How many packets reached the device is for the tunnel's own tests.
    conet_tunnel::fuzz_support::tunnel_packet(data);
}

/// What does not fit, and what ICMP says of it; see [`conet_tunnel::fuzz_support`].
pub fn tunnel_errors(data: &[u8]) {
    // How many senders were told is for the tunnel's own tests.
    conet_tunnel::fuzz_support::tunnel_errors(data);
}

/// A frame of a guest's; see [`conet_hostinject::fuzz_support`].
pub fn guest_frame(data: &[u8]) {
    // What was answered is for the port's own tests.
    conet_hostinject::fuzz_support::guest_frame(data);
}

/// What another host has kept for a guest; see [`conet_wire::held`].
///
/// # Panics
///
/// If packets that are read are written otherwise, or go nowhere: a finding.
pub fn held_packets(data: &[u8]) {
    if let Ok(packets) = conet_wire::held::parse(data) {
        assert_eq!(conet_wire::held::emit(&packets), data, "packets have one form");
        assert!(packets.iter().all(|packet| conet_wire::held::destination(packet).is_some()));
    }
}

/// A function that must return, whatever the bytes.
pub type Target = fn(&[u8]);

/// Every target, by the name of its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("control_request", control_request),
    ("guest_frame", guest_frame),
    ("held_packets", held_packets),
    ("hostile_ring", hostile_ring),
    ("process_image", process_image),
    ("saved_socket", saved_socket),
    ("session_image", session_image),
    ("session_packet", session_packet),
    ("tunnel_errors", tunnel_errors),
    ("tunnel_packet", tunnel_packet),
    ("vhost_messages", vhost_messages),
    ("vhost_rings", vhost_rings),
];
