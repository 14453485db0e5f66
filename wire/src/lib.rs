//! Every layout that leaves a conet process: packets, records, images and requests.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "control")]
pub mod control;
pub mod ip;
#[cfg(feature = "control")]
pub mod peer;
pub mod session;
