//! What no library has alone: one ioctl, one socket option, a descriptor out of its owner,
//! and packets that go straight between a device and a guest's memory.

#![allow(unsafe_code, reason = "an ioctl, an option, a raw descriptor, vectors of guest memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, ioctl, opcode};
use vm_memory::VolatileSlice;

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

/// `TUNSETQUEUE` of `linux/if_tun.h`, and what it is asked for.
const TUNSETQUEUE: Opcode = opcode::write::<libc::c_int>(b'T', 217);
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;

/// Whether the kernel gives a device's queue packets; what it holds is lost when not.
///
/// # Errors
/// EINVAL where it is so already, or the device has no several queues.
pub(super) fn set_attached(queue: impl AsFd, is_attached: bool) -> io::Result<()> {
    let flags = if is_attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
    let request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    // SAFETY: the kernel reads a structure of this type behind the argument.
    let set = unsafe { rustix::ioctl::Setter::<TUNSETQUEUE, libc::ifreq>::new(request) };
    // SAFETY: the request and its argument belong together, as in the manual.
    unsafe { ioctl(queue, set) }?;
    Ok(())
}

/// The descriptor of a device, of which nothing else is wanted.
pub(super) fn into_fd(device: impl IntoRawFd) -> OwnedFd {
    // SAFETY: the device gives up its descriptor, which is open and nobody else's.
    unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) }
}

/// Most slices of a call beside ours; the kernel's limit is 1,024 (`UIO_MAXIOV`).
pub(super) const MOST_SLICES: usize = 512;

/// Reads once, into `head` and then into the guest's memory.
///
/// # Errors
/// As `readv(2)`. Where the guest's memory is no longer behind its addresses, a TUN device
/// leaves out the packet's bytes from there on, and says nothing; others say EFAULT.
pub(super) fn read_into(
    device: impl AsFd,
    head: &mut [u8],
    guest: &[VolatileSlice<'_>],
) -> rustix::io::Result<usize> {
    let ours = libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() };
    let vectors = vectors(ours, guest);
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the descriptor is borrowed and open. The first vector is `head`, borrowed for
    // this call alone. The others are slices of a mapping that is not unmapped while they are
    // borrowed; nothing here makes a reference to what they hold, so it does not matter that
    // the guest writes there meanwhile. A page that its file no longer has is a fault that
    // the kernel handles, not a signal.
    result(unsafe { libc::readv(device.as_fd().as_raw_fd(), vectors.as_ptr(), count) })
}

/// Writes once, `head` and then what is in the guest's memory.
///
/// # Errors
/// As `writev(2)`: EFAULT where the guest's memory is no longer behind its addresses.
pub(super) fn write_from(
    device: impl AsFd,
    head: &[u8],
    guest: &[VolatileSlice<'_>],
) -> rustix::io::Result<usize> {
    let ours = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
    let vectors = vectors(ours, guest);
    let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: as of `read_into`; the kernel only reads what the vectors say.
    result(unsafe { libc::writev(device.as_fd().as_raw_fd(), vectors.as_ptr(), count) })
}

fn vectors(ours: libc::iovec, guest: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    let of_guest = guest.iter().map(|slice| libc::iovec {
        // The mapping is there as long as the slice; the guard has no work of its own (Xen's).
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    });
    std::iter::once(ours).chain(of_guest).collect()
}

fn result(done: isize) -> rustix::io::Result<usize> {
    usize::try_from(done).map_err(|_| {
        let code = io::Error::last_os_error().raw_os_error();
        code.map_or(Errno::IO, Errno::from_raw_os_error)
    })
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
