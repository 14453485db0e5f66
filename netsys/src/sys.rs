//! The one call of this crate that needs `unsafe`: leaving a network namespace
//! for a new one.

#![allow(unsafe_code, reason = "unshare(2) is unsafe in rustix since 1.1; see SAFETY")]

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread a new, empty network namespace (`unshare(2)`).
///
/// Needs CAP_SYS_ADMIN; kernel 2.6.24.
pub(crate) fn unshare_net() -> rustix::io::Result<()> {
    // SAFETY: the callee is unsafe for the sake of CLONE_FILES, which would give
    // this thread a descriptor table of its own behind the back of owners of
    // descriptors on other threads. CLONE_NEWNET leaves the table shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
}
