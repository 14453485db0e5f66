//! Socket options that no library wraps.

#![allow(unsafe_code, reason = "setsockopt takes a pointer")]

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

/// Lets a raw ICMP socket hear of unreachable destinations and exceeded times only
/// (ICMP_FILTER, `raw(7)`).
///
/// # Errors
/// EOPNOTSUPP where it is no such socket.
pub(crate) fn hear_icmp_errors(socket: &impl AsRawFd) -> io::Result<()> {
    /// From `linux/icmp.h`: a bit for each type that is not let through.
    const ICMP_FILTER: libc::c_int = 1;
    let blocked: u32 = !(1 << 3 | 1 << 11);
    set_option(socket, libc::SOL_RAW, ICMP_FILTER, &blocked)
}

fn set_option<T: Copy>(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0);
    // SAFETY: the pointer is to a live value of the length given, which the kernel only
    // reads; the descriptor is open as long as `socket` is borrowed.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), len)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Switches the joining of received datagrams (UDP_GRO, `udp(7)`, kernel 5.0).
///
/// # Errors
/// ENOPROTOOPT where the kernel has none.
pub(crate) fn set_udp_gro(socket: &impl AsRawFd, on: bool) -> io::Result<()> {
    set_option(socket, libc::SOL_UDP, libc::UDP_GRO, &libc::c_int::from(on))
}
