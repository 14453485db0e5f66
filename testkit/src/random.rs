//! Numbers that follow from a seed, the same on every machine and for ever.
//!
//! SplitMix64 (Steele, Lea, Flood: *Fast Splittable Pseudorandom Number
//! Generators*, OOPSLA 2014). Not `rand`: its generators may change between
//! releases, and a seed printed by a failing test must keep its meaning. Not for
//! keys.

/// A generator of 64-bit numbers.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The sequence of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next number.
    pub const fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; zero if `bound` is.
    pub const fn below(&mut self, bound: u64) -> u64 {
        let wide = self.number() as u128 * bound as u128;
        (wide >> 64) as u64
    }

    /// True `per_mille` times in a thousand.
    pub const fn chance(&mut self, per_mille: u32) -> bool {
        self.below(1000) < per_mille as u64
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let number = self.number().to_le_bytes();
            chunk.copy_from_slice(&number[..chunk.len()]);
        }
    }
}

/// What a test draws from: `CONET_SEED`, or another each time; printed, so that a failure
/// can be had again.
#[must_use]
pub fn seed() -> u64 {
    let given = std::env::var("CONET_SEED").ok().and_then(|text| text.parse().ok());
    let drawn = || {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        u64::try_from(now.as_micros()).unwrap_or(0)
    };
    let seed = given.unwrap_or_else(drawn);
    println!("CONET_SEED={seed}");
    seed
}

/// One of `seeds` with up to five of its first bytes changed, and now and then cut or
/// stretched.
///
/// # Panics
/// Without seeds, or with an empty one.
pub fn changed(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut below = |bound: usize| usize::try_from(random.below(bound as u64)).unwrap_or(0);
    let mut input = seeds[below(seeds.len())].clone();
    for _ in 0..below(6) {
        let at = below(input.len().min(100));
        input[at] = u8::try_from(below(256)).unwrap_or(0);
    }
    match below(8) {
        0 => input.truncate(below(input.len()) + 1),
        1 => input.resize(input.len() + below(3000), 0xa5),
        _ => {}
    }
    input
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the reference implementation, seed 1234567.
    #[test]
    fn sequence_of_the_reference() {
        let mut random = Random::new(1_234_567);
        let first = [random.number(), random.number(), random.number()];
        assert_eq!(
            first,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn bounds_hold() {
        let mut random = Random::new(1);
        assert!((0..1000).all(|_| random.below(7) < 7));
        assert_eq!(random.below(0), 0);
        assert!(!random.chance(0));
        assert!(random.chance(1000));
    }
}
