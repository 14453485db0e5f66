//! What stands at a guest's port: how fast it may send and receive, and a queue for it while
//! it moves. No clock, no devices: packets and times in, verdicts out.
//!
//! ```text
//!            hold                release
//! Open ─────────────► Held ─────────────► Open, the queue first
//!                      │ ▲
//!              drain ◄─┘ └─ accept: what another host has kept, before its own
//! ```
//!
//! A held guest's packets are kept in order up to [`HOLD_PACKETS`] and [`HOLD_BYTES`]; what
//! does not fit is counted. Whoever reads the device leaves newer packets there until the
//! queue is empty, so nothing overtakes.
//!
//! A rate is a limit, not a shaper: what comes faster than the rate, and than a burst of
//! an eighth of a second of it, is dropped and counted.
//!
//! Sources: ITU-T I.371 (GCRA, virtual scheduling).

use std::collections::VecDeque;
use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::{Duration, Instant};

use conet_dataplane::DropReason;

/// Most packets that are kept for a guest that is held.
pub const HOLD_PACKETS: usize = 4096;
/// Most bytes of them.
pub const HOLD_BYTES: usize = 8 << 20;
/// How much faster a guest may be for a moment: what the rate gives in this time.
const BURST: Duration = Duration::from_millis(125);
/// But at least two of the largest segments, and packets for a window of TCP's.
const LEAST_BURST_BITS: u64 = 2 * 8 * 65_536;
const LEAST_BURST_PACKETS: u64 = 64;

/// How fast packets may go one way; nothing is unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Rate {
    /// Bits of IP packets a second.
    pub bits: Option<NonZeroU64>,
    /// Packets a second; a segment that the guest's kernel is to split counts as its parts.
    pub packets: Option<NonZeroU64>,
}

/// A text that is no rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a rate; write 100mbit, 10kpps or both with a comma, with k, m or g before the unit")]
pub struct InvalidRate;

/// Units, and what begins them.
const PREFIXES: [(&str, u64); 4] = [("g", 1_000_000_000), ("m", 1_000_000), ("k", 1000), ("", 1)];

impl FromStr for Rate {
    type Err = InvalidRate;

    fn from_str(text: &str) -> Result<Self, InvalidRate> {
        let mut rate = Self::default();
        for part in text.split(',') {
            let part = part.trim().to_ascii_lowercase();
            let (number, of) = if let Some(number) = part.strip_suffix("bit") {
                (number, &mut rate.bits)
            } else if let Some(number) = part.strip_suffix("pps") {
                (number, &mut rate.packets)
            } else {
                return Err(InvalidRate);
            };
            let found = PREFIXES.iter().find_map(|(prefix, unit)| {
                let number = number.strip_suffix(prefix)?.parse::<u64>().ok()?;
                NonZeroU64::new(number.checked_mul(*unit)?)
            });
            if of.replace(found.ok_or(InvalidRate)?).is_some() {
                return Err(InvalidRate);
            }
        }
        Ok(rate)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |number: u64, unit: &str| {
            let fits = PREFIXES.iter().find(|(_, size)| number.is_multiple_of(*size));
            let (prefix, size) = fits.copied().unwrap_or(("", 1));
            format!("{}{prefix}{unit}", number / size)
        };
        let bits = self.bits.map(|bits| short(bits.get(), "bit"));
        let packets = self.packets.map(|packets| short(packets.get(), "pps"));
        let parts: Vec<_> = bits.into_iter().chain(packets).collect();
        f.pad(if parts.is_empty() { "unlimited".to_owned() } else { parts.join(",") }.as_str())
    }
}

/// How fast a guest may send and receive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Rates {
    /// What it sends.
    pub from_guest: Rate,
    /// What it receives.
    pub to_guest: Rate,
}

/// One quantity's limit: when the next unit is due, were all sent at the rate.
#[derive(Debug, Clone, Copy)]
struct Pace {
    rate: NonZeroU64,
    burst: Duration,
    due: Option<Instant>,
}

impl Pace {
    fn new(rate: NonZeroU64, least: u64) -> Self {
        let mut pace = Self { rate, burst: BURST, due: None };
        pace.burst = BURST.max(pace.time_of(least));
        pace
    }

    fn time_of(&self, units: u64) -> Duration {
        // An hour at most: more is a rate at which nothing passes anyhow.
        let nanoseconds = u128::from(units) * 1_000_000_000 / u128::from(self.rate.get());
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
            .min(Duration::from_secs(3600))
    }

