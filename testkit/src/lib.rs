//! Seeded link simulator, privileged-test helper, virtual machines; used by tests only.

pub mod bpf;
pub mod link;
pub mod machine;
pub mod privileged;
pub mod random;

pub use privileged::Need;
