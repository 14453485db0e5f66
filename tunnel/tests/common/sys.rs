//! Packet sockets, which no library here makes safely.

#![allow(unsafe_code, reason = "socket addresses of links are made by hand")]
#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use conet_netsys::{IfName, Netlink};

/// What a link of the calling thread's namespace receives, with its headers
/// (`packet(7)`); what is sent to it goes out.
pub(crate) fn packet_socket(link: IfName) -> OwnedFd {
    const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
    let all = 3u16.to_be();
    // SAFETY: no pointer is passed.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(all)) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made this descriptor for us.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all bytes 0 are a value of this plain structure.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = all;
    let index = Netlink::open().unwrap().index(link).unwrap();
    address.sll_ifindex = i32::try_from(index).unwrap();
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: the address is live and of the length given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
    let on: libc::c_int = 1;
    let len = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap();
    // SAFETY: the option is live and of the length given.
    let set = unsafe {
        let option = (&raw const on).cast();
        libc::setsockopt(fd, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, option, len)
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    socket
}
