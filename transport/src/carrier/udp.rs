//! The UDP carrier: one bound socket, perhaps connected to its only peer, and beside it one
//! for bulk (`bulk`).
//!
//! The first has no options that cost: a call is one `send(2)` and one `recv(2)` a side.
//!
//! Invariants: datagrams are taken and sent without sleeping; an error that speaks of one
//! datagram, as ICMP's do (`man 7 ip`), is not one of the carrier.

use super::{Carrier, Guarantees, Incoming};
use crate::session::ways::stream_number;
use crate::session::{BulkPort, Scattered};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

mod bulk;
mod control;
mod sys;

pub use bulk::BulkSocket;

/// Wanted socket buffers: a full window several times over. The kernel gives
/// `net.core.rmem_max` at most.
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;
/// Datagrams taken in one turn.
const BATCH: usize = 64;
/// Shortest sleep in the kernel's receive: about a tick.
const TICK: Duration = Duration::from_millis(4);
/// Longest UDP datagram over IPv4, and a byte more.
const DATAGRAM: usize = 65_536;

/// A UDP socket, and one for bulk.
#[derive(Debug)]
pub struct Udp {
    socket: UdpSocket,
    connected: Option<SocketAddr>,
    incoming: Vec<u8>,
    bulk: Option<BulkSocket>,
    /// The socket's `SO_RCVTIMEO`.
    timeout: Option<Duration>,
}

impl Udp {
    /// Over `socket`, which is bound.
    #[must_use]
    pub fn new(socket: UdpSocket) -> Self {
        let buffers = socket2::SockRef::from(&socket);
        // Smaller buffers only cost speed.
        buffers.set_recv_buffer_size(SOCKET_BUFFER).ok();
        buffers.set_send_buffer_size(SOCKET_BUFFER).ok();
        // Without a second socket everything goes by the first.
        let bulk = socket.local_addr().and_then(|at| BulkSocket::bind(at.ip())).ok();
        Self { socket, connected: None, incoming: vec![0; DATAGRAM], bulk, timeout: None }
    }

    /// Connects the socket to its only peer, which saves the kernel a look at the routes
    /// for every datagram. A peer that moves is not heard any more: connect again, or not
    /// at all.
    ///
    /// # Errors
    ///
    /// `connect(2)`.
    pub fn connect(&mut self, address: SocketAddr) -> io::Result<()> {
        self.socket.connect(address)?;
        self.connected = Some(address);
        Ok(())
    }

    /// Where the socket is bound.
    ///
    /// # Errors
    ///
    /// `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// As [`new`](Self::new), without a socket for bulk.
    #[must_use]
    pub fn without_bulk(socket: UdpSocket) -> Self {
        Self { bulk: None, ..Self::new(socket) }
    }

    /// The socket for bulk.
    #[must_use]
    pub const fn bulk_socket(&self) -> Option<&BulkSocket> {
        self.bulk.as_ref()
    }

    /// The socket, for its options.
    #[must_use]
    pub const fn socket(&self) -> &UdpSocket {
        &self.socket
    }
}

/// Whether an error is the socket's, and not that of a datagram of the past.
const fn is_fatal(error: Errno) -> bool {
    matches!(error, Errno::BADF | Errno::NOTSOCK | Errno::FAULT)
}

impl Carrier for Udp {
    fn guarantees(&self) -> Guarantees {
        Guarantees { datagram: 65_507, reliable: false }
    }

    #[inline]
    fn send(&mut self, to: SocketAddr, datagrams: &[u8], segment: usize) -> io::Result<()> {
        for datagram in datagrams.chunks(segment.max(1)) {
            let sent = if self.connected == Some(to) {
                rustix::net::send(&self.socket, datagram, SendFlags::DONTWAIT)
            } else {
                rustix::net::sendto(&self.socket, datagram, SendFlags::DONTWAIT, &to)
            };
            // Refused, unreachable, no buffers: to the session it is lost.
            if let Err(error) = sent
                && is_fatal(error)
            {
                return Err(error.into());
            }
        }
        Ok(())
    }

