//! Packets of one flow on their way into the device, joined into one write.
//!
//! Headers of the first packet are copied and changed, payloads are only pointed to.
//! What is joined are whole runs: the kernel can cut them into the same packets again.
//! The order within a flow is kept; flows may overtake each other.
//!
//! A checksum that holds for the joined packet is left to the kernel; so each packet's
//! own must be known to be right. Those that came through a tag or a checked outer
//! checksum are trusted (as Linux's WireGuard does: `decrypt_packet`,
//! CHECKSUM_UNNECESSARY); others are verified.

use std::ops::Range;

use conet_wire::ip::IpView;

use super::checksum::{Sum, is_right, pseudo};
use super::{
    ACK, HEADER, HEADERS_MAX, Header, NEEDS_CHECKSUM, PROTO_TCP, PROTO_UDP, PSH, TCP_HEADER,
    TCP_V4, TCP_V6, UDP, UDP_HEADER, put16, u16_at, u32_at,
};

/// Flows that are joined at a time; another one closes the oldest.
const GROUPS: usize = 16;
/// Most pieces of a write: one more vector is the header, and 64 is what GRO brings.
pub(super) const PIECES: usize = 64;

/// What is known of a packet that may be joined.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub(super) is_v6: bool,
    pub(super) is_tcp: bool,
    /// Where the transport header begins, and where it ends.
    pub(super) transport: usize,
    pub(super) headers: usize,
}

#[derive(Debug, Clone)]
struct Group {
    kind: Kind,
    head: [u8; HEADERS_MAX],
    /// Payload of each packet but the last.
    size: usize,
    /// Payload of all, and of how many.
    payload: usize,
    pieces: [Range<usize>; PIECES],
    count: usize,
    closed: bool,
}

/// One write to the device.
#[derive(Debug)]
pub(crate) struct Joined<'a> {
    /// The virtio-net header and the packet's headers; empty for a packet that is
    /// written as it is.
    pub(crate) head: &'a [u8],
    /// What follows, or the whole packet: ranges of the buffer.
    pub(crate) pieces: &'a [Range<usize>],
    /// Bytes of headers before each piece.
    pub(crate) headers: usize,
    /// Whether it is UDP; meaningless for a packet as it is.
    pub(crate) is_udp: bool,
}

/// Joins packets that lie in one buffer.
#[derive(Debug, Default)]
pub(crate) struct Joiner {
    groups: Vec<Group>,
}

