//! Sessions and calls between nodes: a sans-IO core and its carriers.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]

#[cfg(feature = "std")]
pub mod endpoint;
pub mod session;
#[cfg(feature = "std")]
pub mod stream;
pub mod time;