    #[inline]
    fn receive(&mut self, mut take: impl FnMut(Incoming<'_>) -> bool) -> io::Result<usize> {
        let mut taken = 0;
        for _ in 0..BATCH {
            match self.receive_one(RecvFlags::DONTWAIT, &mut take)? {
                Received::Nothing => break,
                Received::Bad => {}
                Received::One { more } => {
                    taken += 1;
                    if !more {
                        break;
                    }
                }
            }
        }
        Ok(taken)
    }

    fn wait(&mut self, most: Duration) -> io::Result<bool> {
        wait_for(&mut [PollFd::new(&self.socket, PollFlags::IN)], most)
    }

    fn receive_sleeping(
        &mut self,
        most: Duration,
        mut take: impl FnMut(Incoming<'_>) -> bool,
    ) -> io::Result<usize> {
        // A few values, because setting one is a system call; never too long.
        let most = most.max(TICK);
        let timeout = Duration::from_millis(1 << most.as_millis().min(1 << 20).ilog2());
        if self.timeout != Some(timeout) {
            set_socket_timeout(&self.socket, Timeout::Recv, Some(timeout))?;
            self.timeout = Some(timeout);
        }
        Ok(match self.receive_one(RecvFlags::empty(), &mut take)? {
            Received::Nothing | Received::Bad => 0,
            Received::One { more: false } => 1,
            Received::One { more: true } => 1 + self.receive(take)?,
        })
    }

    fn bulk(&self) -> Option<BulkPort> {
        self.bulk.as_ref().map(BulkSocket::port)
    }

    fn bulk_batch(&self) -> usize {
        self.bulk.as_ref().map_or(0, BulkSocket::batch)
    }

    fn send_bulk(&mut self, to: SocketAddr, datagrams: &[u8], segment: usize) -> io::Result<bool> {
        match &mut self.bulk {
            Some(bulk) => bulk.send(to, datagrams, segment),
            None => self.send(to, datagrams, segment).map(|()| true),
        }
    }

    fn gathers(&self) -> bool {
        self.bulk.is_some()
    }

    fn send_parts(
        &mut self,
        to: SocketAddr,
        parts: &[IoSlice<'_>],
        segment: usize,
    ) -> io::Result<bool> {
        // Without a second socket there are no parts.
        self.bulk.as_mut().map_or(Ok(true), |bulk| bulk.send_parts(to, parts, segment))
    }

    fn scatters(&self) -> bool {
        self.bulk.is_some()
    }

    fn receive_parts(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<Option<Scattered>> {
        self.bulk.as_mut().map_or(Ok(None), |bulk| bulk.receive_parts(parts))
    }

    fn receive_bulk(&mut self, take: impl FnMut(Incoming<'_>)) -> io::Result<usize> {
        self.bulk.as_mut().map_or(Ok(0), |bulk| bulk.receive(take))
    }

    fn wait_for_either(&mut self, most: Duration) -> io::Result<bool> {
        let calls = PollFd::new(&self.socket, PollFlags::IN);
        match &self.bulk {
            Some(bulk) => wait_for(&mut [calls, bulk.poll_fd()], most),
            None => wait_for(&mut [calls], most),
        }
    }
}

/// What one look at the socket has brought.
enum Received {
    Nothing,
    /// An error of an earlier datagram that nobody took.
    Bad,
    One {
        more: bool,
    },
}

impl Udp {
    #[inline]
    fn receive_one(
        &mut self,
        flags: RecvFlags,
        take: &mut impl FnMut(Incoming<'_>) -> bool,
    ) -> io::Result<Received> {
        let socket = &self.socket;
        let received = match self.connected {
            Some(from) => rustix::net::recv(socket, &mut self.incoming[..], flags)
                .map(|(_, length)| (length, Some(from))),
            None => rustix::net::recvfrom(socket, &mut self.incoming[..], flags)
                .map(|(_, length, from)| (length, from.and_then(|from| from.try_into().ok()))),
        };
        let (length, from) = match received {
            Ok((length, Some(from))) => (length, from),
            Ok((_, None)) => return Ok(Received::Bad),
            Err(Errno::AGAIN) => return Ok(Received::Nothing),
            Err(error) if is_fatal(error) => return Err(error.into()),
            Err(_) => return Ok(Received::Bad),
        };
        if stream_number(from).is_some() {
            // Nobody is there; to the session it would be a stream of ours.
            return Ok(Received::Bad);
        }
        let Some(bytes) = self.incoming.get_mut(..length) else { return Ok(Received::Bad) };
        Ok(Received::One { more: take(Incoming { from, bytes, marked: false }) })
    }
}

/// Sleeps in `poll(2)`; says whether a descriptor is ready.
pub(super) fn wait_for(fds: &mut [PollFd<'_>], most: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(most).ok();
    match poll(fds, timeout.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn pair() -> (Udp, Udp, SocketAddr) {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let bind = || Udp::new(UdpSocket::bind(any).expect("bind"));
        let (one, two) = (bind(), bind());
        let to = two.local_addr().expect("bound");
        (one, two, to)
    }

    #[test]
    fn a_batch_arrives_as_datagrams() {
        let (mut one, mut two, to) = pair();
        one.send(to, b"aaaabbbbcc", 4).expect("sends");
        let mut got = Vec::new();
        while got.len() < 3 && two.wait(Duration::from_secs(10)).expect("waits") {
            let from = one.local_addr().expect("bound");
            two.receive(|incoming| {
                assert_eq!(incoming.from, from);
                got.push(incoming.bytes.to_vec());
                true
            })
            .expect("receives");
        }
        assert_eq!(got, [&b"aaaa"[..], b"bbbb", b"cc"]);
        assert!(!two.wait(Duration::from_millis(1)).expect("waits"));
    }

    #[test]
    fn who_wants_one_gets_one() {
        let (mut one, mut two, to) = pair();
        one.connect(to).expect("connects");
        one.send(to, b"aabb", 2).expect("sends");
        assert!(two.wait(Duration::from_secs(10)).expect("waits"));
        assert_eq!(two.receive(|_| false).expect("receives"), 1);
    }

    #[test]
    fn a_port_where_nobody_listens_is_loss_and_no_error() {
        let (mut one, two, to) = pair();
        drop(two);
        one.connect(to).expect("connects");
        for _ in 0..3 {
            one.send(to, b"lost", 4).expect("lost, that is all");
            one.wait(Duration::from_millis(20)).expect("waits");
            assert_eq!(one.receive(|_| true).expect("nothing"), 0);
        }
    }
}
