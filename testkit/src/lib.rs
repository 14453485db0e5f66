//! Seeded link simulator, privileged-test helper, virtual machines; used by tests only.

pub mod bpf;
pub mod link;
#[cfg(unix)]
pub mod machine;
#[cfg(unix)]
pub mod privileged;
pub mod random;

#[cfg(unix)]
pub use privileged::Need;
