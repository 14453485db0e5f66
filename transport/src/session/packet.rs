//! One outgoing packet while frames are put into it.

use super::flow::Tracked;
use conet_wire::session::frame::{CHUNK_OVERHEAD, FRAME_HEADER, Frame};
use conet_wire::session::{HEADER, TAG};

/// What a packet with one piece has beside the piece's data.
pub(crate) const PARTS: usize = HEADER + CHUNK_OVERHEAD + TAG;

/// Frames on their way into one datagram.
#[derive(Debug)]
pub(crate) struct Packet<'b> {
    buf: &'b mut [u8],
    at: usize,
    /// Bytes of the packet that do not go into `buf`: room for them, and how many there are.
    apart: usize,
    left_apart: usize,
    /// What must be acknowledged; at most one per packet.
    pub(crate) tracked: Option<Tracked>,
}

impl<'b> Packet<'b> {
    /// An empty packet of `size` bytes at most, header and tag included.
    ///
    /// What `buf` holds of an earlier packet is overwritten, or lies behind this one's end.
    pub(crate) fn new(buf: &'b mut [u8], size: usize) -> Self {
        let size = size.min(buf.len());
        let buf = buf.get_mut(..size).unwrap_or_default();
        Self { buf, at: HEADER, apart: 0, left_apart: 0, tracked: None }
    }

    /// An empty packet of `size` bytes at most for one piece, whose data is left where it is:
    /// `buf` gets what goes before it and what goes behind it. Only for packets in the clear.
    pub(crate) fn in_parts(buf: &'b mut [u8], size: usize) -> Self {
        let packet = Self::new(buf, size.min(PARTS));
        Self { apart: size.saturating_sub(packet.buf.len()), ..packet }
    }

    /// Bytes left for frames.
    pub(crate) fn room(&self) -> usize {
        (self.buf.len() + self.apart).saturating_sub(TAG + self.at)
    }

    /// Puts a frame in, or says that it does not fit; then nothing has changed.
    ///
    /// Where the caller says which frame it is, only that one's code is left.
    #[inline(always)]
    pub(crate) fn push(&mut self, frame: &Frame<'_>) -> bool {
        let end = self.buf.len().saturating_sub(TAG);
        let Some(room) = self.buf.get_mut(self.at..end) else { return false };
        match frame.emit(room) {
            Ok(length) => {
                self.at += length;
                true
            }
            Err(_) => false,
        }
    }

    /// As [`push`](Self::push), for the frame of a piece: its data may be left where it is.
    pub(crate) fn push_piece(&mut self, frame: &Frame<'_>, data: usize) -> bool {
        if self.apart == 0 {
            return self.push(frame);
        }
        let end = self.buf.len().saturating_sub(TAG);
        let Some(room) = self.buf.get_mut(self.at..end) else { return false };
        match frame.emit_head(data, room) {
            Ok(length) if data <= self.apart => {
                self.at += length;
                self.left_apart = data;
                true
            }
            _ => false,
        }
    }

    /// Bytes that were left where they are.
    pub(crate) const fn left_apart(&self) -> usize {
        self.left_apart
    }

    /// Fills the packet up; without a padding's room it stays as it is.
    pub(crate) fn pad(&mut self) {
        let length = self.room().checked_sub(FRAME_HEADER).and_then(|room| room.try_into().ok());
        if let Some(length) = length {
            self.push(&Frame::Padding { length });
        }
    }

    /// Payload bytes so far, without those left apart; zero for a packet that need not be sent.
    pub(crate) const fn payload_len(&self) -> usize {
        self.at - HEADER
    }

    /// The buffer, for sealing, and what is tracked.
    pub(crate) fn finish(self) -> (&'b mut [u8], Option<Tracked>) {
        (self.buf, self.tracked)
    }
}
