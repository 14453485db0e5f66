//! Every layout that leaves a conet process: packets, records, images and requests.
//!
//! Layouts only: parse, emit, and the rules that both ends must compute alike.
//! No sockets, no state, no keys. Bytes come from peers, so parsing never
//! panics and never allocates by a peer's word.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "control")]
pub mod control;
pub mod family;
#[cfg(feature = "control")]
pub mod held;
pub mod image;
pub mod ip;
pub mod link;
#[cfg(feature = "control")]
pub mod moving;
pub mod pages;
#[cfg(feature = "control")]
pub mod peer;
pub mod session;
