//! A link in virtual time that loses, duplicates, reorders, corrupts and delays,
//! all from one seed.
//!
//! ```text
//! send(now, from, to, bytes) ──fate──► queue by arrival ──► deliver(now)
//! ```
//!
//! It moves bytes between addresses and knows nothing about them. Time is whatever
//! the test says; nothing sleeps. The same seed and the same sends give the same
//! deliveries.

use crate::random::Random;
use std::collections::BTreeMap;
use std::time::Duration;

/// What the link does to datagrams; chances in a thousand.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Faults {
    /// Vanishes.
    pub lose: u32,
    /// Arrives twice, the second time up to ten delays later.
    pub duplicate: u32,
    /// Arrives up to ten delays late, behind those sent after it.
    pub reorder: u32,
    /// Arrives with one to eight bits changed, or cut short.
    pub corrupt: u32,
    /// One-way time.
    pub delay: Duration,
    /// Up to this much is added to each delay.
    pub jitter: Duration,
}

impl Faults {
    /// A link that only takes `delay`.
    #[must_use]
    pub fn none(delay: Duration) -> Self {
        Self { delay, ..Self::default() }
    }

    /// A bad link: every kind of fault, each up to one in five.
    #[must_use]
    pub fn drawn_from(random: &mut Random) -> Self {
        let mut rate = |one_in: u64| {
            if random.below(one_in) == 0 {
                0
            } else {
                u32::try_from(random.below(200)).unwrap_or(0)
            }
        };
        let (lose, duplicate, reorder, corrupt) = (rate(4), rate(4), rate(4), rate(4));
        let delay = Duration::from_micros(20 + random.below(5000));
        let jitter = Duration::from_micros(random.below(1000));
        Self { lose, duplicate, reorder, corrupt, delay, jitter }
    }
}

/// What became of the datagrams.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct LinkCounters {
    /// Handed to [`Link::send`].
    pub sent: u64,
    /// Given out by [`Link::deliver`].
    pub delivered: u64,
    /// Vanished, also while the link was cut.
    pub lost: u64,
    /// Sent a second time.
    pub duplicated: u64,
    /// Held back.
    pub reordered: u64,
    /// Changed.
    pub corrupted: u64,
}

/// A datagram at the end of its way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Delivery<A> {
    /// Who sent it.
    pub from: A,
    /// Who gets it.
    pub to: A,
    /// What arrived.
    pub bytes: Vec<u8>,
    /// Whether it is what was sent.
    pub intact: bool,
}

/// A link between any number of addresses of type `A`.
#[derive(Debug)]
pub struct Link<A> {
    random: Random,
    faults: Faults,
    cut: bool,
    on_the_way: BTreeMap<(Duration, u64), Delivery<A>>,
    order: u64,
    counters: LinkCounters,
}

impl<A: Clone> Link<A> {
    /// A link whose every fault follows from `seed`.
    #[must_use]
    pub fn new(seed: u64, faults: Faults) -> Self {
        Self {
            random: Random::new(seed),
            faults,
            cut: false,
            on_the_way: BTreeMap::new(),
            order: 0,
            counters: LinkCounters::default(),
        }
    }

    /// From now on, other faults.
    pub const fn set_faults(&mut self, faults: Faults) {
        self.faults = faults;
    }

    /// While cut, everything sent vanishes.
    pub const fn set_cut(&mut self, cut: bool) {
        self.cut = cut;
    }

    /// What became of the datagrams.
    #[must_use]
    pub const fn counters(&self) -> LinkCounters {
        self.counters
    }

    /// Puts a datagram on its way at time `now`.
    pub fn send(&mut self, now: Duration, from: A, to: A, bytes: &[u8]) {
        self.counters.sent += 1;
        if self.cut || self.random.chance(self.faults.lose) {
            self.counters.lost += 1;
            return;
        }
        let mut delivery = Delivery { from, to, bytes: bytes.to_vec(), intact: true };
        if self.random.chance(self.faults.duplicate) {
            self.counters.duplicated += 1;
            let arrival = now + self.delay() + self.hold();
            self.put(arrival, delivery.clone());
        }
        if self.random.chance(self.faults.corrupt) && !bytes.is_empty() {
            self.counters.corrupted += 1;
            self.corrupt(&mut delivery);
        }
        let mut arrival = now + self.delay();
        if self.random.chance(self.faults.reorder) {
            self.counters.reordered += 1;
            arrival += self.hold();
        }
        self.put(arrival, delivery);
    }

