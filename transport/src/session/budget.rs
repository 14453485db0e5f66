//! Memory that a peer makes us keep until somebody else is done with it.
//!
//! ```text
//! call in pieces ──granted──► handed out ──answered──► free
//! reply in pieces ──kept──► all of it arrived, or no longer wanted ──► free
//! ```
//!
//! What is shorter than a packet is bounded by the slots. For the rest each peer has an
//! [`Account`] for calls and one for replies, and all of them draw on one [`Total`]. Whoever
//! has nothing may always have one payload: so nobody waits for ever for what others hold.
//!
//! Invariants: an account holds at most its bound, or one payload; all together hold at most
//! the total and one payload for each account; what is [`Taken`] is given back once.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// What all accounts hold.
#[derive(Debug)]
pub(crate) struct Total {
    most: usize,
    used: AtomicUsize,
}

impl Total {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, used: AtomicUsize::new(0) })
    }

    pub(crate) fn used(&self) -> usize {
        self.used.load(Relaxed)
    }
}

#[derive(Debug)]
struct Sums {
    used: AtomicUsize,
    total: Arc<Total>,
}

/// What one peer holds.
#[derive(Debug)]
pub(crate) struct Account {
    most: usize,
    sums: Arc<Sums>,
}

impl Account {
    pub(crate) fn new(most: usize, total: &Arc<Total>) -> Self {
        let sums = Sums { used: AtomicUsize::new(0), total: Arc::clone(total) };
        Self { most, sums: Arc::new(sums) }
    }

    /// Bytes that are held.
    pub(crate) fn used(&self) -> usize {
        self.sums.used.load(Relaxed)
    }

    /// Whether half of what there may be is held.
    #[inline]
    pub(crate) fn is_half_full(&self) -> bool {
        self.used() > self.most / 2
    }

    /// Room for `bytes`, if there is any. One hub is driven by one thread at a time.
    pub(crate) fn take(&self, bytes: usize) -> Option<Taken> {
        let (used, total) = (self.used(), &self.sums.total);
        let fits = used.checked_add(bytes).is_some_and(|used| used <= self.most)
            && total.used().checked_add(bytes).is_some_and(|used| used <= total.most);
        (used == 0 || fits).then(|| {
            self.sums.used.fetch_add(bytes, Relaxed);
            total.used.fetch_add(bytes, Relaxed);
            Taken { bytes, sums: Arc::clone(&self.sums) }
        })
    }
}

/// Room that is given back when this goes.
#[derive(Debug)]
pub(crate) struct Taken {
    bytes: usize,
    sums: Arc<Sums>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.sums.used.fetch_sub(self.bytes, Relaxed);
        self.sums.total.used.fetch_sub(self.bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold_and_whoever_has_nothing_gets_one() {
        let total = Total::new(250);
        let (a, b) = (Account::new(200, &total), Account::new(200, &total));
        let first = a.take(100).expect("room");
        let second = a.take(100).expect("room");
        assert!(a.take(1).is_none() && a.is_half_full());
        let third = b.take(100).expect("nothing is held there");
        assert!(b.take(1).is_none(), "beyond the total");
        assert_eq!((a.used(), b.used(), total.used()), (200, 100, 300));
        drop((first, second));
        assert!(b.take(100).is_some() && b.take(101).is_none());
        drop(third);
        assert_eq!((a.used(), b.used(), total.used()), (0, 0, 0));
        assert!(a.take(usize::MAX / 2).is_some(), "one, however long");
    }
}
