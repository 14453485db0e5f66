//! One outgoing packet while frames are put into it.

use super::flow::Tracked;
use alloc::vec::Vec;
use conet_wire::session::frame::Frame;
use conet_wire::session::{HEADER, TAG};

/// Frames on their way into one datagram.
#[derive(Debug)]
pub(crate) struct Packet<'b> {
    buf: &'b mut Vec<u8>,
    at: usize,
    /// What must be acknowledged; at most one per packet.
    pub(crate) tracked: Option<Tracked>,
}

impl<'b> Packet<'b> {
    /// An empty packet of `size` bytes at most, header and tag included.
    pub(crate) fn new(buf: &'b mut Vec<u8>, size: usize) -> Self {
        // What is left of an earlier packet is overwritten, or cut off when this is sealed.
        buf.resize(size, 0);
        Self { buf, at: HEADER, tracked: None }
    }

    /// Bytes left for frames.
    pub(crate) fn room(&self) -> usize {
        self.buf.len().saturating_sub(TAG + self.at)
    }

    /// Puts a frame in, or says that it does not fit; then nothing has changed.
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

    /// Payload bytes so far; zero for a packet that need not be sent.
    pub(crate) const fn payload_len(&self) -> usize {
        self.at - HEADER
    }

    /// The buffer, for sealing, and what is tracked.
    pub(crate) fn finish(self) -> (&'b mut Vec<u8>, Option<Tracked>) {
        (self.buf, self.tracked)
    }
}
