//! Kernel interfaces that have no safe wrapper: ptrace, and what goes with it.

#![allow(unsafe_code, reason = "ptrace and descriptor passing are raw system calls")]

pub(crate) mod probe;
pub(crate) mod processor;
pub(crate) mod ptrace;
pub(crate) mod spawn;

use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl,
    set_tcp_user_timeout,
};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Has the kernel notice within some 90 s that the other end of a link has lost its
/// power or its network (man 7 tcp).
pub(crate) fn keep_alive(link: BorrowedFd<'_>) -> io::Result<()> {
    set_socket_keepalive(link, true)?;
    set_tcp_keepidle(link, Duration::from_secs(30))?;
    set_tcp_keepintvl(link, Duration::from_secs(10))?;
    set_tcp_keepcnt(link, 6)?;
    set_tcp_user_timeout(link, 90_000)?;
    Ok(())
}
