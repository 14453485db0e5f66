//! Kernel interfaces that have no safe wrapper: ptrace, and what goes with it.

#![allow(unsafe_code, reason = "ptrace and descriptor passing are raw system calls")]

pub(crate) mod packet;
pub(crate) mod probe;
pub(crate) mod processor;
pub(crate) mod ptrace;
pub(crate) mod socket;
pub(crate) mod spawn;
mod thunk;
pub(crate) mod userfault;
