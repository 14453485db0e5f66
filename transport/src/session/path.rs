//! Where a peer is, and where it may be.
//!
//! The authenticated packet with the highest number says where a peer may be (as
//! WireGuard §2.1), but whoever is on the path can take such a packet and send it from
//! elsewhere first. So a new address is challenged, and packets go on to the old one
//! until somebody at the new one has answered with the peer's keys (RFC 9000 §8.2, §9.3).
//!
//! Invariants: an address that has proved nothing gets at most three times the bytes that
//! came from it (RFC 9000 §8.1); a proof counts only for the newest challenge.

use crate::time::Instant;
use core::net::SocketAddr;
use core::time::Duration;
use ring::hmac;

/// Bytes that may go to an unproven address for each that came from it.
pub(crate) const AMPLIFICATION: usize = 3;
/// Pause between two challenges.
const PAUSE: Duration = Duration::from_millis(20);
/// Challenges before an address is forgotten until something new comes from it.
const TRIES: u32 = 10;

/// Numbers that nobody can predict, from one secret.
pub(crate) struct Tokens {
    key: hmac::Key,
    next: u64,
}

impl Tokens {
    pub(crate) fn new(secret: &[u8; 32]) -> Self {
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, secret), next: 0 }
    }

    pub(crate) fn take(&mut self) -> u64 {
        self.next += 1;
        let tag = hmac::sign(&self.key, &self.next.to_le_bytes());
        tag.as_ref().first_chunk().map_or(0, |token| u64::from_le_bytes(*token))
    }
}

/// An address that a peer may have moved to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) address: SocketAddr,
    token: u64,
    received: usize,
    sent: usize,
    due: Option<Instant>,
    tries: u32,
    is_named: bool,
}

impl Candidate {
    pub(crate) const fn new(now: Instant, address: SocketAddr, token: u64) -> Self {
        Self { address, token, received: 0, sent: 0, due: Some(now), tries: 0, is_named: false }
    }

    /// One that our owner has named: it may have its few packets.
    pub(crate) const fn named(now: Instant, address: SocketAddr, token: u64) -> Self {
        Self { is_named: true, ..Self::new(now, address, token) }
    }

    /// Whether our owner has named it, and it has still some time to answer.
    pub(crate) const fn is_named(&self) -> bool {
        self.is_named && self.due.is_some()
    }

    /// A packet of the peer's came from there.
    pub(crate) fn on_received(&mut self, now: Instant, bytes: usize) {
        self.received += bytes;
        if self.due.is_none() && self.tries < TRIES {
            self.due = Some(now);
        }
    }

    /// The token to send there now, if a packet of `bytes` may go.
    pub(crate) fn challenge(&mut self, now: Instant, bytes: usize) -> Option<u64> {
        if self.due.is_none_or(|due| due > now) {
            return None;
        }
        if !self.is_named && self.sent + bytes > self.received * AMPLIFICATION {
            // More may come.
            self.due = None;
            return None;
        }
        self.sent += bytes;
        self.tries += 1;
        self.due = (self.tries < TRIES).then_some(now + PAUSE);
        Some(self.token)
    }

    pub(crate) const fn due(&self) -> Option<Instant> {
        self.due
    }

    pub(crate) const fn proves(&self, token: u64) -> bool {
        self.token == token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unproven_address_gets_three_times_what_came() {
        let now = Instant::START;
        let address = SocketAddr::from(([192, 0, 2, 1], 1));
        let mut candidate = Candidate::new(now, address, 9);
        assert_eq!(candidate.challenge(now, 48), None, "nothing has come");
        candidate.on_received(now, 32);
        let sent: Vec<_> =
            (0..100u32).filter_map(|n| candidate.challenge(now + PAUSE * n, 48)).collect();
        assert_eq!(sent, [9, 9], "96 bytes for 32");
        candidate.on_received(now + PAUSE * 100, 16);
        assert_eq!(candidate.challenge(now + PAUSE * 100, 48), Some(9));
        assert!(candidate.proves(9) && !candidate.proves(8));
    }

    #[test]
    fn tokens_differ() {
        let (mut one, mut two) = (Tokens::new(&[1; 32]), Tokens::new(&[2; 32]));
        let tokens = [one.take(), one.take(), two.take(), two.take()];
        for (n, token) in tokens.iter().enumerate() {
            assert!(!tokens[..n].contains(token));
        }
    }
}
