//! Socket options that no library wraps.

#![allow(unsafe_code, reason = "setsockopt takes a pointer")]

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

/// Switches the joining of received datagrams (UDP_GRO, `udp(7)`, kernel 5.0).
///
/// # Errors
/// ENOPROTOOPT where the kernel has none.
pub(crate) fn set_udp_gro(socket: &impl AsRawFd, on: bool) -> io::Result<()> {
    let value = libc::c_int::from(on);
    let len = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or(4);
    // SAFETY: the pointer is to a live integer of the length given, which the kernel
    // only reads; the descriptor is open as long as `socket` is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_GRO,
            (&raw const value).cast(),
            len,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
