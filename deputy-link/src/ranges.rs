//! Sets of pages, as ranges of addresses.

use std::collections::BTreeMap;

/// A set of addresses, kept as disjoint ranges that do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges {
    /// Start to end.
    map: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Nothing.
    pub(crate) const fn new() -> Self {
        Self { map: BTreeMap::new() }
    }

    /// Adds `start..end`.
    pub(crate) fn insert(&mut self, (mut start, mut end): (u64, u64)) {
        if start >= end {
            return;
        }
        if let Some((&before, &until)) = self.map.range(..=start).next_back()
            && until >= start
        {
            if until >= end {
                return;
            }
            start = before;
        }
        while let Some((&next, &until)) = self.map.range(start..=end).next() {
            end = end.max(until);
            self.map.remove(&next);
        }
        self.map.insert(start, end);
    }

    /// Takes `start..end` out.
    pub(crate) fn remove(&mut self, (start, end): (u64, u64)) {
        if start >= end {
            return;
        }
        let parts: Vec<_> = self.within((start, end)).collect();
        for (from, to) in parts {
            if let Some((&before, &until)) = self.map.range(..=from).next_back() {
                self.map.remove(&before);
                if before < from {
                    self.map.insert(before, from);
                }
                if to < until {
                    self.map.insert(to, until);
                }
            }
        }
    }

    /// What of the set lies in `start..end`, ascending.
    pub(crate) fn within(&self, (start, end): (u64, u64)) -> impl Iterator<Item = (u64, u64)> {
        let before = self.map.range(..start).next_back().map(|(&from, &to)| (from, to));
        before
            .into_iter()
            .chain(self.map.range(start..end.max(start)).map(|(&from, &to)| (from, to)))
            .map(move |(from, to)| (from.max(start), to.min(end)))
            .filter(|(from, to)| from < to)
    }

    /// The set, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.map.iter().map(|(&start, &end)| (start, end))
    }

    /// How many addresses are in it.
    pub(crate) fn len(&self) -> u64 {
        self.iter().map(|(start, end)| end - start).sum()
    }

    /// Whether all of `start..end` is in the set.
    pub(crate) fn covers(&self, (start, end): (u64, u64)) -> bool {
        self.map.range(..=start).next_back().is_some_and(|(_, &until)| until >= end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn agrees_with_a_set_of_numbers() {
        let mut random = conet_testkit::random::Random::new(3);
        let mut below = |limit| random.below(limit);
        let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
        for _ in 0..3000 {
            let start = below(200);
            let end = start + below(20);
            match below(3) {
                0 => {
                    ranges.remove((start, end));
                    model.retain(|n| !(start..end).contains(n));
                }
                1 => {
                    ranges.insert((start, end));
                    model.extend(start..end);
                }
                _ => {
                    let got: Vec<u64> =
                        ranges.within((start, end)).flat_map(|(a, b)| a..b).collect();
                    let want: Vec<u64> = model.range(start..end).copied().collect();
                    assert_eq!(got, want);
                    let all = start < end && (start..end).all(|n| model.contains(&n));
                    assert_eq!(start < end && ranges.covers((start, end)), all);
                }
            }
            assert_eq!(ranges.len(), model.len() as u64);
            let all: Vec<u64> = ranges.iter().flat_map(|(a, b)| a..b).collect();
            assert_eq!(all, model.iter().copied().collect::<Vec<_>>());
            assert!(ranges.iter().zip(ranges.iter().skip(1)).all(|(a, b)| a.1 < b.0));
        }
    }
}
