//! Whether the other half can be reached.
//!
//! A link outlives the network's absence: the kernel holds what is under way and
//! tries again once a second, the two halves wait, and nothing is run twice, since
//! bytes arrive once and in order. How long to wait is for the node to decide.

use crate::mover;
use crate::sys::{ptrace::get_descriptor, socket};
use rustix::process::Pid;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Duration;

/// Prepares a link that is to outlive a network's absence of `timeout`; the kernel
/// ends it some seconds later, also where no node is there to do so.
///
/// # Errors
/// When the kernel refuses an option (man 7 tcp).
pub fn keep_alive(link: &TcpStream, timeout: Duration) -> io::Result<()> {
    socket::keep_alive(link.as_fd(), timeout)
}

/// For how long the other half of the deputy in `pid` has not been heard of. Where
/// it is there this is below some 2 s, since it is asked once a second.
///
/// # Errors
/// When there is no such process, or no deputy in it.
pub fn silence(pid: Pid) -> io::Result<Duration> {
    let link = get_descriptor(pid, u64::from(mover::status(pid)?.link))?;
    socket::silence(link.as_fd())
}
