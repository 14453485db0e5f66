//! Sessions and calls between nodes: a sans-IO core and its carriers.
//!
//! # What it is for
//!
//! Nodes ask each other for things: run this, take this process, is the peer still
//! there. A request must not run twice, must end in bounded time, and must say
//! afterwards whether it may have run. Beside that, the two halves of a moved
//! process talk all the time, inside programs that have no standard library and
//! no allocator; they need the same packets and the same at-most-once rule.
//!
//! It is not a general QUIC, has no streams, and does not know what is said over
//! it.
//!
//! # Why this interface
//!
//! *Calls, not messages.* A caller wants an answer or the reason why there is
//! none; a message layer would leave retries, duplicates and "did it run?" to each
//! of its users. Every call ends exactly once, with a reply or with a
//! [`CallError`](session::CallError) that tells "never ran" from "may have run".
//! Nothing is silently run again: after a peer restarted, calls that were on their
//! way end as unknown.
//!
//! *Slots, not a window of call ids.* A call lives in a slot, and using the slot
//! again acknowledges its last reply. So the server keeps one reply per slot and
//! nothing else, memory is bounded by construction, and the whole rule is the few
//! lines of [`session::slots`], which a program without an allocator can use too.
//!
//! *Four layers that can be taken apart.*
//!
//! | layer | needs | used by |
//! |---|---|---|
//! | [`session::slots`], [`session::replay`] | nothing | agents, daemons |
//! | `session::protect` (feature `ring`) | an AEAD | agents, daemons |
//! | `session::Hub` (feature `hub`) | an allocator, time and bytes from outside | the drivers, tests, fuzzing |
//! | `carrier`, `direct`, `endpoint`, `stream` (feature `std`) | sockets; for `endpoint` a thread | daemons |
//!
//! *Sans-IO.* The hub gets datagrams, the time and randomness, and gives
//! datagrams, events and deadlines. That is why thousands of bad links can be
//! simulated in a minute, why the same seed gives the same trace, and why a fuzzer
//! can be a peer.
//!
//! *Blocking calls at the top.* The daemon's threads call
//! [`Endpoint::call`](endpoint::Endpoint::call) and wait. An async interface would
//! bring a runtime into every user; tokio alone added 15 to 30 µs per call.
//!
//! # Using it
//!
//! ```
//! # #[cfg(feature = "std")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use conet_transport::endpoint::{Endpoint, EndpointConfig, EndpointEvent};
//! use conet_transport::session::handshake::PrivateKey;
//! use std::time::Duration;
//!
//! let (server_key, client_key) = (PrivateKey::new([1; 32]), PrivateKey::new([2; 32]));
//! let server_name = server_key.public();
//!
//! let peers = vec![(client_key.public(), None)];
//! let config = EndpointConfig { peers, ..EndpointConfig::new(server_key) };
//! let server = Endpoint::start("127.0.0.1:0".parse()?, config)?;
//! let address = server.endpoint.local_addr();
//! std::thread::spawn(move || {
//!     for event in server.events {
//!         if let EndpointEvent::Call { ticket, mut payload, .. } = event {
//!             payload.reverse();
//!             server.endpoint.reply(ticket, payload).ok();
//!         }
//!     }
//! });
//!
//! let peers = vec![(server_name, Some(address))];
//! let config = EndpointConfig { peers, ..EndpointConfig::new(client_key) };
//! let client = Endpoint::start("127.0.0.1:0".parse()?, config)?;
//! let reply = client.endpoint.call(server_name, b"olleh".to_vec(), Duration::from_secs(5))?;
//! assert_eq!(reply, b"hello");
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "std"))]
//! # fn main() {}
//! ```
//!
//! `examples/call.rs` measures as well. Keys here are examples: take 32 bytes from
//! [`session::handshake::SystemEntropy`].
//!
//! # Trust
//!
//! Peers are known by their X25519 keys; an unknown key leaves no state. A known
//! peer may still be hostile: whatever it sends, nothing panics and memory stays
//! within [`session::Limits`]. The network may lose, repeat, reorder, change and
//! record everything.
#![cfg_attr(not(feature = "std"), no_std)]
#![cfg_attr(
    not(feature = "std"),
    allow(rustdoc::broken_intra_doc_links, reason = "the essay names what std adds")
)]
#![deny(unsafe_code)]

#[cfg(feature = "hub")]
extern crate alloc;
#[cfg(all(test, not(feature = "std")))]
extern crate std;

#[cfg(feature = "std")]
pub mod carrier;
#[cfg(feature = "std")]
mod clock;
#[cfg(feature = "std")]
pub mod direct;
#[cfg(feature = "std")]
pub mod endpoint;
#[cfg(feature = "std")]
#[doc(hidden)]
pub mod fuzz_support;
pub mod session;
#[cfg(feature = "std")]
pub mod stream;
#[cfg(feature = "std")]
mod system;
pub mod time;
