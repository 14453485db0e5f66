//! The real kernel: one system call per method.
//!
//! Raw `getsockopt(2)` and `setsockopt(2)`, because no safe wrapper knows repair
//! mode, and two ioctls; everything else goes through rustix and socket2.
#![expect(unsafe_code, reason = "raw getsockopt, setsockopt and ioctl")]

use crate::kernel::{Kernel, Opt, Queued};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{self, RecvFlags, SendFlags};
use socket2::{Domain, SockAddr, SockRef, Type};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// The kernel that runs this program.
#[derive(Clone, Copy, Debug, Default)]
pub struct Linux;

/// `SIOCOUTQNSD`, `linux/sockios.h`; not in libc.
const SIOCOUTQNSD: libc::Ioctl = 0x894b;

fn internet(address: io::Result<SockAddr>) -> io::Result<SocketAddr> {
    address?.as_socket().ok_or_else(|| io::ErrorKind::Unsupported.into())
}

impl Kernel for Linux {
    fn socket(&self, ipv6: bool) -> io::Result<OwnedFd> {
        let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
        socket2::Socket::new(domain, Type::STREAM, Some(socket2::Protocol::TCP)).map(OwnedFd::from)
    }

    fn getsockname(&self, fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
        internet(SockRef::from(&fd).local_addr())
    }

    fn getpeername(&self, fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
        internet(SockRef::from(&fd).peer_addr())
    }

    fn getsockopt(&self, fd: BorrowedFd<'_>, option: Opt, value: &mut [u8]) -> io::Result<usize> {
        let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let mut length = libc::socklen_t::try_from(value.len()).map_err(too_long)?;
        // SAFETY: `fd` is open while it is borrowed; `value` is writable for `length`
        // bytes, of which the kernel writes at most that many and says how many.
        let result = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                option.level,
                option.name,
                value.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        if result == 0 { Ok(length as usize) } else { Err(io::Error::last_os_error()) }
    }

    fn setsockopt(&self, fd: BorrowedFd<'_>, option: Opt, value: &[u8]) -> io::Result<()> {
        let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let length = libc::socklen_t::try_from(value.len()).map_err(too_long)?;
        // SAFETY: `fd` is open while it is borrowed; `value` is readable for `length`
        // bytes, and the kernel keeps no pointer to it for the options used here.
        let result = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                option.level,
                option.name,
                value.as_ptr().cast(),
                length,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn queued(&self, fd: BorrowedFd<'_>, queue: Queued) -> io::Result<usize> {
        let request = match queue {
            Queued::In => libc::FIONREAD,
            Queued::Out => libc::TIOCOUTQ,
            Queued::OutNotSent => SIOCOUTQNSD,
        };
        let mut length: libc::c_int = 0;
        // SAFETY: `fd` is open while it is borrowed; all three requests write one int
        // to the pointer, which is valid for that.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut length) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        usize::try_from(length).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn has_urgent(&self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        let mut fds = [PollFd::new(&fd, PollFlags::PRI)];
        poll(&mut fds, Some(&Timespec::default()))?;
        Ok(fds.iter().any(|fd| fd.revents().contains(PollFlags::PRI)))
    }

    fn peek(&self, fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        // The second number is for truncated datagrams; a stream has none.
        net::recv(fd, bytes, flags).map(|(length, _)| length).map_err(io::Error::from)
    }

    fn send(&self, fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
        net::send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map_err(io::Error::from)
    }

    fn bind(&self, fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
        SockRef::from(&fd).bind(&address.into())
    }

    fn connect(&self, fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
        SockRef::from(&fd).connect(&address.into())
    }

    fn disconnect(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        net::connect_unspec(fd).map_err(io::Error::from)
    }
}
