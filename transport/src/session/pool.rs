//! Buffers that are used again, so that a call allocates nothing.
//!
//! Payloads are `Vec`s that change hands between the session and its user. What comes
//! back goes here, and the next payload is written into it.
//!
//! Invariant: at most [`MOST`] buffers and [`MOST_BYTES`] of capacity are kept.

use alloc::vec::Vec;

/// Most buffers that are kept.
const MOST: usize = 512;
/// Most bytes that are kept: one large payload, and many small ones.
const MOST_BYTES: usize = 4 * 1024 * 1024;
/// Up to this capacity a buffer is small; a call in one packet never needs more.
const SMALL: usize = 4096;

/// Free buffers.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    small: Vec<Vec<u8>>,
    large: Vec<Vec<u8>>,
    bytes: usize,
}

impl Pool {
    /// An empty buffer with room for `length` bytes.
    pub(crate) fn take(&mut self, length: usize) -> Vec<u8> {
        let shelf = if length > SMALL { &mut self.large } else { &mut self.small };
        let mut buffer = shelf.pop().unwrap_or_default();
        self.bytes -= buffer.capacity();
        buffer.clear();
        // Small ones all get the same room, so that each fits any small payload.
        buffer.reserve(if length > SMALL {
            length
        } else {
            SMALL.min(length.max(64).next_power_of_two())
        });
        buffer
    }

    /// Buffers that are kept.
    pub(crate) const fn kept(&self) -> usize {
        self.small.len() + self.large.len()
    }

    /// A buffer with a copy of `bytes`.
    pub(crate) fn copy(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut buffer = self.take(bytes.len());
        buffer.extend_from_slice(bytes);
        buffer
    }

    /// Takes back what nobody needs.
    pub(crate) fn put(&mut self, buffer: Vec<u8>) {
        let capacity = buffer.capacity();
        if capacity == 0
            || self.small.len() + self.large.len() >= MOST
            || self.bytes + capacity > MOST_BYTES
        {
            return;
        }
        self.bytes += capacity;
        let shelf = if capacity > SMALL { &mut self.large } else { &mut self.small };
        shelf.push(buffer);
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
}
