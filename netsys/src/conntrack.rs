//! The kernel's table of connections, as far as it must forget some.
//!
//! Rules that translate addresses are asked once for each connection. UDP has no
//! beginning, so a sender that goes on sending would follow the rules of its first
//! packet for ever, however they change; forgetting its entry has them asked again.
//!
//! Sources: `linux/netfilter/nfnetlink_conntrack.h`, `conntrack(8)`. Least kernel: 2.6.18,
//! with `CONFIG_NF_CT_NETLINK`.

use std::fmt;
use std::io;
use std::net::Ipv4Addr;

use netlink_packet_core::NlasIterator;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::{NetError, Object, Op, Transport};

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NFNL_SUBSYS_CTNETLINK << 8` with `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE`.
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;
const HEADER_BYTES: usize = 16;
/// `struct nfgenmsg`.
const FAMILY_BYTES: usize = 4;
const RECV_BYTES: usize = 64 * 1024;
/// `CTA_TUPLE_ORIG`, with what nests in it; bit 15 says that it nests.
const TUPLE_ORIG: u16 = 1;
const KIND_MASK: u16 = 0x3fff;
const NESTED: u16 = 0x8000;

/// A connection as its first packet had it, before any translation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Connection {
    /// The number of its protocol.
    pub protocol: u8,
    /// Whither.
    pub destination: Ipv4Addr,
    /// Its destination port; 0 where the protocol has none.
    pub port: u16,
}

/// The connections of one namespace.
pub struct Conntrack {
    socket: Socket,
    sequence: u32,
}

impl fmt::Debug for Conntrack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conntrack").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl Conntrack {
    /// Opens the namespace of the calling thread.
    ///
    /// # Errors
    /// As `socket(2)`: descriptors exhausted, or no netfilter in the kernel.
    pub fn open() -> Result<Self, NetError> {
        let fail = |e| NetError::refused(Op::OpenNetlink, Object::None, e);
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(fail)?;
        socket.bind_auto().map_err(fail)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(fail)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Forgets the IPv4 connections of `transport` that are `chosen`; says how many.
    ///
    /// # Errors
    /// As the kernel refuses: no CAP_NET_ADMIN, no ctnetlink.
    pub fn forget(
        &mut self,
        transport: Transport,
        chosen: impl Fn(Connection) -> bool,
    ) -> Result<usize, NetError> {
        let fail = |e| NetError::refused(Op::ForgetConnections, Object::None, e);
        let mut tuples = Vec::new();
        self.exchange(GET, NLM_F_DUMP, &[], |message| {
            let found = connection(message)
                .filter(|(found, _)| found.protocol == transport.number() && chosen(*found));
            tuples.extend(found.map(|(_, tuple)| tuple.to_vec()));
        })
        .map_err(fail)?;
        let mut forgotten = 0;
        for tuple in tuples {
            match self.exchange(DELETE, NLM_F_ACK, &tuple, |_| {}) {
                Ok(()) => forgotten += 1,
                // It has ended by itself meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(fail(error)),
            }
        }
        Ok(forgotten)
    }

    /// Sends a request about IPv4 with a tuple, if any, and takes what is answered.
    fn exchange(
        &mut self,
        kind: u16,
        flags: u16,
        tuple: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&request(kind, flags, self.sequence, tuple), 0)?;
        let mut buffer = Vec::with_capacity(RECV_BYTES);
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            let mut bytes = buffer.as_slice();
            while !bytes.is_empty() {
                let (header, _) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(broken)?;
                let &[l0, l1, l2, l3, t0, t1, _, _, s0, s1, s2, s3, ..] = header;
                let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
                let message = bytes.get(HEADER_BYTES..length).ok_or_else(broken)?;
                bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
                if u32::from_ne_bytes([s0, s1, s2, s3]) != self.sequence {
                    continue;
                }
                match u16::from_ne_bytes([t0, t1]) {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let error = message.first_chunk().map(|error| i32::from_ne_bytes(*error));
                        return match error.ok_or_else(broken)? {
                            0 => Ok(()),
                            error => Err(io::Error::from_raw_os_error(error.saturating_neg())),
                        };
                    }
                    _ => each(message),
                }
            }
        }
    }
}

fn broken() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADMSG)
}

fn request(kind: u16, flags: u16, sequence: u32, tuple: &[u8]) -> Vec<u8> {
    let attribute = if tuple.is_empty() { 0 } else { 4 + tuple.len() };
    let length = HEADER_BYTES + FAMILY_BYTES + attribute;
    let mut bytes = Vec::with_capacity(length);
    bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    // AF_INET.
    bytes.extend([2, 0, 0, 0]);
    if attribute > 0 {
        bytes.extend(u16::try_from(attribute).unwrap_or(u16::MAX).to_ne_bytes());
        bytes.extend((TUPLE_ORIG | NESTED).to_ne_bytes());
        bytes.extend_from_slice(tuple);
    }
    bytes
}

/// The first of the attributes of a kind.
fn attribute(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    for nla in NlasIterator::new(attributes) {
        // What cannot be read ends the search.
        let nla = nla.ok()?;
        if nla.kind() & KIND_MASK == kind {
            let start = nla.value().as_ptr().addr().checked_sub(attributes.as_ptr().addr())?;
            return attributes.get(start..start + nla.value().len());
        }
    }
    None
}

/// A connection, and the bytes of its first tuple, which name it.
fn connection(message: &[u8]) -> Option<(Connection, &[u8])> {
    let tuple = attribute(message.get(FAMILY_BYTES..)?, TUPLE_ORIG)?;
    // CTA_TUPLE_IP with CTA_IP_V4_DST, CTA_TUPLE_PROTO with CTA_PROTO_NUM, _DST_PORT.
    let destination = attribute(attribute(tuple, 1)?, 2)?;
    let protocol = attribute(tuple, 2)?;
    let port = attribute(protocol, 3).and_then(<[u8]>::first_chunk);
    let found = Connection {
        protocol: *attribute(protocol, 1)?.first()?,
        destination: Ipv4Addr::from(*destination.first_chunk::<4>()?),
        port: port.map_or(0, |port| u16::from_be_bytes(*port)),
    };
    Some((found, tuple))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UDP connection to 192.0.2.1:53, as the kernel tells it (the rest cut).
    const MESSAGE: [u8; 56] = [
        2, 0, 0, 0, // nfgenmsg
        52, 0, 1, 0x80, // CTA_TUPLE_ORIG
        20, 0, 1, 0x80, 8, 0, 1, 0, 192, 0, 2, 9, 8, 0, 2, 0, 192, 0, 2, 1, // IP
        28, 0, 2, 0x80, 5, 0, 1, 0, 17, 0, 0, 0, 6, 0, 2, 0, 200, 0, 0, 0, 6, 0, 3, 0, 0, 53, 0,
        0, // PROTO
    ];

    #[test]
    fn a_connection_is_read_and_named() {
        let (found, tuple) = connection(&MESSAGE).unwrap();
        let destination = Ipv4Addr::new(192, 0, 2, 1);
        assert_eq!(found, Connection { protocol: 17, destination, port: 53 });
        assert_eq!(tuple, &MESSAGE[8..]);
        assert_eq!(request(DELETE, 4, 1, tuple)[16..], MESSAGE);
    }

    #[test]
    fn any_answer_ends_without_panic() {
        let mut message = MESSAGE;
        for byte in 0..message.len() {
            assert!(connection(&message[..byte]).is_none());
            for value in 0..=255 {
                let before = std::mem::replace(&mut message[byte], value);
                std::hint::black_box(connection(&message));
                message[byte] = before;
            }
        }
    }
}
