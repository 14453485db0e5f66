//! Guest ports: how a guest's kernel receives and sends packets.
//!
//! Today one kind: a guest that is a network namespace, reached by a veth pair.
//! Packets go from the guest's kernel code straight to the host's, in the same
//! kernel, with no process between; the host routes them, to the tunnel's device
//! or to another guest.
//!
//! ```text
//! guest namespace NAME                 host namespace
//!   lo
//!   eth0  10.77.1.2/32  ◄── veth ──►   NAME  10.77.1.1/32 (the gateway)
//!   default via 10.77.1.1              10.77.1.2/32 dev NAME
//!                                      rp_filter strict, ip_forward on
//! ```
//!
//! The guest's address is a single one (/32, /128): everything else, also a
//! neighbour guest, is behind the gateway, so the host sees and may refuse every
//! packet, and nothing depends on ARP between guests.
//!
//! A port outlives the process that made it: dropping a [`GuestPort`] leaves the
//! guest running, [`GuestPort::attach`] finds it again, [`GuestPort::detach`]
//! ends it.

#![forbid(unsafe_code)]

mod veth;

pub use veth::{AttachError, GuestPort, GuestSpec};
