//! A ring of records in memory that a stranger shares: one writes, one reads.
//!
//! ```text
//! words:  tail … │ sleeping … │ data, a power of two of them
//!                               │ length │ payload, 8 bytes a word │ 0 │ …
//!                                 a cache line or more each          └ the next one's length
//! ```
//!
//! Positions count words for ever; a place is a position modulo the size. Each side *keeps
//! its own position* and reads none of its own back. What the other side owns is read once,
//! checked, and used as it was read. Payload is copied out before anybody looks at it.
//!
//! *A record shows itself*: the reader looks at the word where the next length will be, which
//! is zero until the record is there. So a small record and the news of it are one transfer
//! between two processors' caches, where a common head would be a second one behind it. The
//! writer stores a zero behind a record before it stores the record's length, so nothing
//! that was ever payload is taken for a length; for that a line of the ring stays free. It does
//! so ahead, when nobody waits for it any more: a store in front of a length keeps it back.
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
    /// Stores words one behind the other, in any order.
    fn store_all(&self, at: usize, words: &[[u8; 8]]) {
        for (at, word) in (at..).zip(words) {
            self.store(at, u64::from_le_bytes(*word), Relaxed);
        }
    }
    /// Loads words that stand one behind the other, in any order.
    fn load_all(&self, at: usize, words: &mut [[u8; 8]]) {
        for (at, word) in (at..).zip(words) {
            *word = self.load(at, Relaxed).to_le_bytes();
        }
    }
    /// A fence over all memory (`SeqCst`).
    fn fence(&self);
    /// A hint that another processor looks at this line next: it gets it sooner from a cache
    /// that both have in common than from this one's.
    fn hand_over(&self, _at: usize) {}
}

/// Words between two that different sides write: two cache lines, since processors fetch
/// pairs.
const APART: usize = 16;
/// Bytes from which on words are copied in runs: what a call takes is done word by word.
const LONG: usize = 512;
/// Words of a cache line, where each record begins.
const LINE_WORDS: usize = 8;
/// Bytes of a line, and of its words behind a length.
const LINE_BYTES: usize = 8 * LINE_WORDS;
const FIRST_BYTES: usize = LINE_BYTES - 8;
const LINE: u64 = LINE_WORDS as u64;
/// Words ahead of the head whose lines are made to begin with zeros: what a call takes.
const AHEAD: u64 = 4 * LINE;

/// Where a ring lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    base: usize,
    words: u64,
}

impl Layout {
    /// A ring of `words` words of data, a power of two and at least two lines, from word
    /// `base` on.
    pub(crate) const fn new(base: usize, words: u64) -> Self {
        assert!(words.is_power_of_two(), "places are positions modulo the size");
        Self { base, words }
    }

    /// Words of a whole ring.
    #[allow(clippy::cast_possible_truncation, reason = "rings are small")]
    pub(crate) const fn total(words: u64) -> usize {
        2 * APART + words as usize
    }

    const fn tail(self) -> usize {
        self.base
    }

    const fn sleeping(self) -> usize {
        self.base + APART
    }

    #[allow(clippy::cast_possible_truncation, reason = "below the number of words")]
    const fn place(self, position: u64) -> usize {
        self.base + 2 * APART + (position & (self.words - 1)) as usize
    }

    /// Words from `position` to where the ring begins anew.
    #[allow(clippy::cast_possible_truncation, reason = "below the number of words")]
    const fn straight(self, position: u64) -> usize {
        (self.words - (position & (self.words - 1))) as usize
    }
}

/// The other side has written what no honest one writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Hostile {
    /// A position that the ring cannot have reached.
    #[error("position outside the ring")]
    Position,
    /// A record longer than the ring holds or the reader takes.
    #[error("record length outside the ring")]
    Length,
}

/// Words of a record of so many bytes, its length included: whole lines.
const fn words(bytes: usize) -> u64 {
    (1 + bytes.div_ceil(8) as u64).next_multiple_of(LINE)
}

/// The writing end.
#[derive(Debug)]
pub(crate) struct Writer {
    layout: Layout,
    head: u64,
    tail_seen: u64,
    /// Words from the head on whose lines begin with zeros.
    zeroed: u64,
    /// The first record that is not shown yet: its position and first line. The reader looks
    /// at that line all the time, and would fetch it twice if it were written twice.
    hidden: Option<(u64, [u64; LINE_WORDS])>,
    /// The reader slept when something was shown last.
    slept: bool,
}

