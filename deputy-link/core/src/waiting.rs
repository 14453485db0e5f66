//! How to wait for the other half: spin, then block.
//!
//! Waking a processor takes tens of microseconds, asking a socket a fraction of one.
//! So a half asks for a while before it blocks, as long as this pays: where the other
//! half shares its processor, or computes for long, the asking finds nothing, and
//! is left off for ever more waits (4, 8, … 1024) until it is tried again. What was
//! there at the first question teaches nothing.

/// How often a socket is asked before blocking: some 50 µs.
pub const TRIES: u32 = 200;
/// Waits without asking after the first that it did not shorten.
const FIRST_PAUSE: u32 = 4;
/// The most.
const LAST_PAUSE: u32 = 1024;

/// What earlier waits have taught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Waits to come without asking.
    skip: u32,
    /// How many these are the next time.
    pause: u32,
}

impl Default for Waiting {
    fn default() -> Self {
        Self::new()
    }
}

impl Waiting {
    /// Nothing is known.
    #[must_use]
    pub const fn new() -> Self {
        Self { skip: 0, pause: FIRST_PAUSE }
    }

    /// How often to ask in the wait that begins.
    pub const fn tries(&mut self) -> u32 {
        if self.skip == 0 {
            TRIES
        } else {
            self.skip -= 1;
            0
        }
    }

    /// Of the tries that [`Self::tries`] gave, `left` were not needed; 0 means that
    /// the wait went on.
    pub const fn learn(&mut self, tries: u32, left: u32) {
        if tries == 0 || left + 1 == tries {
            return;
        }
        if left > 0 {
            self.pause /= 2;
            if self.pause < FIRST_PAUSE {
                self.pause = FIRST_PAUSE;
            }
        } else {
            self.skip = self.pause;
            self.pause *= 2;
            if self.pause > LAST_PAUSE {
                self.pause = LAST_PAUSE;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits of which none, or each, is shortened; how many asked.
    fn asked(waiting: &mut Waiting, waits: u32, left: u32) -> u32 {
        let mut count = 0;
        for _ in 0..waits {
            let tries = waiting.tries();
            count += u32::from(tries > 0);
            waiting.learn(tries, left);
        }
        count
    }

    #[test]
    fn asking_goes_on_while_it_pays() {
        assert_eq!(asked(&mut Waiting::new(), 1000, 7), 1000);
    }

    #[test]
    fn asking_is_left_off_where_it_never_pays() {
        let mut waiting = Waiting::new();
        // 4 + 8 + … + 1024 waits, and one that asks before each pause.
        assert!(asked(&mut waiting, 2100, 0) <= 10);
        assert_eq!(asked(&mut waiting, 1025 * 3, 0), 3);
        // On a shared processor the answer is often there already.
        asked(&mut waiting, 5000, TRIES - 1);
        let tries = waiting.tries();
        waiting.learn(tries, 0);
        assert_eq!(asked(&mut waiting, 1000, 0), 0);
    }

    #[test]
    fn asking_comes_back() {
        let mut waiting = Waiting::new();
        asked(&mut waiting, 100_000, 0);
        assert!(asked(&mut waiting, 1025, 1) >= 1);
        assert_eq!(asked(&mut waiting, 1000, 1), 1000);
    }
}
