//! One session between two ends: packet protection, replay, calls in slots.
//!
//! [`protect`], [`replay`] and [`slots`] are the part that allocates nothing and
//! needs no standard library: agents inside moved processes use it. [`Hub`] and
//! [`handshake`] are built on it for daemons; they want an allocator, and once a session
//! has been in use for a while its calls allocate nothing. All of it is sans-IO: bytes,
//! time and randomness come in, packets, events and deadlines go out.

#[cfg(feature = "hub")]
mod budget;
#[cfg(feature = "hub")]
mod bulk;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod flow;
#[cfg(feature = "hub")]
mod free;
#[cfg(feature = "hub")]
mod gate;
#[cfg(feature = "hub")]
mod grants;
#[cfg(feature = "hub")]
pub mod handshake;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "hub")]
mod image;
#[cfg(feature = "ring")]
mod key;
#[cfg(feature = "hub")]
mod limits;
#[cfg(feature = "hub")]
mod outbox;
#[cfg(feature = "hub")]
mod packet;
#[cfg(feature = "hub")]
mod path;
#[cfg(feature = "hub")]
mod payload;
#[cfg(feature = "hub")]
mod peer;
#[cfg(feature = "hub")]
mod pool;
#[cfg(feature = "ring")]
pub mod protect;
#[cfg(feature = "hub")]
mod queue;
pub mod replay;
#[cfg(feature = "hub")]
mod rtt;
#[cfg(feature = "hub")]
mod server;
pub mod slots;
#[cfg(feature = "hub")]
mod timers;
#[cfg(feature = "hub")]
pub mod ways;

#[cfg(feature = "hub")]
pub use bulk::BulkPort;
#[cfg(feature = "hub")]
pub use client::{CallError, CallId, NotTaken};
#[cfg(feature = "hub")]
pub use conet_wire::session::frame::Lane;
#[cfg(feature = "hub")]
pub use hub::{
    BATCH_BUFFER, CallRefused, Event, FreezeError, Frozen, Hub, HubConfig, MOST_AROUND, MOST_PARTS,
    Place, ReplyFailed, Scattered, Strays, Thawed, Transmit, UnknownPeer,
};
#[cfg(feature = "hub")]
pub use image::ImageError;
#[cfg(feature = "hub")]
pub use limits::{Limits, MOST_IN_ROW};
#[cfg(feature = "hub")]
pub use peer::{Counters, DownReason, PeerStatus};
#[cfg(feature = "hub")]
pub use server::{IncomingId, ReplyError};
