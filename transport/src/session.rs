//! One session between two ends: packet protection, replay, calls in slots.

#[cfg(feature = "ring")]
mod key;
#[cfg(feature = "ring")]
pub mod protect;
pub mod replay;
pub mod slots;
