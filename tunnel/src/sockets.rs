//! UDP and raw sockets as a [`Network`].
//!
//! UDP goes through quinn-udp: GSO on the way out, `recvmmsg` and GRO on the way
//! in, the congestion mark in both. A refused GSO send (EIO: a link without
//! checksum offload; EINVAL: an old kernel) is sent again datagram by datagram.
//! Raw sockets for protocols 4 and 41 are opened when the first peer needs them:
//! while one is open, the kernel answers no ICMP "protocol unreachable".
//!
//! Sources: `udp(7)`, `raw(7)`, `ip(7)`.

use std::io::{self, IoSliceMut, Read};
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, RawFd};

use conet_wire::ip::{Ecn, PROTO_ICMP, PROTO_IPV4, PROTO_IPV6};
use quinn_udp::{EcnCodepoint, RecvMeta, UdpSockRef, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{
    ip_mtu, ipv6_mtu, set_ip_mtu_discover, set_ipv6_mtu_discover,
    set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::sys::{hear_icmp_errors, set_udp_gro};
use crate::{Arrival, Arrivals, Destination, Network, Offloads, Origin, Transmit};

/// Datagram buffers per receive call; each may hold a GRO batch of 64.
const BUFFERS: usize = 4;
/// Longest GRO batch: a UDP payload cannot be longer.
const BUFFER_BYTES: usize = 65_536;
/// Socket buffers: 4 MiB is 3 ms at 10 Gb/s.
const SOCKET_BUFFER: usize = 4 << 20;
/// A port that is never sent to (RFC 863).
const DISCARD: u16 = 9;
/// How long a full send queue may hold the thread up before datagrams are lost.
/// It throttles the sender, whose packets wait in the device meanwhile.
const SEND_PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// The sockets of one tunnel.
pub(crate) struct Sockets {
    udp: Socket,
    state: UdpSocketState,
    /// The UDP socket is an IPv6 one and speaks IPv4 by mapped addresses.
    mapped: bool,
    /// For protocols 4, 41, and for errors of ICMP.
    raw: Option<[Socket; 3]>,
    /// Datagrams a send call may take.
    most: usize,
    metas: [RecvMeta; BUFFERS],
}

impl std::fmt::Debug for Sockets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sockets").field("udp", &self.udp).finish_non_exhaustive()
    }
}

