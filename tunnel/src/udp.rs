//! The UDP socket of a tunnel, whatever the system.
//!
//! It goes through quinn-udp: segmentation on the way out, joined datagrams on the way
//! in, the congestion mark in both. A refused send of many (Linux, EIO: a link without
//! checksum offload; EINVAL: an old kernel) is sent again datagram by datagram. What no
//! library has is the system's: [`crate::os::socket`].
//!
//! Sources: `udp(7)`; Windows `IPPROTO_UDP` socket options.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};

use conet_wire::ip::Ecn;
use quinn_udp::{EcnCodepoint, RecvMeta, UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use crate::os::socket;
use crate::{Arrival, Arrivals, Offloads, Origin, Transmit};

/// Datagram buffers per receive call; each may hold a batch of 64.
pub(crate) const BUFFERS: usize = 4;
/// Longest joined batch: a UDP payload cannot be longer.
pub(crate) const BUFFER_BYTES: usize = 65_536;

/// A bound socket that never blocks for long.
pub(crate) struct Udp {
    pub(crate) socket: Socket,
    state: UdpSocketState,
    /// It is an IPv6 one and speaks IPv4 by mapped addresses.
    mapped: bool,
    /// Datagrams a send call may take.
    most: usize,
    metas: [RecvMeta; BUFFERS],
}

impl std::fmt::Debug for Udp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Udp").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Udp {
    /// Binds it, on Linux in the network namespace of the calling thread.
    pub(crate) fn bind(listen: SocketAddr, offloads: Offloads) -> io::Result<Self> {
        let udp = Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))?;
        if listen.is_ipv6() {
            udp.set_only_v6(false)?;
        }
        udp.bind(&listen.into())?;
        socket::enlarge(&udp);
        let state = UdpSocketState::new(UdpSockRef::from(&udp))?;
        if !offloads.receive {
            socket::join_nothing(&udp);
        }
        Ok(Self {
            socket: udp,
            state,
            mapped: listen.is_ipv6(),
            most: if offloads.send { usize::MAX } else { 1 },
            metas: [RecvMeta::default(); BUFFERS],
        })
    }

    /// Where it listens.
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()?.as_socket().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Up to four buffers, each of one datagram or of many joined; says whether more may
    /// be waiting.
    pub(crate) fn receive(&mut self, into: &mut Arrivals) -> io::Result<bool> {
        let mut parts = into.buffer.chunks_exact_mut(BUFFER_BYTES);
        let mut slices: [IoSliceMut<'_>; BUFFERS] =
            std::array::from_fn(|_| IoSliceMut::new(parts.next().unwrap_or_default()));
        let from = UdpSockRef::from(&self.socket);
        let count = match self.state.recv(from, &mut slices, &mut self.metas) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            // An ICMP error about something sent earlier; the socket is well.
            Err(e) if is_passing(&e) => return Ok(true),
            Err(e) => return Err(e),
        };
        for (index, meta) in self.metas.iter().enumerate().take(count) {
            let from = SocketAddr::new(meta.addr.ip().to_canonical(), meta.addr.port());
            let ecn = meta.ecn.map_or(Ecn::NotEct, |mark| Ecn::from_bits(mark as u8));
            let (start, stride) = (index * BUFFER_BYTES, meta.stride.max(1));
            let end = start + meta.len.min(BUFFER_BYTES);
            for at in (start..end).step_by(stride) {
                let at = at..end.min(at + stride);
                into.list.push(Arrival { origin: Origin::Udp(from), ecn, at });
            }
        }
        Ok(true)
    }

    /// Sends a batch; gives the number of datagrams that were refused.
    pub(crate) fn send(&self, to: SocketAddr, batch: &Transmit) -> usize {
        let destination = match to.ip() {
            IpAddr::V4(v4) if self.mapped => SocketAddr::new(v4.to_ipv6_mapped().into(), to.port()),
            _ => to,
        };
        let ecn = EcnCodepoint::from_bits(batch.ecn() as u8);
        let send = |contents: &[u8], segment_size| {
            let transmit =
                quinn_udp::Transmit { destination, ecn, contents, segment_size, src_ip: None };
            patiently(&self.socket, || {
                self.state.try_send(UdpSockRef::from(&self.socket), &transmit)
            })
        };
        if batch.may_fragment() {
            return self.send_fragmentable(batch, send);
        }
        let most = self.state.max_gso_segments().clamp(1, self.most);
        let mut refused = 0;
        for part in batch.contents().chunks(batch.segment() * most) {
            if send(part, Some(batch.segment())).is_ok() {
                continue;
            }
            // Singly, so that one bad datagram or a link without GSO costs one.
            for datagram in part.chunks(batch.segment()) {
                refused += usize::from(send(datagram, None).is_err());
            }
        }
        refused
    }

    /// One by one, and without DF, which UDP sockets have or have not as a whole.
    fn send_fragmentable(
        &self,
        batch: &Transmit,
        send: impl Fn(&[u8], Option<usize>) -> io::Result<()>,
    ) -> usize {
        // Where it cannot be set, datagrams that do not fit are refused, and counted.
        socket::set_dont_fragment(&self.socket, self.mapped, false).ok();
        let refused = batch.datagrams().filter(|datagram| send(datagram, None).is_err()).count();
        socket::set_dont_fragment(&self.socket, self.mapped, true).ok();
        refused
    }
}

/// Tries once more after a full queue has drained a little.
pub(crate) fn patiently<T>(udp: &Socket, mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match call() {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            socket::wait_writable(udp)?;
            call()
        }
        // One pending ICMP error is reported instead of sending.
        Err(e) if is_passing(&e) => call(),
        other => other,
    }
}

/// Errors that say something about an earlier datagram or about nothing.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted
            | io::ErrorKind::ConnectionRefused
            // Windows' word for it.
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
    )
}
