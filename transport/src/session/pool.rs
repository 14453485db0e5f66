//! Buffers that are used again, so that a call allocates nothing.
//!
//! Payloads are `Vec`s that change hands between the session and its user. What comes
//! back goes here, and the next payload is written into it.
//!
//! Invariant: at most twice [`MOST`] buffers and [`MOST_BYTES`] of capacity are kept.

use alloc::vec::Vec;

/// Most buffers that are kept.
const MOST: usize = 512;
/// Most bytes that are kept while large payloads come and go: two of the longest. Memory
/// that is given back and asked for again costs a page fault for each 4 KiB, which is more
/// than receiving them.
const MOST_BYTES: usize = 32 * 1024 * 1024;
/// Most bytes that are kept in a quiet time: many small ones.
const MOST_QUIET: usize = 1024 * 1024;
/// Up to this capacity a buffer is small; a call in one packet never needs more.
const SMALL: usize = 4096;

/// Free buffers.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    small: Vec<Vec<u8>>,
    large: Vec<Vec<u8>>,
    /// Capacity of the large ones; the small ones are too few to count.
    bytes: usize,
}

impl Pool {
    /// An empty buffer with room for `length` bytes.
    #[inline]
    pub(crate) fn take(&mut self, length: usize) -> Vec<u8> {
        if length <= SMALL
            && let Some(mut buffer) = self.small.pop()
            && buffer.capacity() >= length
        {
            buffer.clear();
            return buffer;
        }
        self.take_anew(length)
    }

    #[inline(never)]
    fn take_anew(&mut self, length: usize) -> Vec<u8> {
        if length <= SMALL {
            return Vec::with_capacity(SMALL.min(length.max(64).next_power_of_two()));
        }
        let mut buffer = self.large.pop().unwrap_or_default();
        self.bytes -= buffer.capacity();
        buffer.clear();
        buffer.reserve(length);
        buffer
    }

    /// A buffer for a payload that arrives: one with room for all of it if there is one, or
    /// none yet, for memory that was not granted is not taken.
    pub(crate) fn take_large(&mut self, length: usize) -> Vec<u8> {
        let at = self.large.iter().rposition(|buffer| buffer.capacity() >= length);
        let buffer = at.map(|at| self.large.swap_remove(at)).unwrap_or_default();
        self.bytes -= buffer.capacity();
        buffer
    }

    /// A buffer of `length` bytes with whatever an earlier payload has left in it.
    #[inline]
    pub(crate) fn take_used(&mut self, length: usize) -> Vec<u8> {
        if length <= SMALL
            && let Some(buffer) = self.small.last_mut()
            && buffer.len() >= length
        {
            buffer.truncate(length);
            return self.small.pop().unwrap_or_default();
        }
        self.take_used_large(length)
    }

    #[inline(never)]
    fn take_used_large(&mut self, length: usize) -> Vec<u8> {
        let at = self.large.iter().rposition(|buffer| buffer.len() >= length);
        let Some(at) = at.filter(|_| length > SMALL) else {
            let mut buffer = self.take(length);
            buffer.resize(length, 0);
            return buffer;
        };
        let mut buffer = self.large.swap_remove(at);
        self.bytes -= buffer.capacity();
        buffer.truncate(length);
        buffer
    }

    /// Gives back what a quiet time does not need.
    pub(crate) fn trim(&mut self) {
        while self.bytes > MOST_QUIET
            && let Some(buffer) = self.large.pop()
        {
            self.bytes -= buffer.capacity();
        }
        self.large.shrink_to_fit();
    }

    /// Buffers that are kept.
    pub(crate) const fn kept(&self) -> usize {
        self.small.len() + self.large.len()
    }

    /// Whether no call in one packet needs such a buffer.
    pub(crate) const fn is_large(buffer: &Vec<u8>) -> bool {
        buffer.capacity() > SMALL
    }

    /// How much is kept of the kind of `buffer`: buffers, or bytes of large ones.
    pub(crate) const fn kept_for(&self, buffer: &Vec<u8>) -> usize {
        if Self::is_large(buffer) { self.bytes } else { self.kept() }
    }

    /// A buffer with a copy of `bytes`.
    #[inline]
    pub(crate) fn copy(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut buffer = self.take(bytes.len());
        buffer.extend_from_slice(bytes);
        buffer
    }

    /// Makes `buffer` a copy of `bytes`, where it is: another one comes only where there is
    /// none or this one is not fit.
    #[inline(always)]
    pub(crate) fn refill(&mut self, buffer: &mut Vec<u8>, bytes: &[u8]) {
        if buffer.capacity() == 0
            && let Some(other) = self.small.pop()
        {
            // Nothing to give back, so nobody looks for it.
            core::mem::forget(core::mem::replace(buffer, other));
        }
        let is_small = buffer.capacity() <= SMALL;
        match buffer.get_mut(..bytes.len()) {
            Some(room) if is_small => {
                room.copy_from_slice(bytes);
                buffer.truncate(bytes.len());
            }
            _ => self.refill_anew(buffer, bytes),
        }
    }

    #[inline(never)]
    fn refill_anew(&mut self, buffer: &mut Vec<u8>, bytes: &[u8]) {
        if buffer.capacity() > SMALL || buffer.capacity() < bytes.len() {
            let other = self.take(bytes.len());
            self.put(core::mem::replace(buffer, other));
        }
        buffer.clear();
        buffer.extend_from_slice(bytes);
    }

    /// Takes back what nobody needs.
    #[inline]
    pub(crate) fn put(&mut self, buffer: Vec<u8>) {
        // Where there is room already nothing is called, and no register saved.
        let has_room = self.small.len() < self.small.capacity().min(MOST);
        if (1..=SMALL).contains(&buffer.capacity()) && has_room {
            self.small.push(buffer);
        } else {
            self.put_other(buffer);
        }
    }

    #[inline(never)]
    fn put_other(&mut self, buffer: Vec<u8>) {
        let capacity = buffer.capacity();
        if capacity == 0 || self.kept() >= MOST {
            return;
        }
        if capacity <= SMALL {
            self.small.push(buffer);
        } else if self.bytes + capacity <= MOST_BYTES {
            self.bytes += capacity;
            self.large.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn what_was_put_is_taken_again_and_little_is_kept() {
        let mut pool = Pool::default();
        let buffer = pool.copy(b"abc");
        let at = buffer.as_ptr();
        pool.put(buffer);
        let again = pool.take(10);
        assert_eq!((again.as_ptr(), again.len()), (at, 0));
        pool.put(Vec::new());
        assert_eq!(pool.small.len(), 0);
        for _ in 0..2 * MOST {
            pool.put(vec![0; 100]);
        }
        assert_eq!(pool.small.len(), MOST);
        pool.put(vec![0; 2 * MOST_BYTES]);
        assert!(pool.large.is_empty() && pool.bytes <= MOST_BYTES);
    }

    #[test]
    fn large_ones_are_kept_until_it_is_quiet() {
        let mut pool = Pool::default();
        assert_eq!(pool.take_large(100_000).capacity(), 0, "none before one was put");
        pool.put(vec![7; 100_000]);
        assert_eq!(pool.take_used(90_000), vec![7; 90_000]);
        assert_eq!((pool.take_used(5000), pool.bytes), (vec![0; 5000], 0));
        for _ in 0..4 {
            pool.put(vec![7; MOST_QUIET]);
        }
        assert!(pool.take_large(MOST_QUIET).capacity() >= MOST_QUIET);
        pool.trim();
        assert_eq!((pool.large.len(), pool.bytes), (1, MOST_QUIET));
    }
}
