//! Seeded link simulator and privileged-test helper; used by tests only.

pub mod privileged;

pub use privileged::Need;
