//! Where the next pieces of a payload belong, so that they need not be copied there.
//!
//! ```text
//! piece, and the one behind it ─► plan: the next ones in that payload's memory ─► as planned
//!          ▲                                                                          │
//!          └───────── taken apart from the plan, as any other datagram ◄──────────────┘ not
//! ```
//!
//! Pieces of a payload follow one another, as long as each other, so a carrier that can put
//! what it receives in several places is given the payload's own memory for what will most
//! likely be payload. Only for packets in the clear: what is sealed is opened where it lies
//! and would have to be authentic before it is anywhere else.
//!
//! Invariants: the memory of a plan has nothing that has come, so whatever is written there
//! changes no payload; a packet counts as planned only if all that stands around its payload
//! is, bit for bit but for the number and its replay check; nothing else may be done with a
//! peer between a plan and its [`take`](Peer::take_planned).

use super::{MOST_PIECES, Peer, Tokens, Which};
use crate::session::packet::PARTS;
use crate::session::payload::{Data, UNIT};
use crate::time::Instant;
use conet_wire::session::frame::{CHUNK_OVERHEAD, Direction, Frame, Lane, SlotHead};
use conet_wire::session::{FLAG_BULK, FLAG_TRACKED, HEADER, Header, PacketKind, TAG};

/// What stands in front of a piece in its packet.
pub(crate) const FRONT: usize = PARTS - TAG;
/// Pieces shorter than that are copied sooner than laid out.
const LEAST: usize = 1024;
/// Most bytes that one plan is about: what one system call receives.
const MOST: usize = 65_536;

/// Which part of which payload.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Piece {
    pub(crate) head: SlotHead,
    pub(crate) direction: Direction,
    pub(crate) lane: Lane,
    pub(crate) offset: u32,
}

/// What is expected: pieces from this one on, each `length` bytes long but for one that ends
/// at `end`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Plan {
    piece: Piece,
    session: u32,
    pub(crate) length: usize,
    end: usize,
}

/// Bytes that the packets of a plan may have around their payloads, and one that is not as
/// planned anywhere.
pub const MOST_AROUND: usize = MOST + MOST_PIECES * PARTS;

impl Plan {
    /// Offset and length of the payload of the packet `n` behind the first.
    fn nth(&self, n: usize) -> Option<(usize, usize)> {
        let offset = (self.piece.offset as usize).checked_add(n.checked_mul(self.length)?)?;
        let length = self.end.checked_sub(offset)?.min(self.length);
        (length > 0).then_some((offset, length))
    }

    /// Whether what stands around the payload of packet `n`, which is `total` bytes long, is as
    /// planned; its header if so.
    pub(crate) fn fits(&self, n: usize, front: &[u8], total: usize) -> Option<Header> {
        let (offset, length) = self.nth(n)?;
        let Piece { head, direction, lane, .. } = self.piece;
        let offset = u32::try_from(offset).ok()?;
        let mut frame = [0; CHUNK_OVERHEAD];
        let chunk = Frame::Chunk { head, direction, lane, offset, data: &[] };
        chunk.emit_head(length, &mut frame).ok()?;
        let header = Header::parse(front).ok()?;
        let planned = Header {
            kind: PacketKind::Data,
            flags: FLAG_TRACKED | FLAG_BULK,
            session: self.session,
            number: header.number,
        };
        let fits =
            total == PARTS + length && header == planned && front.get(HEADER..) == Some(&frame[..]);
        fits.then_some(header)
    }
}

/// The last pieces that came.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The last one and its length.
    last: Option<(Piece, usize)>,
    /// It came behind the one before it.
    in_row: bool,
}

impl Places {
    /// Whether payloads that come are calls.
    pub(super) fn are_calls(&self) -> bool {
        self.last.is_some_and(|(piece, _)| piece.direction == Direction::Call)
    }

    fn on_piece(&mut self, piece: Piece, length: usize) {
        self.in_row = self.last.is_some_and(|(last, before)| {
            (last.head, last.direction) == (piece.head, piece.direction)
                && last.offset as usize + before == piece.offset as usize
        });
        self.last = Some((piece, length));
    }
}

impl Peer {
    /// Takes a piece of a payload; says whether it may be acknowledged.
    pub(super) fn on_piece(&mut self, now: Instant, piece: Piece, data: Data<'_>) -> bool {
        self.places.on_piece(piece, data.len());
        let Piece { head, direction, lane, offset } = piece;
        match direction {
            Direction::Call => {
                let taken = self.server.on_piece(head, lane, offset as usize, data);
                if self.server.is_short() || self.starved.is_some() {
                    self.on_short(now);
                }
                taken
            }
            Direction::Reply => self.client.on_piece(now, head, offset as usize, data),
        }
    }

    /// What is expected next, if that is likely enough.
    pub(crate) fn plan(&mut self) -> Option<(Plan, &mut [u8])> {
        let (last, length) = self.places.last.filter(|_| self.places.in_row)?;
        let keys = self.current.as_ref().filter(|keys| keys.opener.is_clear())?;
        if length < LEAST || !length.is_multiple_of(UNIT) {
            return None;
        }
        let offset = last.offset.checked_add(u32::try_from(length).ok()?)?;
        let piece = Piece { offset, ..last };
        let mut plan = Plan { piece, session: keys.local_index, length, end: 0 };
        plan.end = (offset as usize).checked_add(MOST.min(length * MOST_PIECES))?;
        let room = self.planned(&plan)?;
        plan.end = offset as usize + room.len();
        Some((plan, room))
    }

    /// The memory that a plan is about, up to where something has come or nothing may.
    pub(crate) fn planned(&mut self, plan: &Plan) -> Option<&mut [u8]> {
        let Piece { head, direction, offset, .. } = plan.piece;
        let most = plan.end - offset as usize;
        match direction {
            Direction::Call => self.server.place_of(head, offset as usize, most),
            Direction::Reply => self.client.place_of(head, offset as usize, most),
        }
    }

    /// Takes packet `n` of a plan, whose payload is where it belongs: it [fits](Plan::fits).
    pub(crate) fn take_planned(
        &mut self,
        now: Instant,
        plan: &Plan,
        n: usize,
        (header, tag): (Header, &[u8]),
        marked: bool,
        tokens: &mut Tokens,
    ) -> bool {
        let Some((offset, length)) = plan.nth(n) else { return false };
        let Some(keys) = self.current.as_mut() else { return false };
        if keys.local_index != plan.session {
            return false;
        }
        if let Err(error) = keys.opener.open_parts(header, tag) {
            self.on_closed(error);
            return false;
        }
        self.on_opened(now, PARTS + length, Which::Current);
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        let taken = self.on_piece(now, Piece { offset, ..plan.piece }, Data::InPlace(length));
        self.on_taken(now, header, taken, marked, false, tokens);
        true
    }
}
