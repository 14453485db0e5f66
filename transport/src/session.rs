//! One session between two ends: packet protection, replay, calls in slots.
//!
//! [`protect`], [`replay`] and [`slots`] are the part that allocates nothing and
//! needs no standard library: agents inside moved processes use it. [`Hub`] and
//! [`handshake`] are built on it for daemons. All of it is sans-IO: bytes, time
//! and randomness come in, packets, events and deadlines go out.

#[cfg(feature = "std")]
mod client;
#[cfg(feature = "std")]
mod flow;
#[cfg(feature = "std")]
pub mod handshake;
#[cfg(feature = "std")]
mod hub;
#[cfg(feature = "ring")]
mod key;
#[cfg(feature = "std")]
mod limits;
#[cfg(feature = "std")]
mod packet;
#[cfg(feature = "std")]
mod payload;
#[cfg(feature = "std")]
mod peer;
#[cfg(feature = "ring")]
pub mod protect;
pub mod replay;
#[cfg(feature = "std")]
mod rtt;
#[cfg(feature = "std")]
mod server;
pub mod slots;

#[cfg(feature = "std")]
pub use client::{CallError, CallId, NotTaken};
#[cfg(feature = "std")]
pub use hub::{CallRefused, Event, Hub, HubConfig, ReplyFailed, Strays, UnknownPeer};
#[cfg(feature = "std")]
pub use limits::Limits;
#[cfg(feature = "std")]
pub use peer::{Counters, DownReason, PeerStatus};
#[cfg(feature = "std")]
pub use server::{IncomingId, ReplyError};
