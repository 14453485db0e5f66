//! One outgoing packet while frames are put into it.

use super::flow::Tracked;
use conet_wire::session::frame::{FRAME_HEADER, Frame};
use conet_wire::session::{HEADER, TAG};

/// Frames on their way into one datagram.
#[derive(Debug)]
pub(crate) struct Packet<'b> {
    buf: &'b mut [u8],
    at: usize,
    /// What must be acknowledged; at most one per packet.
    pub(crate) tracked: Option<Tracked>,
}

impl<'b> Packet<'b> {
    /// An empty packet of `size` bytes at most, header and tag included.
    ///
    /// What `buf` holds of an earlier packet is overwritten, or lies behind this one's end.
    pub(crate) fn new(buf: &'b mut [u8], size: usize) -> Self {
        let size = size.min(buf.len());
        Self { buf: buf.get_mut(..size).unwrap_or_default(), at: HEADER, tracked: None }
    }

    /// Bytes left for frames.
    pub(crate) fn room(&self) -> usize {
        self.buf.len().saturating_sub(TAG + self.at)
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

    /// Fills the packet up; without a padding's room it stays as it is.
    pub(crate) fn pad(&mut self) {
        let length = self.room().checked_sub(FRAME_HEADER).and_then(|room| room.try_into().ok());
        if let Some(length) = length {
            self.push(&Frame::Padding { length });
        }
    }

    /// Payload bytes so far; zero for a packet that need not be sent.
    pub(crate) const fn payload_len(&self) -> usize {
        self.at - HEADER
    }

    /// The buffer, for sealing, and what is tracked.
    pub(crate) fn finish(self) -> (&'b mut [u8], Option<Tracked>) {
        (self.buf, self.tracked)
    }
}
