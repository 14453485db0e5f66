//! How many initiations are opened, and who must first show where it is.
//!
//! Opening one costs three Diffie-Hellman operations, some 150 µs, and everybody can send
//! one. Up to [`FREE`] a second are opened as they come; beyond that, the sender is sent a
//! cookie that belongs to its address and must come back with it (as WireGuard §5.4.7).
//! Nothing is kept of those that are turned away.
//!
//! Invariants: a cookie is worth nothing at another address, and nothing after four
//! minutes; with and without cookies together, at most [`FREE`] + [`PROVED`] a second are
//! opened.

use super::handshake::{Entropy, EntropyFailed};
use crate::time::Instant;
use conet_wire::session::handshake::COOKIE;
use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use ring::hmac;

/// Initiations opened in a second without a cookie.
const FREE: u64 = 100;
/// Further initiations opened in a second with a cookie.
const PROVED: u64 = 400;
/// Age at which the secret behind the cookies is replaced; the one before still counts.
const ROTATE: Duration = Duration::from_secs(120);

/// So many in a second, and as many at once.
#[derive(Debug)]
struct Bucket {
    rate: u64,
    /// Billionths.
    level: u64,
    at: Instant,
}

impl Bucket {
    const ONE: u64 = 1_000_000_000;

    const fn new(rate: u64) -> Self {
        Self { rate, level: rate * Self::ONE, at: Instant::START }
    }

    fn take(&mut self, now: Instant) -> bool {
        let passed = u64::try_from(now.since(self.at).as_nanos()).unwrap_or(u64::MAX);
        let full = self.rate * Self::ONE;
        self.level = self.level.saturating_add(passed.saturating_mul(self.rate)).min(full);
        self.at = now;
        let is_open = self.level >= Self::ONE;
        if is_open {
            self.level -= Self::ONE;
        }
        is_open
    }
}

/// What to do with an initiation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    Open,
    /// Send it this.
    Ask([u8; COOKIE]),
    Drop,
}

/// The guard of one hub.
pub(crate) struct Gate {
    free: Bucket,
    proved: Bucket,
    secret: hmac::Key,
    before: hmac::Key,
    rotated: Instant,
}

impl Gate {
    pub(crate) fn new(entropy: &mut dyn Entropy) -> Result<Self, EntropyFailed> {
        Ok(Self {
            free: Bucket::new(FREE),
            proved: Bucket::new(PROVED),
            secret: fresh(entropy)?,
            before: fresh(entropy)?,
            rotated: Instant::START,
        })
    }

    pub(crate) fn admit(
        &mut self,
        now: Instant,
        from: SocketAddr,
        cookie: Option<&[u8; COOKIE]>,
        entropy: &mut dyn Entropy,
    ) -> Verdict {
        if self.free.take(now) {
            return Verdict::Open;
        }
        if now.since(self.rotated) >= ROTATE
            && let Ok(secret) = fresh(entropy)
        {
            self.before = core::mem::replace(&mut self.secret, secret);
            if now.since(self.rotated) >= ROTATE * 2 {
                // Long unused: the one before is too old as well.
                self.before = self.secret.clone();
            }
            self.rotated = now;
        }
        let good = cookie.is_some_and(|cookie| {
            *cookie == make(&self.secret, from) || *cookie == make(&self.before, from)
        });
        match good {
            true if self.proved.take(now) => Verdict::Open,
            true => Verdict::Drop,
            false => Verdict::Ask(make(&self.secret, from)),
        }
    }
}

fn fresh(entropy: &mut dyn Entropy) -> Result<hmac::Key, EntropyFailed> {
    let mut secret = [0; 32];
    entropy.fill(&mut secret)?;
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &secret))
}

fn make(secret: &hmac::Key, address: SocketAddr) -> [u8; COOKIE] {
    let mut bytes = [0; 18];
    match address.ip() {
        IpAddr::V4(ip) => bytes[..4].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => bytes[..16].copy_from_slice(&ip.octets()),
    }
    bytes[16..].copy_from_slice(&address.port().to_le_bytes());
    let tag = hmac::sign(secret, &bytes);
    tag.as_ref().first_chunk().copied().unwrap_or([0; COOKIE])
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counting(u8);

    impl Entropy for Counting {
        fn fill(&mut self, bytes: &mut [u8]) -> Result<(), EntropyFailed> {
            self.0 += 1;
            bytes.fill(self.0);
            Ok(())
        }
    }

    #[test]
    fn under_load_an_address_is_asked_to_show_itself() {
        let mut entropy = Counting(0);
        let mut gate = Gate::new(&mut entropy).expect("counts");
        let (here, there) =
            (SocketAddr::from(([1, 2, 3, 4], 5)), SocketAddr::from(([1, 2, 3, 4], 6)));
        let mut now = Instant::from_start(Duration::from_secs(5));
        for _ in 0..FREE {
            assert_eq!(gate.admit(now, here, None, &mut entropy), Verdict::Open);
        }
        let Verdict::Ask(cookie) = gate.admit(now, here, None, &mut entropy) else {
            panic!("load")
        };
        assert_eq!(gate.admit(now, here, Some(&cookie), &mut entropy), Verdict::Open);
        assert_ne!(gate.admit(now, there, Some(&cookie), &mut entropy), Verdict::Open);
        let opened = (0..2 * PROVED)
            .filter(|_| gate.admit(now, here, Some(&cookie), &mut entropy) == Verdict::Open)
            .count();
        assert_eq!(opened as u64, PROVED - 1);
        // A while later the cookie is nothing any more.
        for (minutes, good) in [(2, true), (3, true), (7, false)] {
            now = Instant::from_start(Duration::from_secs(60 * minutes + 5));
            let full = FREE;
            for _ in 0..full {
                gate.free.take(now);
            }
            let verdict = gate.admit(now, here, Some(&cookie), &mut entropy);
            assert_eq!(verdict == Verdict::Open, good, "{minutes}");
        }
    }
}
