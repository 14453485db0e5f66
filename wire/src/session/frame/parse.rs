//! Reading frames out of an opened packet.

use super::{
    ACK, Ack, BULK, CALL, CANCEL, CHALLENGE, CHUNK, CLOSE, Direction, FRAME_HEADER, Frame, GRANT,
    Lane, MARKED, MUST_KNOW, Marks, PING, PONG, PROOF, RELEASE, REPLY, SEEN, SLOT_HEAD, SLOTS,
    SeenFrame, SlotHead, Status, THERE, WHERE, WORKING,
};
use crate::session::moved::parse_place;

/// Why a payload is not a row of frames; the peer's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FrameError {
    /// A frame ends behind the packet, or its body is shorter than its type needs.
    #[error("frame is cut short")]
    Truncated,
    /// A frame of a type without data has bytes left over.
    #[error("frame of type {0} is too long")]
    TooLong(u8),
    /// An unknown type that must not be skipped.
    #[error("frame of unknown type {0} must not be skipped")]
    Unknown(u8),
    /// Bits set that must be zero.
    #[error("reserved frame bits are set")]
    ReservedBits,
    /// A field has a value outside its range.
    #[error("field of a frame of type {0} is out of range")]
    Range(u8),
    /// Data reaches behind the payload's total length.
    #[error("data reaches behind the end of the payload")]
    BehindEnd,
}

/// The frames of one packet, in order; ends after the first error.
#[derive(Clone, Debug)]
pub struct Frames<'a> {
    rest: &'a [u8],
}

impl<'a> Frames<'a> {
    /// Over an opened packet's payload.
    #[must_use]
    pub const fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    /// The next frame's data and heads where it is one of those that make up nearly all
    /// packets; otherwise, or where it is damaged, the iterator has it next.
    ///
    /// Plain fields: a [`Frame`] is put together and taken apart again, which for a call of 64
    /// bytes costs as much as the rest of its way through a packet.
    #[inline(always)]
    pub fn next_message(&mut self) -> Option<Message<'a>> {
        let (head, rest) = self.rest.split_first_chunk::<{ FRAME_HEADER + SLOT_HEAD }>()?;
        let [first, second, sequence] = words(head);
        let [kind, MUST_KNOW, 0, 0, ..] = first.to_le_bytes() else { return None };
        let length = usize::try_from(first >> 32).ok()?.checked_sub(SLOT_HEAD)?;
        let (body, rest) = rest.split_at_checked(length)?;
        let [s0, s1, t0, t1, l0, l1, l2, l3] = second.to_le_bytes();
        let (slot, tag) = (u16::from_le_bytes([s0, s1]), u16::from_le_bytes([t0, t1]));
        let total = u32::from_le_bytes([l0, l1, l2, l3]);
        let head = SlotHead { slot, sequence, total };
        let (what, data) = match kind {
            CALL if tag == 0 => (Says::Call(Marks::default()), body),
            REPLY => (Says::Reply(Status::from_wire(tag)?), body),
            MARKED => {
                let (after, data) = body.split_first_chunk::<SLOT_HEAD>()?;
                let [slot, sequence] = words(after);
                let marks = Marks::from_wire(tag, u16::try_from(slot).ok()?, sequence)?;
                (Says::Call(marks), data)
            }
            _ => return None,
        };
        if data.len() > total as usize {
            return None;
        }
        self.rest = rest;
        Some(Message { head, what, data })
    }

    #[inline(always)]
    fn step(&mut self) -> Result<Option<Frame<'a>>, FrameError> {
        while !self.rest.is_empty() {
            let mut reader = Reader { rest: self.rest };
            // A packet that ends within the first half of a frame's header is as short as one
            // that ends within the second.
            let [kind, flags, z0, z1, l0, l1, l2, l3] = reader.take()?;
            if flags & !MUST_KNOW != 0 || [z0, z1] != [0, 0] {
                return Err(FrameError::ReservedBits);
            }
            let length = u32::from_le_bytes([l0, l1, l2, l3]);
            let length = usize::try_from(length).map_err(|_| FrameError::Truncated)?;
            let Some((body, rest)) = reader.rest.split_at_checked(length) else {
                return Err(FrameError::Truncated);
            };
            self.rest = rest;
            if let Some(frame) = parse_body(kind, body)? {
                return Ok(Some(frame));
            }
            if flags & MUST_KNOW != 0 {
                return Err(FrameError::Unknown(kind));
            }
        }
        Ok(None)
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>, FrameError>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            self.rest = &[];
        }
        step.transpose()
    }
}

