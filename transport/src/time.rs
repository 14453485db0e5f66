//! Time as the cores see it: nanoseconds since a moment that the driver chose.
//!
//! No core reads a clock. The driver hands in a monotonic time with every input,
//! and tests hand in whatever they like.

use core::ops::{Add, Sub};
use core::time::Duration;

/// A point in monotonic time; nanoseconds since an arbitrary start.
///
/// Reaches 584 years; arithmetic saturates at both ends.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Instant {
    nanos: u64,
}

impl Instant {
    /// The start itself.
    pub const START: Self = Self { nanos: 0 };

    /// `since_start` after the start.
    #[must_use]
    pub const fn from_start(since_start: Duration) -> Self {
        Self { nanos: nanos(since_start) }
    }

    /// Time since the start.
    #[must_use]
    pub const fn since_start(self) -> Duration {
        Duration::from_nanos(self.nanos)
    }

    /// This, or the next moment that is a multiple of `step` after the start.
    #[must_use]
    pub fn rounded_up(self, step: Duration) -> Self {
        let step = nanos(step).max(1);
        Self { nanos: self.nanos.div_ceil(step).saturating_mul(step) }
    }

    pub(crate) const fn nanos(self) -> u64 {
        self.nanos
    }

    /// So many nanoseconds after this.
    #[inline]
    pub(crate) const fn later(self, nanos: u64) -> Self {
        Self { nanos: self.nanos.saturating_add(nanos) }
    }

    /// Time from `earlier` to this, zero if that lies ahead.
    #[must_use]
    #[inline]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.nanos.saturating_sub(earlier.nanos))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    #[inline]
    fn add(self, later: Duration) -> Self {
        Self { nanos: self.nanos.saturating_add(nanos(later)) }
    }
}

impl Sub<Duration> for Instant {
    type Output = Self;

    #[inline]
    fn sub(self, earlier: Duration) -> Self {
        Self { nanos: self.nanos.saturating_sub(nanos(earlier)) }
    }
}

#[inline]
const fn nanos(duration: Duration) -> u64 {
    let (seconds, rest) = (duration.as_secs(), duration.subsec_nanos());
    seconds.saturating_mul(1_000_000_000).saturating_add(rest as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saturates_at_both_ends() {
        let late = Instant::START + Duration::MAX;
        assert_eq!(late + Duration::from_secs(1), late);
        assert_eq!(Instant::START - Duration::from_secs(1), Instant::START);
        assert_eq!(Instant::START.since(late), Duration::ZERO);
        let second = Duration::from_secs(1);
        let early = Instant::START + second / 3;
        assert_eq!(early.rounded_up(second), Instant::START + second);
        assert_eq!((Instant::START + second).rounded_up(second), Instant::START + second);
        assert_eq!((Instant::START + second).since_start(), second);
        assert_eq!(Instant::from_start(second).since(Instant::START), second);
    }
}
