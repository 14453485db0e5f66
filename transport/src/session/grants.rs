//! Memory for payloads that arrive in pieces, and who may send more.
//!
//! ```text
//! first piece ──begin──► first 64 KiB set aside ──grant──► all of it set aside ──end──► free
//! ```
//!
//! The shortest payload is granted first, so that a small one does not wait for a large
//! one; every fourth grant goes to the oldest, and waits until there is room for that
//! one, so that a large one is not put off for ever.
//!
//! Invariants: never more than the budget is set aside; what is set aside for ungranted
//! beginnings leaves room for the longest payload, so something can always be granted.

use super::payload::UNASKED;
use alloc::vec::Vec;

/// One grant in so many goes to the oldest.
const FAIR: u32 = 4;

#[derive(Debug)]
struct Claim {
    slot: u16,
    sequence: u64,
    missing: usize,
}

/// What of the budget is set aside, and who waits for more.
#[derive(Debug)]
pub(crate) struct Grants {
    budget: usize,
    longest: usize,
    used: usize,
    beginnings: usize,
    waiting: Vec<Claim>,
    turn: u32,
}

impl Grants {
    /// `budget` bytes, at least twice `longest`, the longest payload.
    pub(crate) const fn new(budget: usize, longest: usize) -> Self {
        Self { budget, longest, used: 0, beginnings: 0, waiting: Vec::new(), turn: 0 }
    }

    /// Bytes that are set aside.
    pub(crate) const fn used(&self) -> usize {
        self.used
    }

    /// Sets memory aside for the beginning of a payload of `total` bytes, or for all of
    /// it where its sender does not wait for grants. Gives how much of it may come;
    /// `None` if there is no room now.
    pub(crate) fn begin(
        &mut self,
        slot: u16,
        sequence: u64,
        total: usize,
        whole: bool,
    ) -> Option<usize> {
        if total > self.longest {
            return None;
        }
        if whole {
            self.used = Some(self.used + total).filter(|used| *used <= self.budget)?;
            return Some(total);
        }
        let first = total.min(UNASKED);
        if self.used + first > self.budget || self.beginnings + first > self.budget - self.longest {
            return None;
        }
        self.used += first;
        self.beginnings += first;
        if first < total {
            self.waiting.push(Claim { slot, sequence, missing: total - first });
        }
        Some(first)
    }

    /// Sets aside what a thawed payload has; `None` if it does not fit.
    pub(crate) fn restore(
        &mut self,
        slot: u16,
        sequence: u64,
        total: usize,
        granted: usize,
        whole: bool,
    ) -> Option<()> {
        if whole || (granted == total && total > UNASKED) {
            return self.begin(slot, sequence, total, true).map(drop);
        }
        let begun = self.begin(slot, sequence, total, false)?;
        (begun == granted).then_some(())
    }

    /// A payload that has arrived waits for room of another kind.
    pub(crate) fn wait(&mut self, slot: u16, sequence: u64) {
        self.waiting.push(Claim { slot, sequence, missing: 0 });
    }

    /// Who waits.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (u16, u64)> {
        self.waiting.iter().map(|claim| (claim.slot, claim.sequence))
    }

    /// Chooses who may send the rest, or go on, if that one `fits` elsewhere as well; call
    /// until `None`.
    #[inline]
    pub(crate) fn grant(&mut self, fits: impl FnOnce(u16) -> bool) -> Option<(u16, u64)> {
        if self.waiting.is_empty() { None } else { self.grant_one(fits) }
    }

    fn grant_one(&mut self, fits: impl FnOnce(u16) -> bool) -> Option<(u16, u64)> {
        let fair = self.turn % FAIR == FAIR - 1;
        let at = if fair {
            0
        } else {
            let shortest = self.waiting.iter().enumerate().min_by_key(|(_, claim)| claim.missing);
            shortest.map_or(0, |(at, _)| at)
        };
        let claim = self.waiting.get(at)?;
        if self.used + claim.missing > self.budget || !fits(claim.slot) {
            return None;
        }
        self.turn = self.turn.wrapping_add(1);
        // In order: the first is the oldest.
        let Claim { slot, sequence, missing } = self.waiting.remove(at);
        self.used += missing;
        if missing > 0 {
            self.beginnings -= UNASKED;
        }
        Some((slot, sequence))
    }

    /// A payload of `total` bytes has arrived or is no longer wanted; `granted` of it
    /// could come.
    pub(crate) fn end(
        &mut self,
        slot: u16,
        sequence: u64,
        total: usize,
        granted: usize,
        whole: bool,
    ) {
        self.used -= granted;
        // After a grant the beginning is no longer one; of a short one it always is.
        if !whole && (granted < total || total <= UNASKED) {
            self.beginnings -= granted;
        }
        // One that has arrived may wait as well.
        self.waiting.retain(|claim| (claim.slot, claim.sequence) != (slot, sequence));
    }

    /// All payloads are gone.
    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.budget, self.longest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const LONGEST: usize = 1 << 20;

    #[test]
    fn the_shortest_comes_first_and_the_oldest_is_not_put_off() {
        let mut grants = Grants::new(4 * LONGEST, LONGEST);
        for (slot, total) in [(0, LONGEST), (1, 900_000), (2, 100_000), (3, 70_000), (4, 80_000)] {
            assert_eq!(grants.begin(slot, 1, total, false), Some(UNASKED));
        }
        let order: Vec<u16> =
            core::iter::from_fn(|| grants.grant(|_| true).map(|(slot, _)| slot)).collect();
        assert_eq!(order, [3, 4, 2, 0, 1]);
    }

    proptest! {
        /// Whatever begins and ends, the budget holds, and something can always go on.
        #[test]
        fn the_budget_holds_and_nothing_is_stuck(
            steps in prop::collection::vec((0u8..3, 0u16..40, 1usize..=LONGEST, any::<bool>()), 1..300),
        ) {
            let mut grants = Grants::new(2 * LONGEST, LONGEST);
            let mut live: BTreeMap<u16, (usize, usize, bool)> = BTreeMap::new();
            for (step, slot, total, whole) in steps {
                match step {
                    0 | 1 if !live.contains_key(&slot) => {
                        if let Some(granted) = grants.begin(slot, 7, total, whole) {
                            prop_assert!(granted == total || (granted == UNASKED && !whole));
                            live.insert(slot, (total, granted, whole));
                        }
                    }
                    _ => if let Some((total, granted, whole)) = live.remove(&slot) {
                        grants.end(slot, 7, total, granted, whole);
                    }
                }
                while let Some((slot, _)) = grants.grant(|_| true) {
                    let entry = live.get_mut(&slot).expect("live");
                    entry.1 = entry.0;
                }
                let used: usize = live.values().map(|(_, granted, _)| granted).sum();
                prop_assert_eq!(grants.used(), used);
                prop_assert!(used <= 2 * LONGEST);
                let stuck = live.values().all(|(total, granted, _)| granted < total);
                prop_assert!(live.is_empty() || !stuck, "{:?}", live);
            }
            for (slot, (total, granted, whole)) in live {
                grants.end(slot, 7, total, granted, whole);
            }
            prop_assert_eq!((grants.used(), grants.beginnings, grants.waiting.len()), (0, 0, 0));
        }
    }
}