/// What [`Frames::next_message`] gives.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Message<'a> {
    /// Which call.
    pub head: SlotHead,
    /// What of it this is.
    pub what: Says,
    /// Payload from offset 0; shorter than `head.total` if CHUNKs follow.
    pub data: &'a [u8],
}

/// What a [`Message`] is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Says {
    /// A CALL or MARKED: run this.
    Call(Marks),
    /// A REPLY: it has ended.
    Reply(Status),
}

/// Little-endian words.
#[inline(always)]
fn words<const BYTES: usize, const WORDS: usize>(bytes: &[u8; BYTES]) -> [u64; WORDS] {
    const { assert!(BYTES == 8 * WORDS) };
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    words
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn borrow<const N: usize>(&mut self) -> Result<&'a [u8; N], FrameError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(FrameError::Truncated)?;
        self.rest = rest;
        Ok(head)
    }

    #[inline]
    fn take<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let Some((head, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(FrameError::Truncated);
        };
        self.rest = rest;
        Ok(*head)
    }

    #[inline]
    fn u16(&mut self) -> Result<u16, FrameError> {
        self.take().map(u16::from_le_bytes)
    }

    #[inline]
    fn u32(&mut self) -> Result<u32, FrameError> {
        self.take().map(u32::from_le_bytes)
    }

    #[inline]
    fn u64(&mut self) -> Result<u64, FrameError> {
        self.take().map(u64::from_le_bytes)
    }

    #[inline(always)]
    fn slot_head(&mut self) -> Result<(SlotHead, u16), FrameError> {
        let [s0, s1, t0, t1, l0, l1, l2, l3, n0, n1, n2, n3, n4, n5, n6, n7] = self.take()?;
        let slot = u16::from_le_bytes([s0, s1]);
        let tag = u16::from_le_bytes([t0, t1]);
        let total = u32::from_le_bytes([l0, l1, l2, l3]);
        let sequence = u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]);
        Ok((SlotHead { slot, sequence, total }, tag))
    }

    fn zero_u32(&mut self) -> Result<(), FrameError> {
        if self.u32()? == 0 { Ok(()) } else { Err(FrameError::ReservedBits) }
    }

    const fn end(&self, kind: u8) -> Result<(), FrameError> {
        if self.rest.is_empty() { Ok(()) } else { Err(FrameError::TooLong(kind)) }
    }
}

#[inline]
fn within(head: SlotHead, offset: u32, data: &[u8]) -> Result<(), FrameError> {
    let length = u32::try_from(data.len()).map_err(|_| FrameError::BehindEnd)?;
    match offset.checked_add(length) {
        Some(end) if end <= head.total => Ok(()),
        _ => Err(FrameError::BehindEnd),
    }
}

/// The frame in `body`, or `None` for a type that is not known.
#[inline(always)]
fn parse_body(kind: u8, body: &[u8]) -> Result<Option<Frame<'_>>, FrameError> {
    let mut r = Reader { rest: body };
    match kind {
        CALL => {
            let (head, tag) = r.slot_head()?;
            if tag != 0 {
                return Err(FrameError::ReservedBits);
            }
            within(head, 0, r.rest)?;
            Ok(Some(Frame::Call { head, data: r.rest }))
        }
        REPLY => {
            let (head, tag) = r.slot_head()?;
            let status = Status::from_wire(tag).ok_or(FrameError::Range(kind))?;
            within(head, 0, r.rest)?;
            Ok(Some(Frame::Reply { head, status, data: r.rest }))
        }
        CHUNK => {
            let (head, tag) = r.slot_head()?;
            let direction = Direction::from_wire(tag & 0xff).ok_or(FrameError::Range(kind))?;
            if tag >> 10 != 0 {
                return Err(FrameError::ReservedBits);
            }
            let lane = Lane::from_wire(tag >> 8);
            let offset = r.u32()?;
            r.zero_u32()?;
            within(head, offset, r.rest)?;
            Ok(Some(Frame::Chunk { head, direction, lane, offset, data: r.rest }))
        }
        MARKED => {
            let (head, marks) = parse_marked(&mut r)?;
            Ok(Some(Frame::Marked { head, marks, data: r.rest }))
        }
        _ => parse_rare(kind, body),
    }
}

