//! What no library has alone: one ioctl, one socket option, and a descriptor out of its
//! owner.

#![allow(unsafe_code, reason = "an ioctl, an option, a raw descriptor")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::ioctl::{Opcode, ioctl, opcode};

/// `TUNSETOFFLOAD` of `linux/if_tun.h`: its argument is the flags, not a pointer.
const TUNSETOFFLOAD: Opcode = opcode::write::<u32>(b'T', 208);

/// What the owner of a TUN device takes in large pieces and without checksums: `TUN_F_…`.
///
/// # Errors
/// EINVAL where the kernel does not know a flag.
pub(super) fn set_offload(device: impl AsFd, flags: u32) -> io::Result<()> {
    // SAFETY: the kernel takes the argument as a number and touches no memory.
    let set = unsafe { rustix::ioctl::IntegerSetter::<TUNSETOFFLOAD>::new_usize(flags as usize) };
    // SAFETY: the request and its argument belong together, as in the manual.
    unsafe { ioctl(device, set) }?;
    Ok(())
}

/// The descriptor of a device, of which nothing else is wanted.
pub(super) fn into_fd(device: impl IntoRawFd) -> OwnedFd {
    // SAFETY: the device gives up its descriptor, which is open and nobody else's.
    unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) }
}

/// Packets that a packet socket has dropped since it was asked last (`PACKET_STATISTICS` of
/// `packet(7)`).
///
/// # Errors
/// As `getsockopt(2)`.
pub(crate) fn packet_drops(socket: impl AsFd) -> io::Result<u32> {
    let mut counts = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut len: libc::socklen_t = 8;
    const _: () = assert!(size_of::<libc::tpacket_stats>() == 8);
    let fd = socket.as_fd().as_raw_fd();
    let at = std::ptr::from_mut(&mut counts).cast();
    // SAFETY: the descriptor is borrowed and open; the kernel writes at most `len` bytes to
    // `at`, which is a structure of that size that lives until after the call.
    let done = unsafe {
        libc::getsockopt(fd, libc::SOL_PACKET, libc::PACKET_STATISTICS, at, &raw mut len)
    };
    if done == 0 { Ok(counts.tp_drops) } else { Err(io::Error::last_os_error()) }
}
