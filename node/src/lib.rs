//! The node daemon: peers, guests, processes and their movement.

pub mod caller;
pub mod client;
pub mod config;
pub mod control;
pub mod identity;
pub mod processes;
pub mod procfs;
mod sys;
