//! Whether this machine's kernel has what the network side of conet needs, found
//! out by trying.
//!
//! What it is not: a judgement; whoever asks knows what for. Each function leaves
//! the calling thread, or process, changed as it says: ask in a process of its own.

use std::io;

use rustix::mount::{MountFlags, mount};

use crate::sys;

/// Moves the calling thread into a new network namespace, for good.
///
/// # Errors
///
/// EPERM without CAP_SYS_ADMIN, ENOSPC beyond `user.max_net_namespaces`, EINVAL
/// without network namespaces in the kernel.
pub fn network_namespace() -> io::Result<()> {
    Ok(sys::unshare_net()?)
}

/// Makes a time namespace, which the calling process's next children are born in
/// (kernel 5.6).
///
/// # Errors
///
/// EPERM without CAP_SYS_ADMIN, EINVAL without time namespaces in the kernel.
pub fn time_namespace() -> io::Result<()> {
    Ok(sys::unshare_time()?)
}

/// Moves the calling process into a new mount namespace; its next children are born in
/// a new process namespace, the first of them as its process 1.
///
/// # Errors
///
/// EPERM without CAP_SYS_ADMIN, ENOSPC beyond `user.max_pid_namespaces`.
pub fn process_namespace() -> io::Result<()> {
    Ok(sys::unshare_processes()?)
}

/// Mounts the processes of the calling process's namespace on `/proc`, which must be
/// that of a mount namespace of its own.
///
/// # Errors
///
/// EPERM where parts of the former `/proc` are hidden, as in many containers
/// (`mount_too_revealing` in the kernel's `fs/namespace.c`).
pub fn own_proc() -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount("proc", "/proc", "proc", flags, None)?)
}
