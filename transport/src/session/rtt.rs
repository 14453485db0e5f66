//! Round-trip time, and the timeouts that follow from it.
//!
//! RFC 9002 §5 with the constants of a LAN: 200 µs where it has 1 ms or more. Every
//! retransmission has a number of its own, so samples are never ambiguous.

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
    timeout: Option<Duration>,
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
        self.timeout = Some(self.next_timeout());
    }

    /// A round trip took `bound` at most, the peer's unknown delay included: a
    /// sample only where it improves on what is known.
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
    pub(crate) fn call_timeout(&self) -> Duration {
        self.timeout.unwrap_or_else(|| self.next_timeout())
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

/// The next of a row of growing pauses: half as long again, at most [`PROBE`].
pub(crate) const fn back_off(pause: Duration) -> Duration {
    // Below a second there is no need for the arithmetic of two words.
    let longer = pause.subsec_nanos() + pause.subsec_nanos() / 2;
    if pause.as_secs() > 0 || longer >= 1_000_000_000 {
        return PROBE;
    }
    Duration::from_nanos(longer as u64)
}

/// The next pause of a parked call: half as long again, at most [`PARKED_PROBE`].
pub(crate) fn back_off_parked(pause: Duration) -> Duration {
    (pause * 3 / 2).min(PARKED_PROBE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_stay_within_their_bounds() {
        let mut rtt = Rtt::default();
        assert_eq!(rtt.call_timeout(), INITIAL * 4);
        for _ in 0..20 {
            rtt.on_sample(Duration::from_micros(40));
        }
        assert_eq!(rtt.call_timeout(), RTO_MIN);
        assert_eq!(rtt.probe_timeout(), RTO_MIN);
        for _ in 0..50 {
            rtt.on_sample(Duration::from_secs(3));
        }
        assert_eq!(rtt.call_timeout(), PROBE);
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
        let mut pause = RTO_MIN;
        let mut total = Duration::ZERO;
        let mut steps = 0;
        while pause < PROBE {
            total += pause;
            pause = back_off(pause);
            steps += 1;
        }
        assert_eq!((steps, pause), (22, PROBE));
        assert!(total < Duration::from_secs(3));
    }
}
