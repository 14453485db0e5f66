//! Hubs of which a seed says everything.
#![allow(dead_code, reason = "each test binary uses a part")]

use conet_testkit::random::Random;
use conet_transport::session::handshake::{Entropy, EntropyFailed, FEATURES, PrivateKey};
use conet_transport::session::{HubConfig, Limits};
use std::time::Duration;

/// Randomness that is the same for the same seed.
pub(crate) struct Seeded(Random);

impl Seeded {
    pub(crate) fn boxed(seed: u64) -> Box<dyn Entropy> {
        Box::new(Self(Random::new(seed)))
    }
}

impl Entropy for Seeded {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), EntropyFailed> {
        self.0.fill(bytes);
        Ok(())
    }
}

/// Of the node whose private key is all `key`; a higher seed is a later start.
pub(crate) fn config(key: u8, seed: u64) -> HubConfig {
    HubConfig {
        private_key: PrivateKey::new([key; 32]),
        limits: Limits::default(),
        started: Duration::from_secs(1) + Duration::from_nanos(seed),
        features: FEATURES,
        entropy: Seeded::boxed(seed),
    }
}
