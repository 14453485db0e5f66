//! The sockets of a tunnel on Linux: UDP, and raw ones for protocols 4 and 41.
//!
//! Raw sockets are opened when the first peer needs them: while one is open, the kernel
//! answers no ICMP "protocol unreachable".
//!
//! Sources: `udp(7)`, `raw(7)`, `ip(7)`.

use std::io::{self, Read};
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd, RawFd};

use conet_wire::ip::{Ecn, PROTO_ICMP, PROTO_IPV4, PROTO_IPV6};
use rustix::net::sockopt::{ip_mtu, ipv6_mtu};
use socket2::{Domain, Protocol, Socket, Type};

use super::socket::enlarge;
use super::sys::hear_icmp_errors;
use crate::udp::{BUFFER_BYTES, BUFFERS, Udp, is_passing, patiently};
use crate::{Arrival, Arrivals, Destination, Network, Offloads, Origin, Transmit};

/// A port that is never sent to (RFC 863).
const DISCARD: u16 = 9;

/// The sockets of one tunnel.
#[derive(Debug)]
pub(crate) struct Sockets {
    udp: Udp,
    /// For protocols 4, 41, and for errors of ICMP.
    raw: Option<[Socket; 3]>,
}

impl Sockets {
    /// Binds the UDP socket in the namespace of the calling thread.
    pub(crate) fn bind(listen: SocketAddr, offloads: Offloads) -> io::Result<Self> {
        Ok(Self { udp: Udp::bind(listen, offloads)?, raw: None })
    }

    /// Where the UDP socket listens.
    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    /// The UDP socket's descriptor, for polling.
    pub(crate) fn udp_fd(&self) -> RawFd {
        self.udp.socket.as_raw_fd()
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

    fn send_raw(&self, to: SocketAddrV4, batch: &Transmit) -> usize {
        let Some([raw, ..]) = &self.raw else { return batch.datagrams().len() };
        let to = to.into();
        let lost =
            |packet: &&[u8]| patiently(&self.udp.socket, || raw.send_to(packet, &to)).is_err();
        batch.datagrams().filter(lost).count()
    }
}

impl Network for Sockets {
    fn receive(&mut self, into: &mut Arrivals) -> io::Result<bool> {
        let more = self.udp.receive(into)?;
        Ok(self.receive_raw(into)? || more)
    }

    fn path_mtu(&mut self, to: Destination) -> Option<u16> {
        let to = match to {
            Destination::Udp(to) => to,
            Destination::Ip(to) => SocketAddr::from((to, DISCARD)),
        };
        let socket = connected(to).ok()?;
        let mtu = if to.is_ipv4() { ip_mtu(&socket) } else { ipv6_mtu(&socket) };
        // Of the loopback it is 65,536.
        Some(u16::try_from(mtu.ok()?).unwrap_or(u16::MAX))
    }

    fn send(&mut self, batch: &Transmit) -> usize {
        match batch.to() {
            Destination::Udp(to) => self.udp.send(to, batch),
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

/// A socket that is told what the system knows of the way to `to`: connected there.
fn connected(to: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    socket.connect(&to.into())?;
    Ok(socket)
}
