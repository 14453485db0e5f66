//! Round-trip time, and the timeouts that follow from it.
//!
//! RFC 9002 §5 with the constants of a LAN: 200 µs where it has 1 ms or more. Every
//! retransmission has a number of its own, so samples are never ambiguous.

use crate::time::Instant;
use core::time::Duration;

/// Least time before a call is sent again. Below it, the scheduler of a busy server
/// costs more than the network loses.
const RTO_MIN: Duration = Duration::from_micros(200);
/// The same over a stream, which repairs by itself: only its end loses anything, and that
/// is noticed otherwise.
const RTO_MIN_STREAM: Duration = Duration::from_millis(500);
/// Most time between two transmissions of a call, and the pause after WORKING.
pub(crate) const PROBE: Duration = Duration::from_secs(1);
/// Most time between two questions about a call that is parked. Its reply comes by
/// itself; the question only guards against a server that has forgotten.
pub(crate) const PARKED_PROBE: Duration = Duration::from_secs(30);
/// Timer granularity (RFC 9002 §6.1.2: `kGranularity`).
const GRANULARITY: Duration = Duration::from_micros(100);
/// Before the first sample.
const INITIAL: Duration = Duration::from_millis(5);

/// Estimator of one path's round-trip time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rtt {
    smoothed: Option<Duration>,
    variance: Duration,
    latest: Duration,
    is_patient: bool,
    /// [`Self::call_timeout`] since the last sample: each call asks for it.
    timeout: Option<Pause>,
}

impl Rtt {
    /// Of a path that repairs by itself, or not.
    pub(crate) fn over(is_patient: bool) -> Self {
        Self { is_patient, ..Self::default() }
    }

    pub(crate) const fn set_patient(&mut self, is_patient: bool) {
        self.is_patient = is_patient;
        self.timeout = None;
    }

    const fn least(&self) -> Duration {
        if self.is_patient { RTO_MIN_STREAM } else { RTO_MIN }
    }

    /// A round trip took `sample`, the peer's own delay taken off.
    #[inline(never)]
    pub(crate) fn on_sample(&mut self, sample: Duration) {
        self.latest = sample;
        match self.smoothed {
            None => {
                self.smoothed = Some(sample);
                self.variance = sample / 2;
            }
            Some(smoothed) => {
                let error = smoothed.abs_diff(sample);
                self.variance = (self.variance * 3 + error) / 4;
                self.smoothed = Some((smoothed * 7 + sample) / 8);
            }
        }
        self.timeout = Some(Pause::of(self.next_timeout()));
    }

    /// A round trip took `bound` at most, the peer's unknown delay included: a
    /// sample only where it improves on what is known.
    #[inline]
    pub(crate) fn on_upper_bound(&mut self, bound: Duration) {
        if self.smoothed.is_none_or(|smoothed| bound < smoothed) {
            self.on_sample(bound);
        }
    }

    pub(crate) const fn smoothed(&self) -> Option<Duration> {
        self.smoothed
    }

    /// The newest sample; zero before the first.
    pub(crate) const fn latest(&self) -> Duration {
        self.latest
    }

    fn estimate(&self) -> Duration {
        self.smoothed.unwrap_or(INITIAL)
    }

    /// When a call without an answer is sent again.
    #[inline]
    pub(crate) fn call_timeout(&self) -> Pause {
        self.timeout.unwrap_or_else(|| Pause::of(self.next_timeout()))
    }

    fn next_timeout(&self) -> Duration {
        (self.estimate() * 4).clamp(self.least(), PROBE)
    }

    /// When a tracked packet without an acknowledgement is sent again.
    pub(crate) fn probe_timeout(&self) -> Duration {
        let variance = if self.smoothed.is_some() { self.variance } else { INITIAL / 2 };
        (self.estimate() + (variance * 4).max(GRANULARITY)).clamp(self.least(), PROBE)
    }

    /// How long an unacknowledged packet below an acknowledged one may be late
    /// (RFC 9002 §6.1.2: 9/8).
    pub(crate) fn loss_delay(&self) -> Duration {
        (self.estimate().max(self.latest) * 9 / 8).max(GRANULARITY)
    }
}

/// Time between two questions. One word: each call counts with it, and a `Duration` is two.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Pause(u64);

impl Pause {
    /// Of so long; of 584 years at most.
    pub(crate) const fn of(time: Duration) -> Self {
        Self(Instant::from_start(time).nanos())
    }

    /// The next of a row of growing ones: half as long again, at most [`PROBE`] or what it was.
    #[inline]
    pub(crate) fn longer(self) -> Self {
        Self(self.0.saturating_add(self.0 / 2).min(Self::of(PROBE).0).max(self.0))
    }

    /// The next one of a parked call: half as long again, at most [`PARKED_PROBE`].
    pub(crate) fn longer_parked(self) -> Self {
        Self(self.0.saturating_add(self.0 / 2)).min(Self::of(PARKED_PROBE))
    }

    /// When it ends that begins at `now`.
    #[inline]
    pub(crate) const fn after(self, now: Instant) -> Instant {
        now.later(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_stay_within_their_bounds() {
        let mut rtt = Rtt::default();
        assert_eq!(rtt.call_timeout(), Pause::of(INITIAL * 4));
        for _ in 0..20 {
            rtt.on_sample(Duration::from_micros(40));
        }
        assert_eq!(rtt.call_timeout(), Pause::of(RTO_MIN));
        assert_eq!(rtt.probe_timeout(), RTO_MIN);
        for _ in 0..50 {
            rtt.on_sample(Duration::from_secs(3));
        }
        assert_eq!(rtt.call_timeout(), Pause::of(PROBE));
        assert_eq!(rtt.probe_timeout(), PROBE);
    }

    #[test]
    fn an_upper_bound_only_improves() {
        let mut rtt = Rtt::default();
        rtt.on_upper_bound(Duration::from_millis(50));
        rtt.on_upper_bound(Duration::from_millis(900));
        assert_eq!(rtt.smoothed(), Some(Duration::from_millis(50)));
        rtt.on_upper_bound(Duration::from_millis(10));
        assert_eq!(rtt.smoothed(), Some(Duration::from_millis(45)));
    }

    #[test]
    fn pauses_grow_to_a_second() {
        let mut pause = Pause::of(RTO_MIN);
        let mut at = Instant::START;
        let mut steps = 0;
        while pause < Pause::of(PROBE) {
            at = pause.after(at);
            pause = pause.longer();
            steps += 1;
        }
        assert_eq!((steps, pause), (22, Pause::of(PROBE)));
        assert!(at.since_start() < Duration::from_secs(3));
        let parked = Pause::of(PARKED_PROBE);
        assert_eq!((parked.longer(), parked.longer_parked()), (parked, parked));
    }
}
