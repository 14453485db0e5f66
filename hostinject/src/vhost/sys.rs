//! What no library has alone: one ioctl, and a descriptor out of its owner.

#![allow(unsafe_code, reason = "an ioctl, and taking over a raw descriptor")]

use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};

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