impl Writer {
    pub(crate) const fn new(layout: Layout) -> Self {
        Self { layout, head: 0, tail_seen: 0, zeroed: 0, hidden: None, slept: false }
    }

    /// Writes a record; says whether there was room. [`publish`](Self::publish) shows it.
    #[inline]
    pub(crate) fn push(&mut self, memory: &impl Memory, bytes: &[u8]) -> Result<bool, Hostile> {
        let (layout, need) = (self.layout, words(bytes.len()));
        // Behind it is room for a zero.
        let room = need.saturating_add(LINE);
        if bytes.is_empty() || room > layout.words {
            return Ok(false);
        }
        if layout.words - self.head.wrapping_sub(self.tail_seen) < room {
            let tail = memory.load(layout.tail(), Acquire);
            // It may not go back: what was seen was there.
            if tail.wrapping_sub(self.tail_seen) > self.head.wrapping_sub(self.tail_seen) {
                return Err(Hostile::Position);
            }
            self.tail_seen = tail;
            if layout.words - self.head.wrapping_sub(tail) < room {
                return Ok(false);
            }
        }
        let mut first = [bytes.len() as u64; LINE_WORDS];
        let (line, rest) = bytes.split_at(bytes.len().min(FIRST_BYTES));
        if let Some(whole) = line.first_chunk::<FIRST_BYTES>() {
            for (word, bytes) in first.iter_mut().skip(1).zip(whole.as_chunks().0) {
                *word = u64::from_le_bytes(*bytes);
            }
        } else {
            for (word, bytes) in first.iter_mut().skip(1).zip(line.chunks(8)) {
                *word = word_of(bytes);
            }
        }
        let mut at = self.head.wrapping_add(LINE);
        if rest.len() >= LONG {
            write_long(memory, layout, at, rest);
        } else {
            // A line lies in one piece.
            let (lines, rest) = rest.as_chunks::<LINE_BYTES>();
            for line in lines {
                memory.store_all(layout.place(at), line.as_chunks().0);
                at = at.wrapping_add(LINE);
            }
            write_part(memory, layout.place(at), rest);
        }
        if self.hidden.is_none() {
            self.hidden = Some((self.head, first));
        } else {
            // The reader cannot pass the hidden one.
            show(memory, layout, self.head, &first, Relaxed);
        }
        self.head = self.head.wrapping_add(need);
        self.zeroed = self.zeroed.saturating_sub(need);
        Ok(true)
    }

    /// Shows the reader what was written; says whether it sleeps and must be woken.
    #[inline]
    pub(crate) fn publish(&mut self, memory: &impl Memory) -> bool {
        let Some((at, first)) = self.hidden.take() else { return false };
        if self.zeroed == 0 {
            memory.store(self.layout.place(self.head), 0, Relaxed);
            self.zeroed = LINE;
        }
        show(memory, self.layout, at, &first, Release);
        if !self.slept {
            // Who did not sleep last time looks from another processor.
            memory.hand_over(self.layout.place(at));
            memory.hand_over(self.layout.place(at.wrapping_add(LINE)));
        }
        memory.fence();
        let sleeps = memory.load(self.layout.sleeping(), Relaxed) != 0;
        self.slept = sleeps;
        if sleeps {
            // Once is enough: it says it again before it sleeps again.
            memory.store(self.layout.sleeping(), 0, Relaxed);
        }
        self.zero_ahead(memory);
        sleeps
    }

    /// Zeros for the ends of the next records, as far as the reader is known to be through.
    #[inline]
    fn zero_ahead(&mut self, memory: &impl Memory) {
        let free = self.layout.words - self.head.wrapping_sub(self.tail_seen);
        while self.zeroed < AHEAD && self.zeroed < free {
            memory.store(self.layout.place(self.head.wrapping_add(self.zeroed)), 0, Relaxed);
            self.zeroed += LINE;
        }
    }
}

/// Writes bytes from position `at` on, two runs of words where the ring begins anew.
#[inline(never)]
fn write_long(memory: &impl Memory, layout: Layout, at: u64, bytes: &[u8]) {
    let (first, second) = bytes.split_at(bytes.len().min(8 * layout.straight(at)));
    write_part(memory, layout.place(at), first);
    write_part(memory, layout.place(at.wrapping_add(first.len() as u64 / 8)), second);
}