/// Frames that come beside calls; apart, so that what every call does is close together.
#[inline(never)]
fn parse_rare(kind: u8, body: &[u8]) -> Result<Option<Frame<'_>>, FrameError> {
    let mut r = Reader { rest: body };
    let frame = match kind {
        WORKING | CANCEL => {
            let (head, tag) = r.slot_head()?;
            if tag != 0 || head.total != 0 {
                return Err(FrameError::ReservedBits);
            }
            let SlotHead { slot, sequence, .. } = head;
            if kind == WORKING {
                Frame::Working { slot, sequence }
            } else {
                Frame::Cancel { slot, sequence }
            }
        }
        ACK => {
            let largest = r.u64()?;
            let delay_us = r.u32()?;
            r.zero_u32()?;
            let bitmap = [r.u64()?, r.u64()?, r.u64()?, r.u64()?];
            Frame::Ack(Ack { largest, delay_us, bitmap })
        }
        PING => Frame::Ping { token: r.u64()? },
        PONG => Frame::Pong { token: r.u64()? },
        CLOSE => {
            let reason = r.u32()?;
            r.zero_u32()?;
            Frame::Close { reason }
        }
        _ => match parse_of_lanes(kind, &mut r)? {
            Some(frame) => frame,
            None => return Ok(None),
        },
    };
    r.end(kind)?;
    Ok(Some(frame))
}

#[inline(always)]
fn parse_marked(r: &mut Reader<'_>) -> Result<(SlotHead, Marks), FrameError> {
    let (head, tag) = r.slot_head()?;
    let (after, zero) = r.slot_head()?;
    if zero != 0 || after.total != 0 {
        return Err(FrameError::ReservedBits);
    }
    let marks = Marks::from_wire(tag, after.slot, after.sequence);
    let marks = marks.ok_or(FrameError::Range(MARKED))?;
    within(head, 0, r.rest)?;
    Ok((head, marks))
}

/// The frames of fixed length that came with `FEATURE_LANES` and later.
fn parse_of_lanes<'a>(kind: u8, r: &mut Reader<'a>) -> Result<Option<Frame<'a>>, FrameError> {
    Ok(Some(match kind {
        GRANT => {
            let (head, tag) = r.slot_head()?;
            let direction = Direction::from_wire(tag).ok_or(FrameError::Range(kind))?;
            let SlotHead { slot, sequence, total } = head;
            Frame::Grant { slot, sequence, direction, upto: total }
        }
        SLOTS => Frame::Slots { version: r.u32()?, count: r.u32()? },
        RELEASE => Frame::Release { version: r.u32()?, count: r.u32()?, floor: r.u64()? },
        CHALLENGE => Frame::Challenge { token: r.u64()? },
        PROOF => Frame::Proof { token: r.u64()? },
        BULK => {
            let (port, zero) = (r.u16()?, r.u16()?);
            if zero != 0 {
                return Err(FrameError::ReservedBits);
            }
            Frame::Bulk { port, buffer: r.u32()? }
        }
        SEEN => {
            let (largest, delay_us, marked) = (r.u64()?, r.u32()?, r.u32()?);
            Frame::Seen(SeenFrame { largest, delay_us, marked, bitmap: r.borrow()? })
        }
        WHERE => Frame::Where { key: r.borrow()? },
        THERE => {
            let key = r.borrow()?;
            let address = parse_place(&r.take()?).ok_or(FrameError::Range(kind))?;
            Frame::There { key, address }
        }
        _ => return Ok(None),
    }))
}