    fn admits(&self, now: Instant) -> bool {
        self.due.is_none_or(|due| due <= now + self.burst)
    }

    fn charge(&mut self, now: Instant, units: u64) {
        self.due = Some(self.due.map_or(now, |due| due.max(now)) + self.time_of(units));
    }
}

/// A [`Rate`] in force.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Limit {
    bits: Option<Pace>,
    packets: Option<Pace>,
}

impl Limit {
    pub(crate) fn new(rate: Rate) -> Self {
        Self {
            bits: rate.bits.map(|bits| Pace::new(bits, LEAST_BURST_BITS)),
            packets: rate.packets.map(|packets| Pace::new(packets, LEAST_BURST_PACKETS)),
        }
    }

    /// Whether there is anything to ask a clock for.
    pub(crate) fn is_set(&self) -> bool {
        self.bits.is_some() || self.packets.is_some()
    }

    /// Whether so many bytes in so many packets may pass now; they are counted if so.
    pub(crate) fn admits(&mut self, now: Instant, bytes: usize, packets: usize) -> bool {
        let mut paces = [
            (&mut self.bits, 8 * u64::try_from(bytes).unwrap_or(u64::MAX >> 3)),
            (&mut self.packets, u64::try_from(packets).unwrap_or(u64::MAX)),
        ];
        if paces.iter().any(|(pace, _)| pace.is_some_and(|pace| !pace.admits(now))) {
            return false;
        }
        for (pace, units) in &mut paces {
            if let Some(pace) = pace {
                pace.charge(now, *units);
            }
        }
        true
    }
}

/// Packets of a guest that is held, each with its virtio header before it.
#[derive(Debug, Default)]
pub(crate) struct Hold {
    is_held: bool,
    queue: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Hold {
    pub(crate) fn hold(&mut self) {
        self.is_held = true;
    }

    /// What is kept comes first, by [`Hold::next`].
    pub(crate) fn release(&mut self) {
        self.is_held = false;
    }

    pub(crate) fn is_held(&self) -> bool {
        self.is_held
    }

    /// How much is kept: packets, bytes.
    pub(crate) fn kept(&self) -> (usize, usize) {
        (self.queue.len(), self.bytes)
    }

    /// The same where the guest is held.
    pub(crate) fn held(&self) -> Option<(u64, u64)> {
        let (packets, bytes) = self.kept();
        self.is_held.then_some((packets as u64, bytes as u64))
    }

    /// Keeps a packet behind the others.
    ///
    /// # Errors
    /// [`DropReason::HoldFull`].
    pub(crate) fn keep(&mut self, packet: &[u8]) -> Result<(), DropReason> {
        if self.queue.len() >= HOLD_PACKETS || self.bytes + packet.len() > HOLD_BYTES {
            return Err(DropReason::HoldFull);
        }
        self.bytes += packet.len();
        self.queue.push_back(packet.to_vec());
        Ok(())
    }

    /// The next one of a guest that is not held any more.
    pub(crate) fn next(&mut self) -> Option<Vec<u8>> {
        if self.is_held {
            return None;
        }
        let packet = self.queue.pop_front()?;
        self.bytes -= packet.len();
        Some(packet)
    }

    /// Hands all of them out, in order.
    pub(crate) fn drain(&mut self) -> Vec<Vec<u8>> {
        self.bytes = 0;
        std::mem::take(&mut self.queue).into()
    }

    /// Takes what another host has kept: it came before what is kept here. Says how many
    /// did not fit; those are the newest of both.
    pub(crate) fn accept(&mut self, packets: Vec<Vec<u8>>) -> usize {
        let own = self.drain();
        packets.iter().chain(&own).filter(|packet| self.keep(packet).is_err()).count()
    }
}

#[cfg(test)]
mod tests {
    use conet_testkit::random::{Random, seed};

    use super::*;

    fn below(random: &mut Random, count: u64) -> usize {
        usize::try_from(random.below(count)).unwrap()
    }

    #[test]
    fn rates_are_read_and_shown() {
        for (text, shown) in [
            ("100mbit", "100mbit"),
            ("10KPPS", "10kpps"),
            ("1500kbit, 7pps", "1500kbit,7pps"),
            ("3000gbit", "3000gbit"),
            ("2000kbit", "2mbit"),
        ] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!(rate.to_string(), shown);
            assert_eq!(rate.to_string().parse(), Ok(rate));
        }
        for bad in
            ["", "100", "0mbit", "mbit", "1mbit,2mbit", "-1pps", "1.5mbit", "9999999999999gbit"]
        {
            assert_eq!(bad.parse::<Rate>(), Err(InvalidRate), "{bad}");
        }
    }

