//! How to wait for the other half: spin, then block.
//!
//! Waking a processor takes tens of microseconds, asking a socket a fraction of one.
//! So a half asks for a while before it blocks, as long as this pays. It does not
//! where the other half computes for long, and not where the two share a processor:
//! there the answer comes only when the asking is put off for the other half, which
//! the kernel counts (involuntary context switches, getrusage(2)). Asking is then left
//! off for 4, 8, … 1024 waits, and tried again. What was there at the first question
//! teaches nothing.

/// How often a socket is asked before blocking: some 50 µs.
pub const TRIES: u32 = 200;
/// Waits without asking after the first that it did not shorten.
const FIRST_PAUSE: u32 = 4;
/// The most.
const LAST_PAUSE: u32 = 1024;

/// Answers in a row after which it is looked at how they came.
const STREAK: u32 = 16;

/// What earlier waits have taught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Waits to come without asking.
    skip: u32,
    /// How many these are the next time.
    pause: u32,
    /// Waits that asking has ended since `switches` was known.
    paid: u32,
    /// Involuntary context switches then.
    switches: u64,
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
        Self { skip: 0, pause: FIRST_PAUSE, paid: 0, switches: 0 }
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
    /// the wait went on. `switches` gives this half's involuntary context switches.
    pub fn learn(&mut self, tries: u32, left: u32, switches: impl Fn() -> u64) {
        if tries == 0 || left + 1 == tries {
            return;
        }
        if left == 0 {
            self.leave_off(self.pause);
            return;
        }
        if self.paid == 0 {
            self.switches = switches();
        }
        self.paid += 1;
        if self.paid > STREAK {
            let put_off = switches().wrapping_sub(self.switches);
            if put_off >= u64::from(STREAK / 2) {
                self.leave_off(LAST_PAUSE);
            } else {
                (self.paid, self.pause) = (0, FIRST_PAUSE);
            }
        }
    }

    fn leave_off(&mut self, pause: u32) {
        self.skip = pause;
        self.pause = (pause * 2).min(LAST_PAUSE);
        self.paid = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits of which none, or each, is shortened, every `put_off`-th by giving way;
    /// how many asked.
    fn asked(waiting: &mut Waiting, waits: u32, left: u32, put_off: u32) -> u32 {
        let mut count = 0;
        let mut switches = 0;
        for _ in 0..waits {
            let tries = waiting.tries();
            count += u32::from(tries > 0);
            switches += u64::from(put_off != 0 && count.is_multiple_of(put_off.max(1)));
            waiting.learn(tries, left, || switches);
        }
        count
    }

    #[test]
    fn asking_goes_on_while_it_pays() {
        assert_eq!(asked(&mut Waiting::new(), 1000, 7, 0), 1000);
        assert_eq!(asked(&mut Waiting::new(), 1000, 7, 10), 1000);
    }

    #[test]
    fn asking_is_left_off_where_it_never_pays() {
        let mut waiting = Waiting::new();
        // 4 + 8 + … + 1024 waits, and one that asks before each pause.
        assert!(asked(&mut waiting, 2100, 0, 0) <= 10);
        assert_eq!(asked(&mut waiting, 1025 * 3, 0, 0), 3);
        // On a shared processor the answer is often there already.
        asked(&mut waiting, 5000, TRIES - 1, 0);
        let tries = waiting.tries();
        waiting.learn(tries, 0, || 0);
        assert_eq!(asked(&mut waiting, 1000, 0, 0), 0);
    }

    #[test]
    fn asking_is_left_off_on_a_shared_processor() {
        let mut waiting = Waiting::new();
        assert!(asked(&mut waiting, 10_000, 100, 1) <= 200);
    }

    #[test]
    fn asking_comes_back() {
        let mut waiting = Waiting::new();
        asked(&mut waiting, 100_000, 0, 0);
        assert!(asked(&mut waiting, 1025, 1, 0) >= 1);
        assert_eq!(asked(&mut waiting, 1000, 1, 0), 1000);
    }
}
