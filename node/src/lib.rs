//! The node daemon: peers, guests, processes and their movement.

pub mod config;
pub mod identity;
