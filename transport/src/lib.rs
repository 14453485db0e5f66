//! Sessions and calls between nodes: a sans-IO core and its carriers.
#![cfg_attr(not(feature = "std"), no_std)]
#![forbid(unsafe_code)]

pub mod session;
pub mod time;
