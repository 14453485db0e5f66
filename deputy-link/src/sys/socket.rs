//! Options and state of a link's socket (man 7 tcp).

use rustix::io::Errno;
use rustix::net::sockopt::{
    Timeout, set_socket_keepalive, set_socket_timeout, set_tcp_congestion, set_tcp_keepcnt,
    set_tcp_keepidle, set_tcp_keepintvl, set_tcp_user_timeout,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::io;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

/// Beyond the time for which a link may be silent: until then its user decides.
const MARGIN: Duration = Duration::from_secs(5);
/// Between two attempts on a silent link. The kernel would double it up to two
/// minutes, and a network that is back would not be noticed.
const RETRY: Duration = Duration::from_secs(1);
/// `TCP_RTO_MAX_MS`, Linux 6.15.
const TCP_RTO_MAX_MS: i32 = 44;
/// Sizes, as the kernel takes them.
#[allow(clippy::cast_possible_truncation, reason = "both are below 1 KiB")]
const INT: libc::socklen_t = size_of::<i32>() as libc::socklen_t;
#[allow(clippy::cast_possible_truncation, reason = "both are below 1 KiB")]
const TCP_INFO: libc::socklen_t = size_of::<libc::tcp_info>() as libc::socklen_t;

/// Has a socket that is not connected yet send as fast as its window allows, whatever the
/// machine's default is. A paced one (BBR) sends an image as slowly as the calls went
/// before it, whose answers took their time; and once it has begun, a socket goes on
/// pacing whatever it is set to (`sk_pacing_status` in net/ipv4/tcp_bbr.c). Where the
/// kernel has neither, the default does.
pub(crate) fn unpaced(socket: BorrowedFd<'_>) {
    for plain in ["cubic", "reno"] {
        if set_tcp_congestion(socket, plain).is_ok() {
            break;
        }
    }
}

/// A connection to `address`, unpaced from its beginning.
pub(crate) fn connect(address: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    unpaced(socket.as_fd());
    // It limits connect(2) as well (man 7 socket).
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    match rustix::net::connect(&socket, &address) {
        Err(Errno::INPROGRESS | Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
        other => other?,
    }
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(TcpStream::from(socket))
}

/// Has the kernel ask once a second whether the other end is there, and end the link
/// when there was no answer for `timeout` and a margin.
pub(crate) fn keep_alive(link: BorrowedFd<'_>, timeout: Duration) -> io::Result<()> {
    set_socket_keepalive(link, true)?;
    set_tcp_keepidle(link, RETRY)?;
    set_tcp_keepintvl(link, RETRY)?;
    // The most there are; the time below counts.
    set_tcp_keepcnt(link, 127)?;
    // Where pauses double, the attempt after the network's return may come as late
    // again as it was away.
    let patience = if limit_retry(link) { timeout } else { timeout * 2 };
    let patience = u32::try_from((patience + MARGIN).as_millis()).unwrap_or(u32::MAX);
    Ok(set_tcp_user_timeout(link, patience)?)
}

fn limit_retry(link: BorrowedFd<'_>) -> bool {
    let most = i32::try_from(RETRY.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the kernel reads one int.
    let result = unsafe {
        libc::setsockopt(
            link.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_RTO_MAX_MS,
            (&raw const most).cast(),
            INT,
        )
    };
    result == 0
}

/// For how long nothing has come from the other end.
pub(crate) fn silence(link: BorrowedFd<'_>) -> io::Result<Duration> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len = TCP_INFO;
    // SAFETY: the kernel writes at most `len` bytes.
    let result = unsafe {
        libc::getsockopt(
            link.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed at first, which is a valid value.
    let info = unsafe { info.assume_init() };
    let heard = info.tcpi_last_ack_recv.min(info.tcpi_last_data_recv);
    Ok(Duration::from_millis(u64::from(heard)))
}
