//! Slots that are free: one bit each, the lowest first, so that few are in use at all and
//! those beyond a grant come free again.
//!
//! Invariants: a number is in once, however often it is put; no word below `first` has a bit.

use alloc::vec::Vec;

/// The numbers.
#[derive(Debug, Default)]
pub(crate) struct Free {
    words: Vec<u64>,
    /// No lower word has anything.
    first: usize,
    count: usize,
}

impl Free {
    pub(crate) const fn len(&self) -> usize {
        self.count
    }

    #[inline]
    pub(crate) fn put(&mut self, number: u16) {
        let (at, bit) = (usize::from(number) / 64, 1 << (number % 64));
        if at >= self.words.len() {
            self.widen(at);
        }
        if let Some(word) = self.words.get_mut(at)
            && *word & bit == 0
        {
            *word |= bit;
            self.count += 1;
            self.first = self.first.min(at);
        }
    }

    #[cold]
    #[inline(never)]
    fn widen(&mut self, at: usize) {
        self.words.resize(at + 1, 0);
    }

    /// Takes the lowest.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<u16> {
        while let Some(word) = self.words.get_mut(self.first) {
            if *word != 0 {
                let bit = word.trailing_zeros() as usize;
                *word &= *word - 1;
                self.count -= 1;
                return u16::try_from(self.first * 64 + bit).ok();
            }
            self.first += 1;
        }
        None
    }

    /// Keeps those below `end`.
    pub(crate) fn truncate(&mut self, end: usize) {
        self.words.truncate(end.div_ceil(64));
        if let Some(last) = self.words.get_mut(end / 64) {
            *last &= (1 << (end % 64)) - 1;
        }
        self.count = self.words.iter().map(|word| word.count_ones() as usize).sum();
    }

    pub(crate) fn clear(&mut self) {
        self.truncate(0);
        self.first = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn as_a_set_that_gives_its_lowest(
            steps in prop::collection::vec((0u8..8, 0u16..300), 0..400),
        ) {
            let (mut free, mut model) = (Free::default(), BTreeSet::new());
            for (step, number) in steps {
                match step {
                    0..4 => {
                        free.put(number);
                        model.insert(number);
                    }
                    4..7 => prop_assert_eq!(free.take(), model.pop_first()),
                    _ if number == 0 => {
                        free.clear();
                        model.clear();
                    }
                    _ => {
                        free.truncate(number.into());
                        model.retain(|one| *one < number);
                    }
                }
                prop_assert_eq!(free.len(), model.len());
            }
            free.put(u16::MAX);
            prop_assert!(free.len() > 0);
        }
    }
}
