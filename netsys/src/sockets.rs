//! Which sockets wait for strangers in a network namespace, as `ss -lntu` shows.
//!
//! By `sock_diag(7)`: one dump for each of TCP and UDP in IPv4 and IPv6. What it is
//! not: it tells no owner, and no connection.
//!
//! Sources: `sock_diag(7)`, `linux/inet_diag.h`. Least kernel: 3.3, with
//! `CONFIG_INET_DIAG` and `CONFIG_INET_UDP_DIAG`.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

use crate::{NetError, Netns, Object, Op};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// The kernel fills at most 32 KiB per message of a dump.
const RECV_BYTES: usize = 64 * 1024;
/// States of sockets that wait for strangers (`net/tcp_states.h`): a TCP socket that
/// listens, and a UDP socket that is not connected.
const LISTEN: u32 = 10;
const CLOSE: u32 = 7;

/// A transport protocol with ports.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// Its number in an IP header.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// `tcp` or `udp`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A socket that takes what strangers send.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Listener {
    /// Its protocol.
    pub transport: Transport,
    /// Where it is bound; unspecified for all addresses. `::` may mean IPv4 too.
    pub address: IpAddr,
    /// Its port, not 0.
    pub port: u16,
}

impl Listener {
    /// Whether packets to `address` can reach it.
    #[must_use]
    pub fn takes(&self, address: IpAddr) -> bool {
        match self.address.to_canonical() {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => true,
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => address.is_ipv4(),
            own => own == address,
        }
    }
}

/// Asks one namespace about its sockets.
pub struct SocketDiag {
    socket: Socket,
    sequence: u32,
}

impl fmt::Debug for SocketDiag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketDiag").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl SocketDiag {
    /// Opens the namespace of the calling thread.
    ///
    /// # Errors
    /// As `socket(2)`: descriptors exhausted, or no sock_diag in the kernel.
    pub fn open() -> Result<Self, NetError> {
        let fail = |e| NetError::refused(Op::OpenNetlink, Object::None, e);
        let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(fail)?;
        socket.bind_auto().map_err(fail)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(fail)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Opens `netns`.
    ///
    /// # Errors
    /// As [`SocketDiag::open`] and [`Netns::enter`].
    pub fn open_in(netns: &Netns) -> Result<Self, NetError> {
        let _inside = netns.enter()?;
        Self::open()
    }

    /// The sockets that wait for strangers, sorted, each once.
    ///
    /// # Errors
    /// ENOENT where the kernel lacks `CONFIG_INET_DIAG` or `CONFIG_INET_UDP_DIAG`.
    pub fn listeners(&mut self) -> Result<Vec<Listener>, NetError> {
        let mut all = Vec::new();
        for transport in Transport::ALL {
            for family in [libc::AF_INET, libc::AF_INET6] {
                self.dump(transport, family, &mut all)
                    .map_err(|e| NetError::refused(Op::ListSockets, Object::None, e))?;
            }
        }
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    fn dump(
        &mut self,
        transport: Transport,
        family: i32,
        all: &mut Vec<Listener>,
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&request(transport, family, self.sequence), 0)?;
        let mut buffer = Vec::with_capacity(RECV_BYTES);
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            match parse(&buffer, transport, self.sequence, all)? {
                Whole::Yes => return Ok(()),
                Whole::No => {}
            }
        }
    }
}

#[derive(Debug, Eq, PartialEq)]
enum Whole {
    Yes,
    No,
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
fn request(transport: Transport, family: i32, sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + 56);
    bytes.extend(72u32.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend([u8::try_from(family).unwrap_or_default(), transport.number(), 0, 0]);
    let state = if transport == Transport::Tcp { LISTEN } else { CLOSE };
    bytes.extend((1u32 << state).to_ne_bytes());
    // Any ports, addresses, link and cookie.
    bytes.extend([0; 48]);
    bytes
}

/// Takes the sockets of one buffer of a dump.
fn parse(
    mut bytes: &[u8],
    transport: Transport,
    sequence: u32,
    all: &mut Vec<Listener>,
) -> io::Result<Whole> {
    let broken = || io::Error::from_raw_os_error(libc::EBADMSG);
    while !bytes.is_empty() {
        let (&[l0, l1, l2, l3, t0, t1, _, _, s0, s1, s2, s3, ..], _) =
            bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(broken)?;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let message = bytes.get(HEADER_BYTES..length).ok_or_else(broken)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        if u32::from_ne_bytes([s0, s1, s2, s3]) != sequence {
            // Of a dump that was given up.
            continue;
        }
        match u16::from_ne_bytes([t0, t1]) {
            NLMSG_DONE => return Ok(Whole::Yes),
            NLMSG_ERROR => {
                let error = message.first_chunk().map_or(0, |error| i32::from_ne_bytes(*error));
                return Err(io::Error::from_raw_os_error(error.saturating_neg()));
            }
            _ => all.extend(listener(message, transport).filter(|found| found.port != 0)),
        }
    }
    Ok(Whole::No)
}

/// `struct inet_diag_msg`: family, state, timer, retransmissions, then the socket's
/// own port at 4 and its address at 8.
fn listener(message: &[u8], transport: Transport) -> Option<Listener> {
    let family = i32::from(*message.first()?);
    let port = u16::from_be_bytes(*message.get(4..)?.first_chunk()?);
    let address = message.get(8..)?;
    let address = match family {
        libc::AF_INET => IpAddr::from(*address.first_chunk::<4>()?),
        libc::AF_INET6 => IpAddr::from(*address.first_chunk::<16>()?),
        _ => return None,
    };
    Some(Listener { transport, address, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_takes_what_its_address_says() {
        let at = |address: &str| Listener {
            transport: Transport::Tcp,
            address: address.parse().unwrap(),
            port: 80,
        };
        let guest: IpAddr = "10.77.1.2".parse().unwrap();
        for (address, takes) in [
            ("0.0.0.0", true),
            ("::", true),
            ("10.77.1.2", true),
            ("::ffff:10.77.1.2", true),
            ("::ffff:0.0.0.0", true),
            ("127.0.0.1", false),
            ("::1", false),
            ("10.77.1.3", false),
        ] {
            assert_eq!(at(address).takes(guest), takes, "{address}");
        }
        assert!(!at("0.0.0.0").takes("fd00::1".parse().unwrap()));
    }

    #[test]
    fn any_answer_ends_without_panic() {
        let mut message = request(Transport::Tcp, libc::AF_INET, 7);
        for cut in 0..message.len() {
            let mut all = Vec::new();
            assert!(parse(&message[..cut], Transport::Tcp, 7, &mut all).is_err() || cut == 0);
        }
        for byte in 0..message.len() {
            for value in [0, 1, 2, 3, 10, 127, 255] {
                let before = std::mem::replace(&mut message[byte], value);
                drop(parse(&message, Transport::Udp, 7, &mut Vec::new()));
                message[byte] = before;
            }
        }
    }
}
