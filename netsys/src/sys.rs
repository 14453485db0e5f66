//! The calls of this crate that need `unsafe`: leaving namespaces for new ones.

#![allow(unsafe_code, reason = "unshare(2) is unsafe in rustix since 1.1")]

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread a new, empty network namespace (`unshare(2)`).
///
/// Needs CAP_SYS_ADMIN; kernel 2.6.24.
pub(crate) fn unshare_net() -> rustix::io::Result<()> {
    unshare(UnshareFlags::NEWNET)
}

/// Gives the calling process, which must have one thread, a new user namespace
/// in which it has all capabilities and, until it is mapped, no id (`unshare(2)`,
/// kernel 3.8).
pub(crate) fn unshare_user() -> rustix::io::Result<()> {
    unshare(UnshareFlags::NEWUSER)
}

/// Moves the calling process into a new mount namespace, and its children into a new
/// process namespace (kernel 3.8).
pub(crate) fn unshare_processes() -> rustix::io::Result<()> {
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWPID)
}

/// Makes a new time namespace for the calling process's children (kernel 5.6).
pub(crate) fn unshare_time() -> rustix::io::Result<()> {
    unshare(UnshareFlags::NEWTIME)
}

fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: the callee is unsafe for the sake of CLONE_FILES, which would give
    // this thread a descriptor table of its own behind the back of owners of
    // descriptors on other threads. No caller here passes it.
    unsafe { unshare_unsafe(flags) }
}
