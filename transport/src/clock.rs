//! The drivers' clock: the kernel's, and between two looks at it the processor's counter.
//!
//! ```text
//! kernel's clock  ├────────────── REACH ──────────────┤ look again
//! counter         └ anchor ── ticks × rate ──► now
//! ```
//!
//! *Why.* `clock_gettime(2)` takes 50 ns on the reference machine, the counter 12, and a call
//! has to be timed five times on its way where the whole of it takes 600.
//!
//! *How far it is trusted.* Only where the kernel itself keeps its time by it
//! (`current_clocksource` is `tsc`, which it is not where processors disagree), and for
//! half a millisecond: then the kernel is asked again, and the rate is measured anew. So a
//! virtual machine that is moved to a processor of another rate, or whose counter jumps, is
//! wrong by less than that, for that long. A look during which the thread lost its processor
//! is no anchor.
//!
//! Invariant: time does not go back.

use crate::time::Instant;
use core::cell::Cell;
use std::sync::OnceLock;

mod sys;

/// Time between two looks at the kernel's clock, and the least over which a rate is measured.
const REACH: u64 = 500_000;
/// A rate is not measured over more than that: the thread has slept.
const LONGEST: u64 = 1_000_000_000;
/// Ticks that a look may take, for its middle to be when the kernel looked.
const LOOK: u64 = 4_000;
/// Binary places behind the point in a rate.
const PLACES: u32 = 32;

/// A clock that starts at [`Instant::START`].
#[derive(Debug)]
pub(crate) struct Clock {
    started: std::time::Instant,
    anchor: Cell<Anchor>,
    last: Cell<u64>,
    has_counter: bool,
}

/// When the kernel was asked last.
#[derive(Clone, Copy, Debug)]
struct Anchor {
    ticks: u64,
    nanos: u64,
    /// Nanoseconds a tick takes; zero while it is not known.
    rate: u64,
    /// Ticks for which this one is good.
    reach: u64,
}

impl Anchor {
    /// From this look on, by the rate since the one before.
    fn next(self, ticks: u64, nanos: u64) -> Self {
        let (passed, took) = (ticks.wrapping_sub(self.ticks), nanos.saturating_sub(self.nanos));
        if self.rate == 0 && took < REACH {
            return self;
        }
        let is_measured = (REACH..LONGEST).contains(&took) && passed != 0;
        let rate = if is_measured { (took << PLACES) / passed } else { self.rate };
        let reach = (REACH << PLACES).checked_div(rate).unwrap_or(0);
        Self { ticks, nanos, rate, reach }
    }
}

impl Clock {
    pub(crate) fn new() -> Self {
        let clock = Self {
            started: std::time::Instant::now(),
            anchor: Cell::new(Anchor { ticks: sys::counter(), nanos: 0, rate: 0, reach: 0 }),
            last: Cell::new(0),
            has_counter: is_trusted(),
        };
        clock.now();
        clock
    }

    #[inline]
    pub(crate) fn now(&self) -> Instant {
        let anchor = self.anchor.get();
        let nanos = if self.has_counter {
            let ticks = sys::counter();
            let passed = ticks.wrapping_sub(anchor.ticks);
            if passed < anchor.reach {
                // The reach is REACH by this rate, so this is no more than that.
                anchor.nanos + ((passed * anchor.rate) >> PLACES)
            } else {
                self.look(anchor, ticks)
            }
        } else {
            self.kernel()
        };
        let nanos = nanos.max(self.last.get());
        self.last.set(nanos);
        Instant::START.later(nanos)
    }

    fn kernel(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    #[cold]
    fn look(&self, anchor: Anchor, before: u64) -> u64 {
        let nanos = self.kernel();
        let took = sys::counter().wrapping_sub(before);
        if took < LOOK {
            self.anchor.set(anchor.next(before.wrapping_add(took / 2), nanos));
        }
        nanos
    }
}

/// Whether the kernel keeps its time by this processor's counter.
fn is_trusted() -> bool {
    const CHOICE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    static TRUSTED: OnceLock<bool> = OnceLock::new();
    *TRUSTED.get_or_init(|| {
        sys::HAS_COUNTER && std::fs::read(CHOICE).is_ok_and(|choice| choice.trim_ascii() == b"tsc")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn it_goes_with_the_kernels_and_never_back() {
        let (before, clock) = (std::time::Instant::now(), Clock::new());
        let (after, slack) = (std::time::Instant::now(), Duration::from_millis(1));
        let mut last = Instant::START;
        for n in 0..200_000 {
            let least = after.elapsed();
            let now = clock.now();
            let most = before.elapsed();
            assert!(now >= last, "{n}");
            assert!(now.since_start() + slack >= least, "{n}: {now:?}, kernel's {least:?}");
            assert!(now.since_start() <= most + slack, "{n}: {now:?}, kernel's {most:?}");
            last = now;
            if n % 50_000 == 0 {
                std::thread::sleep(Duration::from_millis(3));
            }
        }
    }

    #[test]
    fn a_counter_that_jumps_is_asked_for_at_once() {
        let anchor = Anchor { ticks: 100, nanos: 0, rate: 0, reach: 0 };
        // Too soon for a rate: the first look stays.
        assert_eq!(anchor.next(1000, REACH / 2).ticks, 100);
        let measured = anchor.next(100 + 2 * REACH, REACH);
        assert_eq!((measured.rate, measured.reach), (1 << 31, 2 * REACH));
        // It went back: whatever has passed is beyond the reach.
        assert!(50u64.wrapping_sub(measured.ticks) >= measured.reach);
        // A thread that has slept keeps its rate; one whose counter stood still, too.
        assert_eq!(measured.next(7, REACH + LONGEST).rate, 1 << 31);
        assert_eq!(measured.next(measured.ticks, 3 * REACH).rate, 1 << 31);
    }
}
