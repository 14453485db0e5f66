//! What deputy-link decides without touching a process.
//!
//! Pure functions and tables, shared by the agent (which is `no_std` and lives
//! in foreign processes) and the host side, and tested here as ordinary code:
//!
//! - [`table`]: which system call goes where, and which buffers it has;
//! - [`marshal`]: a call's arguments into a request, a reply into memory;
//! - [`filter`]: the seccomp program of a remote process;
//! - [`boot`]: what lies where in the region, and what mover and deputy say there;
//! - [`areas`]: reading `/proc/PID/maps` and comparing address spaces;
//! - [`scan`]: which pages have changed.

#![no_std]
#![forbid(unsafe_code)]

pub mod areas;
pub mod boot;
pub mod filter;
pub mod marshal;
pub mod scan;
pub mod table;
pub mod waiting;
