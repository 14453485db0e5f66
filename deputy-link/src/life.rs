//! Whether the other half can be reached.
//!
//! A link outlives the network's absence: the kernel holds what is under way and
//! tries again once a second, the two halves wait, and nothing is run twice, since
//! bytes arrive once and in order. How long to wait is for the node to decide.

use crate::mover;
use crate::sys::{ptrace::get_descriptor, socket};
use rustix::process::Pid;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

/// A link's connection to a node.
///
/// # Errors
/// As of socket(2) and connect(2); `TimedOut` where it takes longer than `limit`.
pub fn connect(address: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    socket::connect(address, limit)
}

/// Where links come in; theirs is what is set here.
///
/// # Errors
/// As of bind(2).
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    socket::unpaced(listener.as_fd());
    Ok(listener)
}

/// Prepares a link that is to outlive a network's absence of `timeout`; the kernel
/// ends it some seconds later, also where no node is there to do so.
///
/// # Errors
/// When the kernel refuses an option (man 7 tcp).
pub fn keep_alive(link: &TcpStream, timeout: Duration) -> io::Result<()> {
    socket::keep_alive(link.as_fd(), timeout)
}

/// For how long the other half of the deputy in `pid` has not been heard of. Where
/// it is there this is below some 2 s, since it is asked once a second.
///
/// # Errors
/// When there is no such process, or no deputy in it.
pub fn silence(pid: Pid) -> io::Result<Duration> {
    let link = get_descriptor(pid, u64::from(mover::status(pid)?.link))?;
    socket::silence(link.as_fd())
}

/// How long the other half takes to answer on their link.
pub(crate) fn round_trip(pid: Pid) -> io::Result<Duration> {
    let link = get_descriptor(pid, u64::from(mover::status(pid)?.link))?;
    socket::round_trip(link.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::sockopt::tcp_congestion;
    use std::time::Instant;

    #[test]
    fn links_are_not_paced_at_either_end() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let near = connect(listener.local_addr().unwrap(), Duration::from_secs(5)).unwrap();
        let (far, _) = listener.accept().unwrap();
        for end in [&near, &far] {
            let name = tcp_congestion(end).unwrap();
            assert!(["cubic", "reno"].contains(&name.as_str()), "{name}");
            assert_eq!(end.write_timeout().unwrap(), None);
        }
    }

    #[test]
    fn a_connection_that_nobody_answers_ends_in_time() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert!(connect(address, Duration::from_secs(5)).is_err());
        // A queue that is full does not answer.
        let full = std::os::fd::OwnedFd::from(listen("127.0.0.1:0".parse().unwrap()).unwrap());
        rustix::net::listen(&full, 0).unwrap();
        let full = TcpListener::from(full);
        let address = full.local_addr().unwrap();
        let begin = Instant::now();
        let limit = Duration::from_millis(100);
        let held: Vec<_> = (0..4).map(|_| connect(address, limit)).collect();
        let failed = held.iter().flat_map(|one| one.as_ref().err()).map(io::Error::kind);
        assert!(failed.clone().count() > 0 && begin.elapsed() < Duration::from_secs(20));
        assert!(failed.clone().all(|kind| kind == io::ErrorKind::TimedOut), "{held:?}");
    }
}
