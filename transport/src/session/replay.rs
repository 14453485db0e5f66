//! Which packet numbers have been seen: a sliding window over the newest ones.
//!
//! As in RFC 6479: the bitmap is a ring of words that slides by whole words, so
//! that a step never shifts bits. One word more than the width is kept, which is
//! the word being filled.
//!
//! ```text
//!      too old: refused │◄──────── WIDTH ────────►│ newer: accepted, the window slides
//!  ─────────────────────┴─────────────────────────┴──────────►
//!                                             highest
//! ```
//!
//! Invariants: a number is accepted at most once; a number `WIDTH` or more below
//! the highest accepted one is refused; nothing but [`mark`](Window::mark) moves
//! the window, so a packet that fails authentication leaves no trace.

/// Numbers below the highest that can still be accepted. At 10 Gbit/s and 1400-byte
/// packets this is 9 ms of reordering; WireGuard uses the same width.
pub const WIDTH: u64 = 8192;
const WORDS: usize = 129;

/// A replay window; 1 KiB, no allocation.
#[derive(Clone, Debug)]
pub struct Window {
    /// Lowest number above all that were accepted; zero before the first.
    next: u64,
    words: [u64; WORDS],
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}

impl Window {
    /// A window that has seen nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { next: 0, words: [0; WORDS] }
    }

    /// One more than the highest accepted number; zero before the first.
    #[must_use]
    pub const fn next(&self) -> u64 {
        self.next
    }

    /// Whether `number` is new; changes nothing.
    #[must_use]
    pub fn is_new(&self, number: u64) -> bool {
        if number == u64::MAX {
            return false;
        }
        if number >= self.next {
            return true;
        }
        if self.next - number > WIDTH {
            return false;
        }
        let (word, bit) = place(number);
        self.words.get(word).is_some_and(|word| word & bit == 0)
    }

    /// Records `number` as seen; says whether it was new.
    ///
    /// `u64::MAX` is never new: no sealer gives it out.
    pub fn mark(&mut self, number: u64) -> bool {
        if !self.is_new(number) {
            return false;
        }
        if number >= self.next {
            // Words that the window enters hold bits of a round ago.
            let first = self.next.div_ceil(64);
            let last = number / 64;
            let stale = last.saturating_sub(first).saturating_add(1).min(WORDS as u64);
            if first <= last {
                for word in last + 1 - stale..=last {
                    let (index, _) = place(word * 64);
                    if let Some(word) = self.words.get_mut(index) {
                        *word = 0;
                    }
                }
            }
            self.next = number + 1;
        }
        let (index, bit) = place(number);
        if let Some(word) = self.words.get_mut(index) {
            *word |= bit;
        }
        true
    }
}

const fn place(number: u64) -> (usize, u64) {
    ((number / 64 % WORDS as u64) as usize, 1 << (number % 64))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// What the window must do, said plainly and slowly.
    #[derive(Clone, Default)]
    struct Model {
        seen: BTreeSet<u64>,
    }

    impl Model {
        fn mark(&mut self, number: u64) -> bool {
            let next = self.seen.last().map_or(0, |highest| highest + 1);
            let new = number != u64::MAX
                && !self.seen.contains(&number)
                && (number >= next || next - number <= WIDTH);
            if new {
                self.seen.insert(number);
            }
            new
        }
    }

    /// Every sequence of five numbers from a set that lies on all edges.
    #[test]
    fn exhaustive_small_model() {
        let edges =
            [0, 1, 63, 64, WIDTH - 1, WIDTH, WIDTH + 1, WIDTH + 63, WIDTH + 64, 2 * WIDTH + 65];
        fn walk(depth: u32, window: &Window, model: &Model, edges: &[u64]) -> u32 {
            if depth == 0 {
                return 1;
            }
            let mut walks = 0;
            for &number in edges {
                let (mut window, mut model) = (window.clone(), model.clone());
                assert_eq!(window.is_new(number), model.clone().mark(number));
                assert_eq!(window.mark(number), model.mark(number), "{number} {:?}", model.seen);
                assert_eq!(window.next(), model.seen.last().map_or(0, |n| n + 1));
                walks += walk(depth - 1, &window, &model, edges);
            }
            walks
        }
        assert_eq!(walk(5, &Window::new(), &Model::default(), &edges), 100_000);
    }

    #[test]
    fn the_last_number_is_never_new() {
        let mut window = Window::new();
        assert!(!window.mark(u64::MAX));
        assert!(window.mark(u64::MAX - 1));
        assert!(!window.mark(u64::MAX - 1));
        assert!(window.mark(u64::MAX - WIDTH));
        assert!(!window.mark(0));
    }

    proptest! {
        #[test]
        fn agrees_with_the_model(steps in prop::collection::vec((0u64..3 * WIDTH, any::<bool>()), 1..400)) {
            let (mut window, mut model) = (Window::new(), Model::default());
            let mut base = 0u64;
            for (step, forward) in steps {
                let number = if forward { base + step % 200 } else { base.saturating_sub(step) };
                prop_assert_eq!(window.mark(number), model.mark(number));
                base = base.max(number);
            }
        }
    }
}