impl Sockets {
    /// Binds the UDP socket in the namespace of the calling thread.
    pub(crate) fn bind(listen: SocketAddr, offloads: Offloads) -> io::Result<Self> {
        let udp = Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))?;
        if listen.is_ipv6() {
            udp.set_only_v6(false)?;
        }
        udp.bind(&listen.into())?;
        enlarge(&udp);
        let state = UdpSocketState::new(UdpSockRef::from(&udp))?;
        if !offloads.receive {
            // A kernel without it does not need to be told.
            drop(set_udp_gro(&udp, false));
        }
        Ok(Self {
            udp,
            state,
            mapped: listen.is_ipv6(),
            raw: None,
            most: if offloads.send { usize::MAX } else { 1 },
            metas: [RecvMeta::default(); BUFFERS],
        })
    }

    /// Where the UDP socket listens.
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()?.as_socket().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The UDP socket's descriptor, for polling.
    pub(crate) fn udp_fd(&self) -> RawFd {
        self.udp.as_raw_fd()
    }

    /// Opens the raw sockets unless they are open; gives their descriptors when
    /// they are new.
    pub(crate) fn open_raw(&mut self) -> io::Result<Option<[RawFd; 3]>> {
        if self.raw.is_some() {
            return Ok(None);
        }
        let raw = [open_raw(PROTO_IPV4)?, open_raw(PROTO_IPV6)?, open_raw(PROTO_ICMP)?];
        hear_icmp_errors(&raw[2])?;
        let descriptors = [raw[0].as_raw_fd(), raw[1].as_raw_fd(), raw[2].as_raw_fd()];
        self.raw = Some(raw);
        Ok(Some(descriptors))
    }

    /// Up to four buffers, each of one datagram or of many joined.
    fn receive_udp(&mut self, into: &mut Arrivals) -> io::Result<bool> {
        let mut parts = into.buffer.chunks_exact_mut(BUFFER_BYTES);
        let mut slices: [IoSliceMut<'_>; BUFFERS] =
            std::array::from_fn(|_| IoSliceMut::new(parts.next().unwrap_or_default()));
        let received = self.state.recv(UdpSockRef::from(&self.udp), &mut slices, &mut self.metas);
        let count = match received {
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

    /// Packets behind the buffers of UDP, as long as the longest would fit.
    fn receive_raw(&self, into: &mut Arrivals) -> io::Result<bool> {
        let mut used = BUFFERS * BUFFER_BYTES;
        for raw in self.raw.iter().flatten() {
            let mut socket = raw;
            while let Some(space) = into.buffer.get_mut(used..used + BUFFER_BYTES) {
                match socket.read(space) {
                    Ok(len) => {
                        let at = used..used + len;
                        used = at.end;
                        into.list.push(Arrival { origin: Origin::Ip, ecn: Ecn::NotEct, at });
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) if is_passing(&e) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(used + BUFFER_BYTES > into.buffer.len())
    }

    fn send_udp(&self, to: SocketAddr, batch: &Transmit) -> usize {
        let destination = match to.ip() {
            IpAddr::V4(v4) if self.mapped => SocketAddr::new(v4.to_ipv6_mapped().into(), to.port()),
            _ => to,
        };
        let ecn = EcnCodepoint::from_bits(batch.ecn() as u8);
        let send = |contents: &[u8], segment_size| {
            let transmit =
                quinn_udp::Transmit { destination, ecn, contents, segment_size, src_ip: None };
            self.patiently(|| self.state.try_send(UdpSockRef::from(&self.udp), &transmit))
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
        drop(self.set_dont_fragment(false));
        let refused = batch.datagrams().filter(|datagram| send(datagram, None).is_err()).count();
        drop(self.set_dont_fragment(true));
        refused
    }

    /// As quinn-udp sets it: DF always, never what the kernel believes of the path.
    fn set_dont_fragment(&self, on: bool) -> io::Result<()> {
        use rustix::net::sockopt::{Ipv4PathMtuDiscovery as V4, Ipv6PathMtuDiscovery as V6};
        if self.mapped {
            set_ipv6_mtu_discover(&self.udp, if on { V6::PROBE } else { V6::DONT })?;
        }
        set_ip_mtu_discover(&self.udp, if on { V4::PROBE } else { V4::DONT })?;
        Ok(())
    }

    fn send_raw(&self, to: SocketAddrV4, batch: &Transmit) -> usize {
        let Some([raw, ..]) = &self.raw else { return batch.datagrams().len() };
        let to = to.into();
        let lost = |packet: &&[u8]| self.patiently(|| raw.send_to(packet, &to)).is_err();
        batch.datagrams().filter(lost).count()
    }

    /// Tries once more after a full queue has drained a little.
    fn patiently<T>(&self, mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let mut waiting = [PollFd::new(&self.udp, PollFlags::OUT)];
                poll(&mut waiting, Some(&SEND_PATIENCE))?;
                call()
            }
            // One pending ICMP error is reported instead of sending.
            Err(e) if is_passing(&e) => call(),
            other => other,
        }
    }
}

impl Network for Sockets {
    fn receive(&mut self, into: &mut Arrivals) -> io::Result<bool> {
        let more = self.receive_udp(into)?;
        Ok(self.receive_raw(into)? || more)
    }

    fn path_mtu(&mut self, to: Destination) -> Option<u16> {
        // A socket that is connected there is told what the kernel knows of the way.
        let to = match to {
            Destination::Udp(to) => to,
            Destination::Ip(to) => SocketAddr::from((to, DISCARD)),
        };
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP)).ok()?;
        socket.connect(&to.into()).ok()?;
        let mtu = if to.is_ipv4() { ip_mtu(&socket) } else { ipv6_mtu(&socket) };
        // Of the loopback it is 65,536.
        Some(u16::try_from(mtu.ok()?).unwrap_or(u16::MAX))
    }

    fn send(&mut self, batch: &Transmit) -> usize {
        match batch.to() {
            Destination::Udp(to) => self.send_udp(to, batch),
            Destination::Ip(to) => self.send_raw(SocketAddrV4::new(to, 0), batch),
        }
    }
}

fn open_raw(protocol: u8) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(i32::from(protocol))))?;
    socket.set_nonblocking(true)?;
    socket.set_header_included_v4(true)?;
    enlarge(&socket);
    Ok(socket)
}

/// Larger buffers where we may: beyond the system's limit with CAP_NET_ADMIN,
/// else up to it. A small buffer only loses packets earlier.
fn enlarge(socket: &Socket) {
    if set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
        drop(socket.set_recv_buffer_size(SOCKET_BUFFER));
    }
    if set_socket_send_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
        drop(socket.set_send_buffer_size(SOCKET_BUFFER));
    }
}

/// Errors that say something about an earlier datagram or about nothing.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
    )
}
