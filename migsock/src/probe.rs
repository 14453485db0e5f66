//! Whether this machine's kernel moves TCP connections, found out by trying.

use std::io;
use std::os::fd::AsFd;

use crate::Linux;
use crate::kernel::{Kernel, Opt, REPAIR_OFF, REPAIR_ON, opt};

/// `TCP_RTO_MAX_MS`, `linux/tcp.h` (kernel 6.15).
const RTO_MAX_MS: Opt = Opt { level: libc::IPPROTO_TCP, name: 44 };

/// Switches a socket to repair mode and back (`TCP_REPAIR`, kernel 3.5).
///
/// # Errors
///
/// EPERM without CAP_NET_ADMIN in the user namespace that owns the network
/// namespace, ENOPROTOOPT without CONFIG_CHECKPOINT_RESTORE.
pub fn repair() -> io::Result<()> {
    let socket = Linux.socket(false)?;
    Linux.setsockopt(socket.as_fd(), opt::REPAIR, &REPAIR_ON.to_ne_bytes())?;
    Linux.setsockopt(socket.as_fd(), opt::REPAIR, &REPAIR_OFF.to_ne_bytes())
}

/// Limits a socket's retransmission timeout to one second (`TCP_RTO_MAX_MS`,
/// kernel 6.15).
///
/// # Errors
///
/// ENOPROTOOPT on older kernels.
pub fn rto_max() -> io::Result<()> {
    let socket = Linux.socket(false)?;
    Linux.setsockopt(socket.as_fd(), RTO_MAX_MS, &1000_i32.to_ne_bytes())
}
