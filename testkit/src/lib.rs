//! Seeded link simulator and privileged-test helper; used by tests only.

pub mod link;
pub mod random;