    fn put(&mut self, arrival: Duration, delivery: Delivery<A>) {
        self.on_the_way.insert((arrival, self.order), delivery);
        self.order += 1;
    }

    fn delay(&mut self) -> Duration {
        let jitter = u64::try_from(self.faults.jitter.as_nanos()).unwrap_or(u64::MAX);
        self.faults.delay + Duration::from_nanos(self.random.below(jitter))
    }

    fn hold(&mut self) -> Duration {
        let most = u64::try_from(self.faults.delay.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(self.random.below(most.saturating_mul(10)))
    }

    fn corrupt(&mut self, delivery: &mut Delivery<A>) {
        delivery.intact = false;
        let bytes = &mut delivery.bytes;
        let length = bytes.len() as u64;
        if self.random.chance(200) {
            let keep = usize::try_from(self.random.below(length)).unwrap_or(0);
            bytes.truncate(keep);
            return;
        }
        let before = bytes.clone();
        for _ in 0..=self.random.below(8) {
            let at = usize::try_from(self.random.below(length)).unwrap_or(0);
            let bit = self.random.below(8);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << bit;
            }
        }
        delivery.intact = *bytes == before;
    }

    /// When the next datagram arrives.
    #[must_use]
    pub fn next_arrival(&self) -> Option<Duration> {
        self.on_the_way.first_key_value().map(|((arrival, _), _)| *arrival)
    }

    /// Takes the next datagram that has arrived by `now`.
    pub fn deliver(&mut self, now: Duration) -> Option<Delivery<A>> {
        if self.next_arrival()? > now {
            return None;
        }
        self.counters.delivered += 1;
        self.on_the_way.pop_first().map(|(_, delivery)| delivery)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(seed: u64, faults: Faults) -> (Vec<Delivery<u8>>, LinkCounters) {
        let mut link = Link::new(seed, faults);
        for n in 0..2000u32 {
            link.send(Duration::from_micros(n.into()), 1, 2, &n.to_le_bytes());
        }
        let end = Duration::from_secs(60);
        let deliveries = core::iter::from_fn(|| link.deliver(end)).collect();
        (deliveries, link.counters())
    }

    const BAD: Faults = Faults {
        lose: 100,
        duplicate: 50,
        reorder: 100,
        corrupt: 50,
        delay: Duration::from_micros(50),
        jitter: Duration::from_micros(5),
    };

    #[test]
    fn same_seed_same_deliveries() {
        assert_eq!(run(7, BAD), run(7, BAD));
        assert_ne!(run(7, BAD).0, run(8, BAD).0);
    }

    #[test]
    fn every_fault_happens_and_is_counted() {
        let (deliveries, counters) = run(1, BAD);
        assert!((100..300).contains(&counters.lost));
        assert!((50..200).contains(&counters.duplicated));
        assert!((100..300).contains(&counters.reordered));
        let damaged = deliveries.iter().filter(|delivery| !delivery.intact).count() as u64;
        assert!(damaged > 50 && damaged <= counters.corrupted);
        assert_eq!(counters.delivered, counters.sent - counters.lost + counters.duplicated);
        assert_eq!(counters.delivered, deliveries.len() as u64);
    }

    #[test]
    fn without_faults_everything_arrives_in_order() {
        let (deliveries, counters) = run(1, Faults::none(Duration::from_micros(9)));
        assert!(
            deliveries
                .iter()
                .map(|d| &d.bytes)
                .eq((0..2000u32).map(|n| n.to_le_bytes()).collect::<Vec<_>>().iter())
        );
        assert_eq!(counters.delivered, 2000);
    }

    #[test]
    fn a_cut_link_delivers_nothing_new() {
        let mut link = Link::new(1, Faults::none(Duration::from_micros(9)));
        link.send(Duration::ZERO, 1, 2, b"before");
        link.set_cut(true);
        link.send(Duration::ZERO, 1, 2, b"cut");
        assert!(link.deliver(Duration::from_micros(8)).is_none(), "still on its way");
        assert_eq!(
            link.deliver(Duration::from_micros(9)).map(|d| d.bytes),
            Some(b"before".to_vec())
        );
        assert!(link.deliver(Duration::from_secs(9)).is_none());
        assert_eq!(link.counters().lost, 1);
    }
}