/// Writes bytes that stand one behind the other.
#[inline]
fn write_part(memory: &impl Memory, at: usize, bytes: &[u8]) {
    let (words, rest) = bytes.as_chunks();
    memory.store_all(at, words);
    if !rest.is_empty() {
        memory.store(at + words.len(), word_of(rest), Relaxed);
    }
}

/// Reads bytes from position `at` on, as [`write_long`] writes them.
#[inline(never)]
fn read_long(memory: &impl Memory, layout: Layout, at: u64, bytes: &mut [u8]) {
    let (first, second) = bytes.split_at_mut(bytes.len().min(8 * layout.straight(at)));
    read_part(memory, layout.place(at), first);
    read_part(memory, layout.place(at.wrapping_add(first.len() as u64 / 8)), second);
}

/// Reads bytes that stand one behind the other.
#[inline]
fn read_part(memory: &impl Memory, at: usize, bytes: &mut [u8]) {
    let (words, rest) = bytes.as_chunks_mut::<8>();
    memory.load_all(at, words);
    if !rest.is_empty() {
        let word = memory.load(at + words.len(), Relaxed).to_le_bytes();
        let length = rest.len();
        rest.copy_from_slice(&word[..length]);
    }
}

/// The first bytes as a word; the missing ones are zero.
#[inline]
fn word_of(bytes: &[u8]) -> u64 {
    if let Some(word) = bytes.first_chunk() {
        return u64::from_le_bytes(*word);
    }
    let mut word = [0; 8];
    for (to, from) in word.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(word)
}

/// Writes a record's first line, its length last.
#[inline]
fn show(
    memory: &impl Memory,
    layout: Layout,
    at: u64,
    [length, payload @ ..]: &[u64; LINE_WORDS],
    ordering: Ordering,
) {
    let place = layout.place(at);
    memory.store_all(place + 1, &payload.map(u64::to_le_bytes));
    memory.store(place, *length, ordering);
}

/// The reading end.
#[derive(Debug)]
pub(crate) struct Reader {
    layout: Layout,
    tail: u64,
}

impl Reader {
    pub(crate) const fn new(layout: Layout) -> Self {
        Self { layout, tail: 0 }
    }

    /// Copies the next record into `room`; gives its length.
    #[inline]
    pub(crate) fn pop(
        &mut self,
        memory: &impl Memory,
        room: &mut [u8],
    ) -> Result<Option<usize>, Hostile> {
        let layout = self.layout;
        let claimed = memory.load(layout.place(self.tail), Acquire);
        if claimed == 0 {
            return Ok(None);
        }
        let length = usize::try_from(claimed).map_err(|_| Hostile::Length)?;
        let record = room.get_mut(..length).ok_or(Hostile::Length)?;
        let need = words(length);
        if need + LINE > layout.words {
            return Err(Hostile::Length);
        }
        let at = self.tail.wrapping_add(1);
        if length < LONG {
            // A line lies in one piece.
            let (first, rest) = record.split_at_mut(length.min(FIRST_BYTES));
            if let Some(first) = first.first_chunk_mut::<FIRST_BYTES>() {
                memory.load_all(layout.place(at), first.as_chunks_mut().0);
            } else {
                read_part(memory, layout.place(at), first);
            }
            let (lines, rest) = rest.as_chunks_mut::<LINE_BYTES>();
            let mut at = at.wrapping_add(LINE - 1);
            for line in lines {
                memory.load_all(layout.place(at), line.as_chunks_mut().0);
                at = at.wrapping_add(LINE);
            }
            read_part(memory, layout.place(at), rest);
        } else {
            read_long(memory, layout, at, record);
        }
        self.tail = self.tail.wrapping_add(need);
        Ok(Some(length))
    }

    /// Gives the writer the room of what was read.
    pub(crate) fn release(&self, memory: &impl Memory) {
        memory.store(self.layout.tail(), self.tail, Release);
    }

    /// Says that this side sleeps; says whether it may, or there is something after all.
    pub(crate) fn may_sleep(&self, memory: &impl Memory) -> bool {
        memory.store(self.layout.sleeping(), 1, Relaxed);
        memory.fence();
        memory.load(self.layout.place(self.tail), Acquire) == 0
    }

    /// Says that this side is awake.
    pub(crate) fn is_awake(&self, memory: &impl Memory) {
        memory.store(self.layout.sleeping(), 0, Relaxed);
    }
}

#[cfg(test)]
mod tests;