    /// In any time no more passes than the rate and one burst; at half of it, all does.
    #[test]
    fn a_rate_is_kept_whatever_comes() {
        let seed = seed();
        let mut random = Random::new(seed);
        for _ in 0..200 {
            let rate = NonZeroU64::new(10_000 + random.below(1_000_000_000)).unwrap();
            let packets = NonZeroU64::new(1 + random.below(100_000)).unwrap();
            let mut limit = Limit::new(Rate { bits: Some(rate), packets: Some(packets) });
            let begin = Instant::now();
            let (mut now, mut passed) = (begin, [0u128; 2]);
            for _ in 0..2000 {
                now += Duration::from_nanos(random.below(2_000_000));
                let bytes = 20 + below(&mut random, 65_000);
                let parts = 1 + below(&mut random, 45);
                if limit.admits(now, bytes, parts) {
                    passed = [passed[0] + 8 * bytes as u128, passed[1] + parts as u128];
                }
                let time = (now - begin + BURST).as_nanos();
                for (passed, rate, least, one) in [
                    (passed[0], rate, LEAST_BURST_BITS, 8 * 65_020),
                    (passed[1], packets, LEAST_BURST_PACKETS, 45),
                ] {
                    let most = u128::from(rate.get()) * time / 1_000_000_000;
                    let most = most + u128::from(least) + one + 1;
                    assert!(passed <= most, "{passed} > {most}, seed {seed}");
                }
            }
            let mut limit = Limit::new(Rate { bits: Some(rate), packets: None });
            for _ in 0..200 {
                let bytes = 20 + below(&mut random, 9000);
                let time = 2 * 8 * bytes as u128 * 1_000_000_000 / u128::from(rate.get());
                now += Duration::from_nanos(u64::try_from(time).unwrap());
                assert!(limit.admits(now, bytes, 1), "seed {seed}");
            }
        }
    }

    /// Two hosts, packets numbered as they come, at random held, released, drained to the
    /// other: what comes out is in order, and what is missing was counted.
    #[test]
    fn nothing_overtakes_and_nothing_is_lost_uncounted() {
        let seed = seed();
        let mut random = Random::new(seed);
        for _ in 0..30 {
            let (mut here, mut there) = (Hold::default(), Hold::default());
            let (mut sent, mut lost, mut got) = (0u64, 0, Vec::new());
            for _ in 0..3000 {
                match random.below(60) {
                    0 => here.hold(),
                    1 => here.release(),
                    2 => {
                        // It moves: new packets come to the other host, kept first.
                        here.hold();
                        there.hold();
                        let kept = here.drain();
                        lost += there.accept(kept);
                        std::mem::swap(&mut here, &mut there);
                        if random.below(2) == 0 {
                            here.release();
                        }
                    }
                    _ => {
                        let len = 8 + below(&mut random, 20_000);
                        let mut packet = vec![0; len];
                        packet[..8].copy_from_slice(&sent.to_le_bytes());
                        sent += 1;
                        if here.keep(&packet).is_err() {
                            lost += 1;
                        }
                    }
                }
                let (packets, bytes) = here.kept();
                assert!(packets <= HOLD_PACKETS && bytes <= HOLD_BYTES, "seed {seed}");
                for _ in 0..random.below(3) {
                    got.extend(here.next());
                }
            }
            here.release();
            got.extend(std::iter::from_fn(|| here.next()));
            assert_eq!(here.kept(), (0, 0));
            let numbers: Vec<_> = got
                .iter()
                .map(|packet| u64::from_le_bytes(packet[..8].try_into().unwrap()))
                .collect();
            assert!(numbers.is_sorted_by(|a, b| a < b), "seed {seed}");
            assert_eq!(numbers.len() + lost, usize::try_from(sent).unwrap(), "seed {seed}");
        }
    }

    #[test]
    fn a_full_queue_keeps_the_oldest() {
        let mut hold = Hold::default();
        hold.hold();
        for number in 0..HOLD_PACKETS {
            hold.keep(&number.to_le_bytes()).unwrap();
        }
        assert_eq!(hold.keep(&[9; 8]), Err(DropReason::HoldFull));
        assert_eq!(hold.next(), None, "it is held");
        hold.release();
        assert_eq!(hold.next(), Some(0usize.to_le_bytes().to_vec()));
        assert_eq!(hold.keep(&vec![0; HOLD_BYTES]), Err(DropReason::HoldFull));
    }
}
