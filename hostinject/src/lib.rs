//! Guest ports: how a guest's kernel receives and sends packets.
//!
//! A guest is a network namespace; its port is of one of two kinds.
//!
//! By *veth* packets go from the guest's kernel code straight to the host's, in the
//! same kernel, with no process between; the host routes them, to the tunnel's device
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
//! By *TAP* a thread of this process carries them, and answers for everybody whom
//! the guest looks for on its link: the plain path, which needs nothing
//! but `/dev/net/tun`.
//!
//! ```text
//! guest namespace NAME                 host namespace
//!   eth0 (TAP) ◄── frames ── thread ── packets ──► NAME (TUN)   the rest as above
//! ```
//!
//! The guest's address is a single one (/32, /128): everything else, also a
//! neighbour guest, is behind the gateway, so the host sees and may refuse every
//! packet, and nothing depends on ARP between guests.
//!
//! What the host's packet filter does for all of its guests, the shared address and
//! forwarded ports above all, is a [`RuleTable`].
//!
//! A guest outlives the process that made it: dropping a [`GuestPort`] leaves the
//! namespace and what runs in it, [`GuestPort::attach`] finds it again,
//! [`GuestPort::detach`] ends it. A veth goes on carrying packets meanwhile; a TAP
//! device is gone until the next port makes it anew.

pub mod capture;
pub mod fuzz_support;
mod gate;
mod guest;
mod leave;
mod rules;
mod segment;
mod services;
mod tap;
mod veth;
pub mod vhost;

pub use gate::{HOLD_BYTES, HOLD_PACKETS, InvalidRate, Rate, Rates};
pub use guest::{AttachError, GateError, GuestPort, GuestSpec, PortKind, machine_mac};
pub use rules::{
    GuestLink, HostPorts, HostRules, MAX_CHANGED_PORTS, PortForward, Ports, RuleTable, TABLE,
};
pub use services::Lease;