/// Whom finished writes are given to.
type Emit<'a, E> = &'a mut dyn FnMut(Joined<'_>) -> Result<(), E>;

impl Joiner {
    /// Takes the packet at `at`. What is complete goes to `emit`. `tcp` and `udp` say
    /// what may be joined.
    pub(crate) fn push<E>(
        &mut self,
        buffer: &[u8],
        at: Range<usize>,
        trusted: bool,
        (tcp, udp): (bool, bool),
        emit: Emit<'_, E>,
    ) -> Result<(), E> {
        let packet = &buffer[at.clone()];
        let kind = Kind::of(packet).filter(|kind| if kind.is_tcp { tcp } else { udp });
        let Some(kind) = kind else { return emit(Joined::single(&at)) };
        let found = self.groups.iter().position(|group| group.is_flow(packet, kind));
        let joinable = kind.may_join(packet)
            && (trusted || is_right(packet, kind.is_v6, kind.protocol(), kind.transport));
        if let Some(index) = found {
            if joinable && self.groups[index].takes(packet, kind) {
                self.groups[index].add(packet, at, kind);
                return Ok(());
            }
            self.emit(index, emit)?;
        }
        if !joinable {
            return emit(Joined::single(&at));
        }
        if self.groups.len() == GROUPS {
            self.emit(0, emit)?;
        }
        self.groups.push(Group::new(packet, at, kind));
        Ok(())
    }

    /// Gives out what has waited.
    pub(crate) fn finish<E>(&mut self, emit: Emit<'_, E>) -> Result<(), E> {
        while !self.groups.is_empty() {
            self.emit(0, emit)?;
        }
        Ok(())
    }

    fn emit<E>(&mut self, index: usize, emit: Emit<'_, E>) -> Result<(), E> {
        let group = self.groups.remove(index);
        group.emit(emit)
    }
}

impl<'a> Joined<'a> {
    fn single(at: &'a Range<usize>) -> Self {
        Self { head: &[], pieces: std::slice::from_ref(at), headers: 0, is_udp: false }
    }
}

impl Kind {
    /// TCP or UDP directly behind an IP header without options, in one piece.
    pub(super) fn of(packet: &[u8]) -> Option<Self> {
        let view = IpView::new(packet).ok()?;
        let is_v6 = view.is_v6();
        let transport = if is_v6 { 40 } else { 20 };
        if view.header_len() != transport || view.is_fragment() {
            return None;
        }
        let own = &packet[transport..];
        let is_tcp = match view.protocol() {
            PROTO_TCP => true,
            PROTO_UDP => false,
            _ => return None,
        };
        let minimum = if is_tcp { TCP_HEADER } else { UDP_HEADER };
        if own.len() < minimum {
            return None;
        }
        let len = if is_tcp { usize::from(own[12] >> 4) * 4 } else { UDP_HEADER };
        let fits = len >= minimum && own.len() >= len;
        fits.then_some(Self { is_v6, is_tcp, transport, headers: transport + len })
    }

    pub(super) fn protocol(self) -> u8 {
        if self.is_tcp { PROTO_TCP } else { PROTO_UDP }
    }

    /// Whether the packet says nothing that a joined one could not say.
    fn may_join(self, packet: &[u8]) -> bool {
        let own = &packet[self.transport..];
        let has_payload = packet.len() > self.headers;
        if self.is_tcp {
            has_payload && own[13] & !PSH == ACK
        } else {
            has_payload && usize::from(u16_at(own, 4)) == own.len() && u16_at(own, 6) != 0
        }
    }
}

impl Group {
    fn new(packet: &[u8], at: Range<usize>, kind: Kind) -> Self {
        let mut head = [0; HEADERS_MAX];
        head[..kind.headers].copy_from_slice(&packet[..kind.headers]);
        let mut group = Self {
            kind,
            head,
            size: packet.len() - kind.headers,
            payload: 0,
            pieces: [const { 0..0 }; PIECES],
            count: 0,
            closed: false,
        };
        group.add(packet, at, kind);
        group
    }

    /// Same addresses, same ports, same protocol.
    fn is_flow(&self, packet: &[u8], kind: Kind) -> bool {
        let addresses = if kind.is_v6 { 8..40 } else { 12..20 };
        let at = kind.transport;
        self.kind.is_v6 == kind.is_v6
            && self.kind.is_tcp == kind.is_tcp
            && self.head[at..at + 4] == packet[at..at + 4]
            && self.head[addresses.clone()] == packet[addresses]
    }

    /// Whether a packet of the flow continues the run.
    fn takes(&self, packet: &[u8], kind: Kind) -> bool {
        let payload = packet.len() - kind.headers;
        let at = kind.transport;
        if self.closed
            || self.count == PIECES
            || kind.headers != self.kind.headers
            || payload > self.size
            || kind.headers + self.payload + payload > usize::from(u16::MAX)
        {
            return false;
        }
        let same = |range: Range<usize>| self.head[range.clone()] == packet[range];
        let same_ip = if kind.is_v6 {
            // Version, class, flow label; next header, hops.
            same(0..4) && same(6..8)
        } else {
            let counted =
                u16_at(&self.head, 4).wrapping_add(u16::try_from(self.count).unwrap_or(0));
            // DF makes identifications meaningless (RFC 6864 §4.1).
            let dont_fragment = packet[6] & 0x40 != 0;
            same(0..2) && same(6..10) && (dont_fragment || u16_at(packet, 4) == counted)
        };
        if !kind.is_tcp {
            return same_ip;
        }
        let expected = u32_at(&self.head, at + 4)
            .wrapping_add(u32::try_from(self.payload).unwrap_or(u32::MAX));
        // Acknowledgement, offset; window; urgent pointer and options.
        same_ip
            && u32_at(packet, at + 4) == expected
            && same(at + 8..at + 13)
            && same(at + 14..at + 16)
            && same(at + 18..kind.headers)
    }

    fn add(&mut self, packet: &[u8], at: Range<usize>, kind: Kind) {
        let payload = packet.len() - kind.headers;
        self.pieces[self.count] = at.start + kind.headers..at.end;
        self.count += 1;
        self.payload += payload;
        self.closed |= payload < self.size;
        if kind.is_tcp && packet[kind.transport + 13] & PSH != 0 {
            self.head[kind.transport + 13] |= PSH;
            self.closed = true;
        }
    }

    fn emit<E>(mut self, emit: Emit<'_, E>) -> Result<(), E> {
        let Kind { is_v6, is_tcp, transport, headers } = self.kind;
        if self.count == 1 {
            let at = self.pieces[0].start - headers..self.pieces[0].end;
            return emit(Joined::single(&at));
        }
        // Within 16 bits: checked as each packet was taken.
        let total = u16::try_from(headers + self.payload).unwrap_or(u16::MAX);
        let own_len = total - u16::try_from(transport).unwrap_or(0);
        let head = &mut self.head[..headers];
        if is_v6 {
            put16(head, 4, own_len);
        } else {
            put16(head, 2, total);
            put16(head, 10, 0);
            let sum = Sum::default().add(&head[..transport]).finish();
            put16(head, 10, sum);
        }
        if !is_tcp {
            put16(head, transport + 4, own_len);
        }
        let at = if is_tcp { 16 } else { 6 };
        let sum = pseudo(head, is_v6, self.kind.protocol(), own_len).folded();
        put16(head, transport + at, sum);
        let small = |len: usize| u16::try_from(len).unwrap_or(u16::MAX);
        let header = Header {
            flags: NEEDS_CHECKSUM,
            kind: match (is_tcp, is_v6) {
                (true, false) => TCP_V4,
                (true, true) => TCP_V6,
                (false, _) => UDP,
            },
            header_len: small(headers),
            size: small(self.size),
            checksum_from: small(transport),
            checksum_at: small(at),
        };
        let mut bytes = [0; HEADER + HEADERS_MAX];
        bytes[..HEADER].copy_from_slice(&header.emit());
        bytes[HEADER..HEADER + headers].copy_from_slice(head);
        emit(Joined {
            head: &bytes[..HEADER + headers],
            pieces: &self.pieces[..self.count],
            headers,
            is_udp: !is_tcp,
        })
    }
}
