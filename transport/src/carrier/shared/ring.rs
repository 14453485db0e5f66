//! A ring of records in memory that a stranger shares: one writes, one reads.
//!
//! ```text
//! words:  head … │ tail … │ sleeping … │ data, a power of two of them
//!                                        │ length │ payload, 8 bytes a word │ length │ …
//! ```
//!
//! Positions count words for ever; a place is a position modulo the size. The writer owns
//! the head and *keeps its own copy of it*; so does the reader with the tail. What the
//! other side owns is read once, checked, and used as it was read. Payload is copied out
//! before anybody looks at it.
//!
//! *Sleeping.* Who goes to sleep says so, then looks once more; who writes publishes, then
//! looks whether somebody sleeps. Between the two stands a full fence on either side, so
//! one of them sees the other (Dekker; the loom test runs through all orders).
//!
//! Invariants: no value of the other side's makes this side read or write outside the
//! ring, loop, panic, or hand out a record longer than the caller's room. A record is
//! given out once.

use core::sync::atomic::Ordering::{self, Acquire, Relaxed, Release};

/// Memory that both sides see, as words.
pub(crate) trait Memory {
    fn load(&self, at: usize, ordering: Ordering) -> u64;
    fn store(&self, at: usize, value: u64, ordering: Ordering);
    /// A fence over all memory (`SeqCst`).
    fn fence(&self);
}

/// Words between two that different sides write: two cache lines, since processors fetch
/// pairs.
const APART: usize = 16;

/// Where a ring lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    base: usize,
    words: u64,
}

impl Layout {
    /// A ring of `words` words of data, a power of two, from word `base` on.
    pub(crate) const fn new(base: usize, words: u64) -> Self {
        assert!(words.is_power_of_two(), "places are positions modulo the size");
        Self { base, words }
    }

    /// Words of a whole ring.
    #[allow(clippy::cast_possible_truncation, reason = "rings are small")]
    pub(crate) const fn total(words: u64) -> usize {
        3 * APART + words as usize
    }

    const fn head(self) -> usize {
        self.base
    }

    const fn tail(self) -> usize {
        self.base + APART
    }

    const fn sleeping(self) -> usize {
        self.base + 2 * APART
    }

    #[allow(clippy::cast_possible_truncation, reason = "below the number of words")]
    const fn place(self, position: u64) -> usize {
        self.base + 3 * APART + (position & (self.words - 1)) as usize
    }
}

/// The other side has written what no honest one writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Hostile {
    /// A position that the ring cannot have reached.
    #[error("position outside the ring")]
    Position,
    /// A record of no length, or beyond what has been written.
    #[error("record length outside the ring")]
    Length,
}

/// Words of a record of so many bytes.
const fn words(bytes: usize) -> u64 {
    1 + bytes.div_ceil(8) as u64
}

/// The writing end.
#[derive(Debug)]
pub(crate) struct Writer {
    layout: Layout,
    head: u64,
    tail_seen: u64,
}

impl Writer {
    pub(crate) const fn new(layout: Layout) -> Self {
        Self { layout, head: 0, tail_seen: 0 }
    }

    /// Writes a record; says whether there was room. [`publish`](Self::publish) shows it.
    pub(crate) fn push(&mut self, memory: &impl Memory, bytes: &[u8]) -> Result<bool, Hostile> {
        let (layout, need) = (self.layout, words(bytes.len()));
        if bytes.is_empty() || need > layout.words {
            return Ok(false);
        }
        if layout.words - self.head.wrapping_sub(self.tail_seen) < need {
            let tail = memory.load(layout.tail(), Acquire);
            // It may not go back: what was seen was there.
            if tail.wrapping_sub(self.tail_seen) > self.head.wrapping_sub(self.tail_seen) {
                return Err(Hostile::Position);
            }
            self.tail_seen = tail;
            if layout.words - self.head.wrapping_sub(tail) < need {
                return Ok(false);
            }
        }
        memory.store(layout.place(self.head), bytes.len() as u64, Relaxed);
        let mut at = self.head.wrapping_add(1);
        let (whole, rest) = bytes.as_chunks::<8>();
        for word in whole {
            memory.store(layout.place(at), u64::from_le_bytes(*word), Relaxed);
            at = at.wrapping_add(1);
        }
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            memory.store(layout.place(at), u64::from_le_bytes(word), Relaxed);
        }
        self.head = self.head.wrapping_add(need);
        Ok(true)
    }

    /// Shows the reader what was written; says whether it sleeps and must be woken.
    pub(crate) fn publish(&self, memory: &impl Memory) -> bool {
        memory.store(self.layout.head(), self.head, Release);
        memory.fence();
        let sleeps = memory.load(self.layout.sleeping(), Relaxed) != 0;
        if sleeps {
            // Once is enough: it says it again before it sleeps again.
            memory.store(self.layout.sleeping(), 0, Relaxed);
        }
        sleeps
    }
}

/// The reading end.
#[derive(Debug)]
pub(crate) struct Reader {
    layout: Layout,
    tail: u64,
    head_seen: u64,
}

impl Reader {
    pub(crate) const fn new(layout: Layout) -> Self {
        Self { layout, tail: 0, head_seen: 0 }
    }

    fn look(&mut self, memory: &impl Memory) -> Result<(), Hostile> {
        let head = memory.load(self.layout.head(), Acquire);
        // It may not go back either: what was seen was there.
        let ahead = head.wrapping_sub(self.tail);
        if ahead > self.layout.words || ahead < self.head_seen.wrapping_sub(self.tail) {
            return Err(Hostile::Position);
        }
        self.head_seen = head;
        Ok(())
    }

    /// Copies the next record into `room`; gives its length.
    pub(crate) fn pop(
        &mut self,
        memory: &impl Memory,
        room: &mut [u8],
    ) -> Result<Option<usize>, Hostile> {
        if self.tail == self.head_seen {
            self.look(memory)?;
        }
        let ready = self.head_seen.wrapping_sub(self.tail);
        if ready == 0 {
            return Ok(None);
        }
        let layout = self.layout;
        let claimed = memory.load(layout.place(self.tail), Relaxed);
        let length = usize::try_from(claimed).map_err(|_| Hostile::Length)?;
        let record = room.get_mut(..length).filter(|record| !record.is_empty());
        let record = record.filter(|record| words(record.len()) <= ready).ok_or(Hostile::Length)?;
        let mut at = self.tail.wrapping_add(1);
        let (whole, rest) = record.as_chunks_mut::<8>();
        for word in whole {
            *word = memory.load(layout.place(at), Relaxed).to_le_bytes();
            at = at.wrapping_add(1);
        }
        if !rest.is_empty() {
            let word = memory.load(layout.place(at), Relaxed).to_le_bytes();
            let length = rest.len();
            rest.copy_from_slice(&word[..length]);
        }
        self.tail = self.tail.wrapping_add(words(length));
        Ok(Some(length))
    }

    /// Gives the writer the room of what was read.
    pub(crate) fn release(&self, memory: &impl Memory) {
        memory.store(self.layout.tail(), self.tail, Release);
    }

    /// Says that this side sleeps; says whether it may, or there is something after all.
    pub(crate) fn may_sleep(&mut self, memory: &impl Memory) -> Result<bool, Hostile> {
        memory.store(self.layout.sleeping(), 1, Relaxed);
        memory.fence();
        self.look(memory)?;
        Ok(self.head_seen == self.tail)
    }

    /// Says that this side is awake.
    pub(crate) fn is_awake(&self, memory: &impl Memory) {
        memory.store(self.layout.sleeping(), 0, Relaxed);
    }
}

#[cfg(test)]
mod tests;
