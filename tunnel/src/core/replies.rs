//! Packets made here for the senders of others: errors of ICMP.

use conet_wire::ip::ICMP_ERROR_MAX;

use crate::Inner;

/// Most replies of one step; whoever sends more packets that do not fit is told by
/// these.
const REPLIES: usize = 16;

/// Packets on their way to the device that came from nowhere.
#[derive(Debug)]
pub struct Replies {
    buffer: Vec<u8>,
    packets: Vec<Inner>,
}

impl Default for Replies {
    fn default() -> Self {
        Self { buffer: vec![0; REPLIES * ICMP_ERROR_MAX], packets: Vec::with_capacity(REPLIES) }
    }
}

impl Replies {
    /// Where the packets are.
    pub fn buffer(&self) -> &[u8] {
        &self.buffer
    }

    /// The packets.
    pub fn packets(&self) -> &[Inner] {
        &self.packets
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.packets.clear();
    }

    /// Adds what `write` makes, if it makes one and there is room.
    pub(crate) fn push(&mut self, write: impl FnOnce(&mut [u8; ICMP_ERROR_MAX]) -> Option<usize>) {
        let start = self.packets.len() * ICMP_ERROR_MAX;
        let Some(space) = self.buffer.get_mut(start..).and_then(|b| b.first_chunk_mut()) else {
            return;
        };
        if let Some(len) = write(space) {
            self.packets.push(Inner { at: start..start + len, trusted: true, segment: 0 });
        }
    }
}
