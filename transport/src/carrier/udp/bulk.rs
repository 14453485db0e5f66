//! The socket for bulk: many datagrams in a system call, Don't Fragment, congestion marks.
//!
//! By quinn-udp: GSO where the kernel and the device have it (Linux 4.18, `man 7 udp`:
//! `UDP_SEGMENT`), GRO where the kernel has it (5.0), else one datagram in a system call.
//! Where a device says only when it is used that it has no GSO, what was on its way is sent
//! once more one by one, and so is everything after that.
//!
//! Datagrams leave as ECN-capable (ECT(0), RFC 3168 §5) and are never cut in pieces
//! (`IP_PMTUDISC_PROBE`): what is too long for the device is told, what is too long for
//! the path is lost, and the session's search for the path MTU needs both.

use super::{DATAGRAM, Incoming, SOCKET_BUFFER, wait_for};
use crate::session::BulkPort;
use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState, is_msg_size_err};
use rustix::event::{PollFd, PollFlags};
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

/// Most datagrams in one system call (`UDP_MAX_SEGMENTS` of Linux 4.18; 128 since 6.10).
const SEGMENTS: usize = 64;

/// A bound socket and what it can do.
#[derive(Debug)]
pub struct BulkSocket {
    socket: UdpSocket,
    state: UdpSocketState,
    port: BulkPort,
    incoming: Vec<u8>,
    /// Tests want to see what happens without.
    without_gso: bool,
}

impl BulkSocket {
    /// Binds a socket to any port of `address`.
    ///
    /// # Errors
    ///
    /// Those of `socket(2)`, `bind(2)` and `setsockopt(2)`.
    pub fn bind(address: IpAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(SocketAddr::new(address, 0))?;
        let state = UdpSocketState::new((&socket).into())?;
        let buffers = socket2::SockRef::from(&socket);
        // Smaller buffers only cost speed.
        buffers.set_recv_buffer_size(SOCKET_BUFFER).ok();
        buffers.set_send_buffer_size(SOCKET_BUFFER).ok();
        // What the kernel says counts its own memory as well, about half of it.
        let buffer = u32::try_from(buffers.recv_buffer_size()? / 2).unwrap_or(u32::MAX);
        let port = BulkPort { port: socket.local_addr()?.port(), buffer };
        let incoming = vec![0; DATAGRAM];
        Ok(Self { socket, state, port, incoming, without_gso: false })
    }

    /// The socket, for its options.
    #[must_use]
    pub const fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    pub(super) const fn port(&self) -> BulkPort {
        self.port
    }

    pub(super) fn batch(&self) -> usize {
        // Without GSO a batch is several system calls, which is no reason to make none.
        self.state.max_gso_segments().clamp(1, SEGMENTS).max(16)
    }

    pub(in crate::carrier) fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(&self.socket, PollFlags::IN)
    }

    pub(super) fn send(
        &mut self,
        to: SocketAddr,
        datagrams: &[u8],
        segment: usize,
    ) -> io::Result<bool> {
        let most = if self.without_gso { 1 } else { self.state.max_gso_segments().min(SEGMENTS) };
        let mut rest = datagrams;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(segment.max(1) * most.max(1)));
            let transmit = Transmit {
                destination: to,
                ecn: Some(EcnCodepoint::Ect0),
                contents: now,
                segment_size: (now.len() > segment).then_some(segment),
                src_ip: None,
            };
            match self.state.try_send((&self.socket).into(), &transmit) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // The socket's buffer is full: until there is room, or it is lost.
                    wait_for(&mut [PollFd::new(&self.socket, PollFlags::OUT)], ROOM)?;
                    self.state.try_send((&self.socket).into(), &transmit).ok();
                }
                Err(error) if is_msg_size_err(&error) => return Ok(false),
                // No GSO after all, as quinn-udp has noticed.
                Err(_) if now.len() > segment && self.state.max_gso_segments() == 1 => {
                    return self.send(to, rest, segment);
                }
                Err(error) if is_fatal(&error) => return Err(error),
                // Refused, unreachable: to the session it is lost.
                Err(_) => {}
            }
            rest = later;
        }
        Ok(true)
    }

    pub(super) fn receive(&mut self, mut take: impl FnMut(Incoming<'_>)) -> io::Result<usize> {
        let mut meta = [RecvMeta::default()];
        let mut into = [IoSliceMut::new(&mut self.incoming)];
        match self.state.recv((&self.socket).into(), &mut into, &mut meta) {
            Ok(_) => {}
            Err(error) if is_fatal(&error) => return Err(error),
            // Nothing there, or an error of an earlier datagram.
            Err(_) => return Ok(0),
        }
        let [RecvMeta { len, stride, addr, ecn, .. }] = meta;
        let Some(bytes) = self.incoming.get_mut(..len) else { return Ok(0) };
        let marked = ecn == Some(EcnCodepoint::Ce);
        let mut taken = 0;
        for datagram in bytes.chunks_mut(stride.max(1)) {
            take(Incoming { from: addr, bytes: datagram, marked });
            taken += 1;
        }
        Ok(taken)
    }
}

/// How long a batch waits for room in the socket's buffer.
const ROOM: Duration = Duration::from_millis(1);

fn is_fatal(error: &io::Error) -> bool {
    error
        .raw_os_error()
        .is_some_and(|code| super::is_fatal(rustix::io::Errno::from_raw_os_error(code)))
}
