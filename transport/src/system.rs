//! What a hub starts with where there is an operating system: its clock and its randomness.
//!
//! The session core has neither. Whoever drives it hands them in, and this is how drivers do.

use crate::session::handshake::{PrivateKey, SystemEntropy, local_features};
use crate::session::{HubConfig, Limits};
use std::time::{SystemTime, UNIX_EPOCH};

impl HubConfig {
    /// With the default limits, the system's clock and randomness.
    #[must_use]
    pub fn new(private_key: PrivateKey) -> Self {
        Self {
            private_key,
            limits: Limits::default(),
            started: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            features: local_features(),
            entropy: Box::new(SystemEntropy::default()),
        }
    }
}
