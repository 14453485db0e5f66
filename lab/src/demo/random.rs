//! Numbers that follow from a seed: SplitMix64 (Steele, Lea, Flood: *Fast
//! Splittable Pseudorandom Number Generators*, OOPSLA 2014). Not for keys.

/// Environment variable that gives a demonstration the seed of an earlier one.
const SEED_VARIABLE: &str = "CONET_DEMO_SEED";

/// A generator of 64-bit numbers.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub(crate) const fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; zero if `bound` is.
    pub(crate) const fn below(&mut self, bound: u64) -> u64 {
        let wide = self.number() as u128 * bound as u128;
        (wide >> 64) as u64
    }
}

/// The seed that the environment gives, or a new one: a short one, which people
/// can copy.
pub(crate) fn seed() -> u64 {
    let given = std::env::var(SEED_VARIABLE).ok().and_then(|text| text.parse().ok());
    given.unwrap_or_else(|| {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Random::new(u64::from(now.subsec_nanos()) ^ now.as_secs()).number() % 1_000_000
    })
}
