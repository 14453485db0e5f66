//! Seeded link simulator and privileged-test helper; used by tests only.

pub mod link;
pub mod privileged;
pub mod random;

pub use privileged::Need;
