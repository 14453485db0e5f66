//! Buffers that a guest offers for what it receives, taken out of its queue ahead of use.
//!
//! ```text
//! queue ─ take ─► chains: head, parts ─ spend ─► Returns, with what was written
//!    ◄── put back ──┘ what is left at the end of a turn
//! ```
//!
//! How long a packet is, is known when it has been read; so that it can be read where it
//! belongs, buffers for the longest are at hand before.
//!
//! Invariants: each descriptor is read once, what the guest changes after is not believed;
//! there are never more parts than bytes of two of the longest frames; what was taken and
//! not spent is put back before anybody else sees the queue.

use std::collections::VecDeque;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, VolatileSlice,
};

use super::header::{LONGEST, PACKET};
use super::ring::Returns;
use super::sys::MOST_SLICES;

/// A frame of the longest packet.
pub(super) const WHOLE: usize = PACKET + LONGEST;

/// Chains that were taken out of a queue.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    chains: VecDeque<Chain>,
    /// Of all chains, none empty.
    parts: VecDeque<(GuestAddress, usize)>,
    /// Of all parts.
    bytes: usize,
}

#[derive(Debug, Clone, Copy)]
struct Chain {
    head: u16,
    parts: usize,
    bytes: usize,
}

impl Buffers {
    /// Takes chains until there are so many bytes; whether there are.
    pub(super) fn take(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        bytes: usize,
    ) -> Result<bool, virtio_queue::Error> {
        let most = usize::from(queue.size());
        if self.bytes >= bytes {
            return Ok(true);
        }
        let mut offered = queue.iter(memory)?;
        while self.bytes < bytes && self.chains.len() < most {
            let Some(chain) = offered.next() else { break };
            let mut taken = Chain { head: chain.head_index(), parts: 0, bytes: 0 };
            for descriptor in chain.writable() {
                // No frame needs more of one.
                let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
                let len = len.min(WHOLE - taken.bytes);
                if len > 0 {
                    self.parts.push_back((descriptor.addr(), len));
                    taken.parts += 1;
                    taken.bytes += len;
                }
                if taken.bytes == WHOLE {
                    break;
                }
            }
            self.bytes += taken.bytes;
            self.chains.push_back(taken);
        }
        Ok(self.bytes >= bytes)
    }

    /// How many chains there are.
    pub(super) fn len(&self) -> usize {
        self.chains.len()
    }

    /// Bytes of the oldest chain, where there is one.
    pub(super) fn first(&self) -> Option<usize> {
        self.chains.front().map(|chain| chain.bytes)
    }

    /// How many of the chains a frame of so many bytes takes, of which there are enough.
    pub(super) fn chains_for(&self, len: usize) -> usize {
        let mut room = 0;
        let fits = self.chains.iter().position(|chain| {
            room += chain.bytes;
            room >= len
        });
        fits.map_or(self.chains.len(), |last| last + 1)
    }

    /// Writes a frame to the beginning; false where a part of it is not in the guest's memory.
    pub(super) fn write(&self, memory: &GuestMemoryMmap, frame: &[u8]) -> bool {
        let mut rest = frame;
        let mut is_written = true;
        for &(address, len) in &self.parts {
            let (part, after) = rest.split_at(len.min(rest.len()));
            rest = after;
            is_written &= memory.write_slice(part, address).is_ok();
            if rest.is_empty() {
                break;
            }
        }
        is_written
    }

    /// A byte of what was written.
    pub(super) fn byte(&self, memory: &GuestMemoryMmap, mut at: usize) -> Option<u8> {
        let part = self.parts.iter().find(|(_, len)| {
            let is_it = at < *len;
            at -= if is_it { 0 } else { *len };
            is_it
        });
        let (address, _) = part?;
        memory.read_obj(GuestAddress(address.0.checked_add(u64::try_from(at).ok()?)?)).ok()
    }

    /// Where all but the first bytes of the longest frame are to lie; none where that is not
    /// in the guest's memory, or in too many pieces.
    pub(super) fn slices<'a>(
        &self,
        memory: &'a GuestMemoryMmap,
        skip: usize,
    ) -> Option<Vec<VolatileSlice<'a>>> {
        let (mut skip, mut room) = (skip, WHOLE - skip);
        let mut slices = Vec::with_capacity(32);
        for &(address, len) in &self.parts {
            let begin = skip.min(len);
            let wanted = (len - begin).min(room);
            skip -= begin;
            room -= wanted;
            let from = GuestAddress(address.0.checked_add(u64::try_from(begin).ok()?)?);
            for slice in memory.get_slices(from, wanted) {
                slices.push(slice.ok()?);
            }
            if slices.len() > MOST_SLICES {
                return None;
            }
            if room == 0 {
                return Some(slices);
            }
        }
        None
    }

    /// Gives back so many chains, with a frame of so many bytes in them, or nothing.
    pub(super) fn spend(
        &mut self,
        chains: usize,
        len: usize,
        queue: &Queue,
        memory: &GuestMemoryMmap,
        returns: &mut Returns,
    ) -> Result<(), GuestMemoryError> {
        let mut rest = len;
        for chain in self.chains.drain(..chains.min(self.chains.len())) {
            let written = rest.min(chain.bytes);
            rest -= written;
            self.bytes -= chain.bytes;
            self.parts.drain(..chain.parts);
            returns.put(queue, memory, chain.head, u32::try_from(written).unwrap_or(0))?;
        }
        Ok(())
    }

    /// Leaves what is left to the queue.
    pub(super) fn put_back(&mut self, queue: &mut Queue) {
        let left = u16::try_from(self.chains.len()).unwrap_or(0);
        queue.set_next_avail(queue.next_avail().wrapping_sub(left));
        self.clear();
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.chains.clear();
        self.parts.clear();
        self.bytes = 0;
    }
}
