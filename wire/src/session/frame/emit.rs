//! Writing frames into a packet buffer.
//!
//! [`Frame::emit`] writes all of a frame; [`Frame::emit_head`] writes the part in
//! front of the data, for callers that gather the data from elsewhere (a
//! program's memory) straight into the packet.

use super::{
    ACK, BULK, CALL, CANCEL, CHALLENGE, CHUNK, CLOSE, FRAME_HEADER, Frame, GRANT, KEY, MARKED,
    MUST_KNOW, PADDING, PING, PONG, PROOF, RELEASE, REPLY, SEEN, SEEN_BYTES, SLOT_HEAD, SLOTS,
    SlotHead, THERE, WHERE, WORKING,
};
use crate::session::moved::{PLACE, emit_place};

/// The buffer is too short for the frame, or the frame too long for its length
/// field; the caller's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("frame does not fit the packet")]
pub struct NoRoom;

/// Writes fields one after the other; every write is bounds-checked.
struct Cursor<'b> {
    buf: &'b mut [u8],
    at: usize,
}

impl Cursor<'_> {
    #[inline]
    fn put(&mut self, bytes: &[u8]) -> Result<(), NoRoom> {
        let end = self.at.checked_add(bytes.len()).ok_or(NoRoom)?;
        self.buf.get_mut(self.at..end).ok_or(NoRoom)?.copy_from_slice(bytes);
        self.at = end;
        Ok(())
    }

    fn zeros(&mut self, length: usize) -> Result<(), NoRoom> {
        let end = self.at.checked_add(length).ok_or(NoRoom)?;
        self.buf.get_mut(self.at..end).ok_or(NoRoom)?.fill(0);
        self.at = end;
        Ok(())
    }

    #[inline]
    fn slot_head(&mut self, head: SlotHead, tag: u16) -> Result<(), NoRoom> {
        let [s0, s1] = head.slot.to_le_bytes();
        let [t0, t1] = tag.to_le_bytes();
        let [l0, l1, l2, l3] = head.total.to_le_bytes();
        let [n0, n1, n2, n3, n4, n5, n6, n7] = head.sequence.to_le_bytes();
        self.put(&[s0, s1, t0, t1, l0, l1, l2, l3, n0, n1, n2, n3, n4, n5, n6, n7])
    }
}

const fn bare(slot: u16, sequence: u64) -> SlotHead {
    SlotHead { slot, sequence, total: 0 }
}

/// A slot head as two little-endian words.
#[inline]
const fn words_of(head: SlotHead, tag: u16) -> [u64; 2] {
    [head.slot as u64 | (tag as u64) << 16 | (head.total as u64) << 32, head.sequence]
}

/// Writes a frame of `fixed` words and data.
#[inline(always)]
fn put_message<const N: usize>(
    buf: &mut [u8],
    kind: u8,
    fixed: [u64; N],
    data: &[u8],
) -> Result<usize, NoRoom> {
    let length = FRAME_HEADER + 8 * N + data.len();
    let body = u32::try_from(length - FRAME_HEADER).map_err(|_| NoRoom)?;
    let (head, rest) = buf
        .get_mut(..length)
        .ok_or(NoRoom)?
        .split_at_mut_checked(length - data.len())
        .ok_or(NoRoom)?;
    let first = u64::from(kind) | u64::from(MUST_KNOW) << 8 | u64::from(body) << 32;
    let words = head.as_chunks_mut::<8>().0;
    for (to, word) in words.iter_mut().zip([first].into_iter().chain(fixed)) {
        *to = word.to_le_bytes();
    }
    rest.copy_from_slice(data);
    Ok(length)
}

