//! Options and state of a link's socket (man 7 tcp).

use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_congestion, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl,
    set_tcp_user_timeout,
};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
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

/// Has the kernel ask once a second whether the other end is there, and end the link
/// when there was no answer for `timeout` and a margin.
pub(crate) fn keep_alive(link: BorrowedFd<'_>, timeout: Duration) -> io::Result<()> {
    set_socket_keepalive(link, true)?;
    set_tcp_keepidle(link, RETRY)?;
    set_tcp_keepintvl(link, RETRY)?;
    // The most there are; the time below counts.
    set_tcp_keepcnt(link, 127)?;
    // A machine's default may pace what it sends, which only delays here. Where the
    // kernel has neither, the default does.
    for plain in ["cubic", "reno"] {
        if set_tcp_congestion(link, plain).is_ok() {
            break;
        }
    }
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
