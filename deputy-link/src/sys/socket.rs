//! Options and state of a link's socket (man 7 tcp).

use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_congestion, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl,
    set_tcp_user_timeout,
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
    let socket = socket2::Socket::from(socket);
    // Not SO_SNDTIMEO: a connect(2) with that limit ends at any signal (man 7 signal).
    socket.connect_timeout(&address.into(), limit)?;
    Ok(socket.into())
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
    let info = info(link)?;
    let heard = info.tcpi_last_ack_recv.min(info.tcpi_last_data_recv);
    Ok(Duration::from_millis(u64::from(heard)))
}

/// How long the other end takes to answer, smoothed.
pub(crate) fn round_trip(link: BorrowedFd<'_>) -> io::Result<Duration> {
    Ok(Duration::from_micros(u64::from(info(link)?.tcpi_rtt)))
}

fn info(link: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
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
    Ok(unsafe { info.assume_init() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Instant;

    extern "C" fn nothing(_signal: libc::c_int) {}

    /// The limit was SO_SNDTIMEO, and a connection ended as "interrupted" when its
    /// thread took a signal.
    #[test]
    fn a_signal_does_not_end_a_connection() {
        let full = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&full, 0).unwrap();
        let address = full.local_addr().unwrap();
        let handler: extern "C" fn(libc::c_int) = nothing;
        // SAFETY: `signal` has a handler that does nothing; no other test of this crate's
        // library uses the signal.
        unsafe { libc::signal(libc::SIGUSR2, handler as *const () as libc::sighandler_t) };
        // SAFETY: it has no arguments.
        let thread = unsafe { libc::pthread_self() };
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    // SAFETY: the thread waits for this one, so it is there.
                    unsafe { libc::pthread_kill(thread, libc::SIGUSR2) };
                    thread::sleep(Duration::from_millis(3));
                }
            });
            let (begin, limit) = (Instant::now(), Duration::from_millis(100));
            let held: Vec<_> = (0..4).map(|_| connect(address, limit)).collect();
            done.store(true, Ordering::SeqCst);
            let kinds: Vec<_> =
                held.iter().filter_map(|one| one.as_ref().err()).map(io::Error::kind).collect();
            assert!(begin.elapsed() >= limit && !kinds.is_empty());
            assert!(kinds.iter().all(|kind| *kind == io::ErrorKind::TimedOut), "{kinds:?}");
        });
    }
}
