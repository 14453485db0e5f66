//! `recvmsg(2)` into several places: the one call of this carrier that no crate offers.
//!
//! Not here: what becomes of it; batches that are received into one place, which quinn-udp
//! does.

#![allow(unsafe_code, reason = "recvmsg(2) and its control messages")]

use crate::session::Scattered;
use socket2::{SockAddr, SockAddrStorage};
use std::io::{self, IoSliceMut};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// Room for control messages: length of datagrams, congestion mark, and what the socket was
/// told to say beside them, destination and time.
const CONTROL: usize = 256;

/// Bytes that are aligned as control messages are.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// Receives what comes next into `parts`, one after the other. Does not sleep.
pub(super) fn receive(socket: &UdpSocket, parts: &mut [IoSliceMut<'_>]) -> io::Result<Scattered> {
    let mut control = Control([0; CONTROL]);
    let (mut length, mut segment, mut marked) = (0, None, false);
    let fill = |storage: *mut SockAddrStorage, address_length: *mut libc::socklen_t| {
        // SAFETY: all of it are integers and pointers, for which zero is a value.
        let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
        message.msg_name = storage.cast();
        // SAFETY: `try_init` gives a pointer to the length of what `storage` points to.
        message.msg_namelen = unsafe { *address_length };
        // `IoSliceMut` is an `iovec` by its documentation.
        message.msg_iov = parts.as_mut_ptr().cast();
        message.msg_iovlen = parts.len() as _;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = CONTROL as _;
        // SAFETY: every pointer in `message` is to memory that is borrowed here for writing and
        // as long as is said beside it; the descriptor is open.
        let received =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        length = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        // SAFETY: as above; the kernel says how much of `storage` it has filled.
        unsafe { *address_length = message.msg_namelen };
        // SAFETY: the kernel has filled `control` with whole messages and set their length.
        let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        // SAFETY: not null, it points to a whole message within `control`, which is aligned.
        while let Some(head) = unsafe { next.as_ref() } {
            // SAFETY: behind the head of a message is its data.
            let data = unsafe { libc::CMSG_DATA(head) };
            match (head.cmsg_level, head.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    // SAFETY: the data is an `int` (`man 7 udp`), perhaps not aligned.
                    segment = Some(unsafe { data.cast::<libc::c_int>().read_unaligned() });
                }
                (libc::IPPROTO_IP, libc::IP_TOS) => {
                    // SAFETY: the data is a byte (`man 7 ip`).
                    marked = is_marked(unsafe { *data });
                }
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    // SAFETY: the data is an `int` (`man 7 ipv6`), perhaps not aligned.
                    let class = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                    marked = is_marked(class.to_le_bytes()[0]);
                }
                _ => {}
            }
            // SAFETY: as for the first one; `head` is one of the same messages.
            next = unsafe { libc::CMSG_NXTHDR(&raw const message, head) };
        }
        Ok(())
    };
    // SAFETY: `fill` fills the storage and says how much of it, or fails.
    let ((), from) = unsafe { SockAddr::try_init(fill)? };
    let from = from.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    let segment = segment.and_then(|segment| usize::try_from(segment).ok());
    Ok(Scattered { from, length, segment: segment.unwrap_or(length), marked })
}

/// ECN CE (RFC 3168 §5).
const fn is_marked(class: u8) -> bool {
    class & 3 == 3
}
