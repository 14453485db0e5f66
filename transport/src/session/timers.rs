//! What becomes due when: a heap with room that is kept.
//!
//! An entry is not taken out when it no longer holds; who takes it from the heap looks
//! whether it does. So setting a timer is one push, 10,000 parked calls cost nothing
//! while they wait, and nothing allocates once the heap has grown to its size.
//!
//! Invariant: at most [`Timers::new`]'s bound of entries, or twice the ones that hold,
//! whichever is more: see [`Timers::is_crowded`].

use crate::time::Instant;
use alloc::collections::BinaryHeap;
use core::cmp::Reverse;

/// Timers for things that `T` names.
#[derive(Debug)]
pub(crate) struct Timers<T: Ord> {
    heap: BinaryHeap<Reverse<(Instant, T)>>,
}

impl<T: Ord + Copy> Timers<T> {
    pub(crate) const fn new() -> Self {
        Self { heap: BinaryHeap::new() }
    }

    pub(crate) fn set(&mut self, at: Instant, what: T) {
        self.heap.push(Reverse((at, what)));
    }

    /// When the first becomes due; early where it no longer holds.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes one that is due.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<T> {
        self.pop_at(now).map(|(_, what)| what)
    }

    /// Takes one that is due, with its time.
    pub(crate) fn pop_at(&mut self, now: Instant) -> Option<(Instant, T)> {
        self.next().filter(|at| *at <= now)?;
        self.heap.pop().map(|Reverse(entry)| entry)
    }

    /// Whether more entries are there than `live` things can justify.
    pub(crate) fn is_crowded(&self, live: usize) -> bool {
        self.heap.len() > 8192 + 4 * live
    }

    /// Keeps those that hold.
    pub(crate) fn retain(&mut self, mut holds: impl FnMut(Instant, T) -> bool) {
        self.heap.retain(|Reverse((at, what))| holds(*at, *what));
    }

    pub(crate) fn clear(&mut self) {
        self.heap.clear();
    }
}

/// The earliest of some moments.
#[derive(Debug, Default)]
pub(crate) struct Earliest(pub(crate) Option<Instant>);

impl Earliest {
    #[inline]
    pub(crate) fn at(&mut self, at: Instant) {
        self.0 = Some(self.0.map_or(at, |first| first.min(at)));
    }

    #[inline]
    pub(crate) fn or(&mut self, at: Option<Instant>) {
        if let Some(at) = at {
            self.at(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::time::Duration;

    #[test]
    fn they_come_in_order_and_not_before_their_time() {
        let mut timers = Timers::new();
        let at = |ms| Instant::from_start(Duration::from_millis(ms));
        for ms in [5, 3, 9, 3] {
            timers.set(at(ms), ms);
        }
        assert_eq!((timers.next(), timers.pop(at(2))), (Some(at(3)), None));
        assert_eq!(
            [timers.pop(at(5)), timers.pop(at(5)), timers.pop(at(5))],
            [Some(3), Some(3), Some(5)]
        );
        timers.retain(|_, what| what != 9);
        assert_eq!((timers.pop(at(99)), timers.next()), (None, None));
        assert!(!timers.is_crowded(0));
        timers.clear();
    }
}