impl Frame<'_> {
    const fn data(&self) -> &[u8] {
        match self {
            Self::Call { data, .. }
            | Self::Reply { data, .. }
            | Self::Chunk { data, .. }
            | Self::Marked { data, .. } => data,
            _ => &[],
        }
    }

    const fn fixed(&self) -> usize {
        match self {
            Self::Call { .. }
            | Self::Reply { .. }
            | Self::Working { .. }
            | Self::Cancel { .. }
            | Self::Grant { .. }
            | Self::Release { .. } => SLOT_HEAD,
            Self::Marked { .. } => SLOT_HEAD + 16,
            Self::Chunk { .. } => SLOT_HEAD + 8,
            Self::Ack(_) => 48,
            Self::Seen(_) => 16 + SEEN_BYTES,
            Self::Ping { .. }
            | Self::Pong { .. }
            | Self::Close { .. }
            | Self::Slots { .. }
            | Self::Challenge { .. }
            | Self::Bulk { .. }
            | Self::Proof { .. } => 8,
            Self::Padding { length } => *length as usize,
            Self::Where { .. } => KEY,
            Self::There { .. } => KEY + PLACE,
        }
    }

    const fn type_and_flags(&self) -> [u8; 2] {
        match self {
            Self::Call { .. } => [CALL, MUST_KNOW],
            Self::Reply { .. } => [REPLY, MUST_KNOW],
            Self::Working { .. } => [WORKING, MUST_KNOW],
            Self::Cancel { .. } => [CANCEL, MUST_KNOW],
            Self::Chunk { .. } => [CHUNK, MUST_KNOW],
            Self::Ack(_) => [ACK, MUST_KNOW],
            Self::Ping { .. } => [PING, MUST_KNOW],
            Self::Pong { .. } => [PONG, 0],
            Self::Close { .. } => [CLOSE, MUST_KNOW],
            Self::Marked { .. } => [MARKED, MUST_KNOW],
            Self::Grant { .. } => [GRANT, MUST_KNOW],
            Self::Slots { .. } => [SLOTS, MUST_KNOW],
            Self::Release { .. } => [RELEASE, MUST_KNOW],
            Self::Challenge { .. } => [CHALLENGE, MUST_KNOW],
            Self::Proof { .. } => [PROOF, MUST_KNOW],
            Self::Seen(_) => [SEEN, MUST_KNOW],
            Self::Bulk { .. } => [BULK, 0],
            Self::Padding { .. } => [PADDING, 0],
            Self::Where { .. } => [WHERE, 0],
            Self::There { .. } => [THERE, 0],
        }
    }

    /// Bytes that [`emit`](Self::emit) writes.
    #[must_use]
    pub const fn wire_len(&self) -> usize {
        FRAME_HEADER + self.fixed() + self.data().len()
    }

    /// Writes the frame to the front of `buf` and says how long it is.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if `buf` is too short; `buf` is then partly written.
    #[inline(always)]
    pub fn emit(&self, buf: &mut [u8]) -> Result<usize, NoRoom> {
        match *self {
            // These three are every call, so each is a few words and a copy.
            Self::Call { head, data } => put_message(buf, CALL, words_of(head, 0), data),
            Self::Reply { head, status, data } => {
                put_message(buf, REPLY, words_of(head, status.to_wire()), data)
            }
            Self::Marked { head, marks, data } => {
                let (tag, slot, sequence) = marks.to_wire();
                let ([a, b], [c, d]) = (words_of(head, tag), words_of(bare(slot, sequence), 0));
                put_message(buf, MARKED, [a, b, c, d], data)
            }
            _ => self.emit_other(buf),
        }
    }

    #[inline(never)]
    fn emit_other(&self, buf: &mut [u8]) -> Result<usize, NoRoom> {
        let data = self.data();
        let head = self.emit_head(data.len(), buf)?;
        let mut cursor = Cursor { buf, at: head };
        cursor.put(data)?;
        Ok(cursor.at)
    }

    /// Writes everything in front of the data, for `data_len` bytes that the caller
    /// puts behind it, and says where they go. The frame's own `data` is not used.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if the head does not fit `buf`, or `data_len` no length field.
    #[inline]
    pub fn emit_head(&self, data_len: usize, buf: &mut [u8]) -> Result<usize, NoRoom> {
        let body = self.fixed().checked_add(data_len).ok_or(NoRoom)?;
        let body = u32::try_from(body).map_err(|_| NoRoom)?;
        let mut cursor = Cursor { buf, at: 0 };
        let ([kind, flags], [l0, l1, l2, l3]) = (self.type_and_flags(), body.to_le_bytes());
        cursor.put(&[kind, flags, 0, 0, l0, l1, l2, l3])?;
        self.put_fixed(&mut cursor)?;
        Ok(cursor.at)
    }

    #[inline]
    fn put_fixed(&self, cursor: &mut Cursor<'_>) -> Result<(), NoRoom> {
        match *self {
            Self::Call { head, .. } => cursor.slot_head(head, 0)?,
            Self::Reply { head, status, .. } => cursor.slot_head(head, status.to_wire())?,
            Self::Working { slot, sequence } | Self::Cancel { slot, sequence } => {
                cursor.slot_head(bare(slot, sequence), 0)?;
            }
            Self::Chunk { head, direction, lane, offset, .. } => {
                cursor.slot_head(head, direction.to_wire() | lane.to_wire() << 8)?;
                cursor.put(&offset.to_le_bytes())?;
                cursor.put(&[0; 4])?;
            }
            Self::Ack(ack) => {
                cursor.put(&ack.largest.to_le_bytes())?;
                cursor.put(&ack.delay_us.to_le_bytes())?;
                cursor.put(&[0; 4])?;
                for word in ack.bitmap {
                    cursor.put(&word.to_le_bytes())?;
                }
            }
            Self::Seen(seen) => {
                cursor.put(&seen.largest.to_le_bytes())?;
                cursor.put(&seen.delay_us.to_le_bytes())?;
                cursor.put(&seen.marked.to_le_bytes())?;
                cursor.put(seen.bitmap)?;
            }
            Self::Ping { token }
            | Self::Pong { token }
            | Self::Challenge { token }
            | Self::Proof { token } => cursor.put(&token.to_le_bytes())?,
            Self::Marked { head, marks, .. } => {
                let (tag, slot, sequence) = marks.to_wire();
                cursor.slot_head(head, tag)?;
                cursor.slot_head(bare(slot, sequence), 0)?;
            }
            Self::Grant { slot, sequence, direction, upto } => {
                cursor.slot_head(SlotHead { slot, sequence, total: upto }, direction.to_wire())?;
            }
            Self::Slots { version, count } => {
                cursor.put(&version.to_le_bytes())?;
                cursor.put(&count.to_le_bytes())?;
            }
            Self::Release { version, count, floor } => {
                cursor.put(&version.to_le_bytes())?;
                cursor.put(&count.to_le_bytes())?;
                cursor.put(&floor.to_le_bytes())?;
            }
            Self::Bulk { port, buffer } => {
                cursor.put(&port.to_le_bytes())?;
                cursor.put(&[0; 2])?;
                cursor.put(&buffer.to_le_bytes())?;
            }
            Self::Padding { length } => cursor.zeros(length as usize)?,
            Self::Where { key } => cursor.put(key)?,
            Self::There { key, address } => {
                cursor.put(key)?;
                cursor.put(&emit_place(address))?;
            }
            Self::Close { reason } => {
                cursor.put(&reason.to_le_bytes())?;
                cursor.put(&[0; 4])?;
            }
        }
        Ok(())
    }
}
