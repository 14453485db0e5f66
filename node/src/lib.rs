//! The node daemon: peers, guests, processes and their movement.

pub mod caller;
pub mod client;
pub mod colinux;
pub mod config;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod enter;
pub mod forward;
pub mod identity;
pub mod moving;
pub mod peers;
pub mod processes;
pub mod procfs;
mod store;
mod sys;
pub mod wgquick;
