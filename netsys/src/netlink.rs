//! One netlink route socket, one request at a time.
//!
//! A request carries a fresh sequence number; answers with another number (of a
//! request that was given up) are skipped. Dumps that the kernel marks as
//! interrupted (`NLM_F_DUMP_INTR`: the table changed meanwhile) are asked again.
//!
//! Sources: `netlink(7)`, kernel `Documentation/userspace-api/netlink/intro.rst`.

use std::fmt;

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::{NetError, Netns, Object, Op};

/// Receive buffer: the kernel fills at most 32 KiB per dump message
/// (`netlink_dump`, min(max_recvmsg_len, 32 KiB)); twice that leaves room.
const RECV_BYTES: usize = 64 * 1024;
/// A dump is repeated at most this often when the table changes under it; then
/// the last answer is taken.
const DUMP_TRIES: u32 = 4;
/// `struct nlmsghdr`: 16 bytes before the attributes of an extended ack.
const NLMSGHDR_BYTES: usize = 16;
/// `NLMSGERR_ATTR_MSG` (`linux/netlink.h`): text of an extended ack.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// A connection to the network of one namespace.
///
/// It stays with the namespace in which it was opened, also when it is used
/// from a thread elsewhere.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl Netlink {
    /// Opens a connection to the namespace of the calling thread.
    ///
    /// # Errors
    /// As `socket(2)`: descriptors exhausted, or no netlink in the kernel.
    pub fn open() -> Result<Self, NetError> {
        let fail = |e| NetError::refused(Op::OpenNetlink, Object::None, e);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(fail)?;
        socket.bind_auto().map_err(fail)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(fail)?;
        // Both only make messages better: kernels before 4.12 lack them.
        let extras = socket.set_ext_ack(true).and_then(|()| socket.set_cap_ack(true));
        drop(extras);
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECV_BYTES) })
    }

    /// Opens a connection to `netns`.
    ///
    /// # Errors
    /// As [`Netlink::open`] and [`Netns::enter`].
    pub fn open_in(netns: &Netns) -> Result<Self, NetError> {
        let _inside = netns.enter()?;
        Self::open()
    }

    /// Sends a change and waits for its acknowledgement.
    pub(crate) fn change(
        &mut self,
        op: Op,
        object: &Object,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetError> {
        self.exchange(op, object, message, flags | NLM_F_ACK, &mut |_| {}).map(|_| ())
    }

    /// Asks for one object; `None` when the kernel acknowledges without one.
    pub(crate) fn one(
        &mut self,
        op: Op,
        object: &Object,
        message: RouteNetlinkMessage,
    ) -> Result<Option<RouteNetlinkMessage>, NetError> {
        let mut found = None;
        self.exchange(op, object, message, NLM_F_ACK, &mut |answer| found = Some(answer))?;
        Ok(found)
    }

    /// Asks for a whole table.
    pub(crate) fn dump(
        &mut self,
        op: Op,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetError> {
        let mut all = Vec::new();
        for _ in 0..DUMP_TRIES {
            all.clear();
            let whole =
                self.exchange(op, &Object::None, message.clone(), NLM_F_DUMP, &mut |m| {
                    all.push(m);
                })?;
            if whole {
                break;
            }
        }
        Ok(all)
    }

    /// Says whether the answer is whole (no dump was interrupted).
    fn exchange(
        &mut self,
        op: Op,
        object: &Object,
        message: RouteNetlinkMessage,
        flags: u16,
        each: &mut dyn FnMut(RouteNetlinkMessage),
    ) -> Result<bool, NetError> {
        let refused = |e| NetError::refused(op, object.clone(), e);
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map_err(refused)?;

        let mut whole = true;
        loop {
            self.buffer.clear();
            self.socket.recv(&mut self.buffer, 0).map_err(refused)?;
            let mut rest = self.buffer.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|source| NetError::Answer { op, object: object.clone(), source })?;
                // At least a header, so that each round consumes something.
                let length = usize::try_from(answer.header.length).unwrap_or(rest.len());
                let end = length.max(NLMSGHDR_BYTES).div_ceil(4).saturating_mul(4);
                rest = rest.get(end..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => each(inner),
                    NetlinkPayload::Done(_) => return Ok(whole),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(whole),
                    NetlinkPayload::Error(error) => {
                        let detail = kernel_words(&error);
                        let source = error.to_io();
                        return Err(NetError::Refused {
                            op,
                            object: object.clone(),
                            detail,
                            source,
                        });
                    }
                    NetlinkPayload::Noop => {}
                    _ => return Err(NetError::Unexpected { op, object: object.clone() }),
                }
            }
        }
    }
}

/// The text of an extended acknowledgement. With `NETLINK_CAP_ACK` the failed
/// request is echoed as its header alone, so the attributes follow at once.
fn kernel_words(error: &ErrorMessage) -> Option<Box<str>> {
    let attributes = error.header.get(NLMSGHDR_BYTES..)?;
    let text = NlasIterator::new(attributes)
        .filter_map(Result::ok)
        .find(|nla| nla.kind() == NLMSGERR_ATTR_MSG)?;
    let text = text.value();
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    Some(String::from_utf8_lossy(&text[..end]).into())
}
