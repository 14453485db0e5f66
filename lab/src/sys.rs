//! The one call of this crate that needs `unsafe`: leaving namespaces for new ones.

#![allow(unsafe_code, reason = "unshare(2) is unsafe in rustix since 1.1; see SAFETY")]

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread new mount, UTS and IPC namespaces (`unshare(2)`).
pub(crate) fn unshare_host() -> rustix::io::Result<()> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWUTS | UnshareFlags::NEWIPC;
    // SAFETY: the callee is unsafe for the sake of CLONE_FILES, which would split
    // the descriptor table between threads. These flags leave it shared.
    unsafe { unshare_unsafe(flags) }
}

/// Gives the calling process new mount, network, UTS and IPC namespaces, and its
/// children a new process namespace.
pub(crate) fn unshare_machine() -> rustix::io::Result<()> {
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWIPC;
    // SAFETY: as above.
    unsafe { unshare_unsafe(flags) }
}

/// Makes a new time namespace for the calling process's children, and for itself
/// once it joins (`time_namespaces(7)`, kernel 5.6).
pub(crate) fn unshare_time() -> rustix::io::Result<()> {
    // SAFETY: as above; CLONE_NEWTIME does not touch the descriptor table.
    unsafe { unshare_unsafe(UnshareFlags::NEWTIME) }
}
