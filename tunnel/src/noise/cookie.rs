//! The gate before handshakes: who knows our key, and, under load, who can be
//! reached at the address it claims.
//!
//! Under load a message without a cookie is answered by one, which costs two hashes
//! and a cipher instead of a key agreement; with one, its address has a small budget.
//!
//! Source: whitepaper §5.3, §5.4.7; Linux `cookie.c`, `ratelimiter.c`.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::crypto::{mac, same, seal_cookie};
use super::{COOKIE_AGE, COOKIE_REPLY, Identity, random, u32_at};

/// Handshake messages a second, from everybody together, before cookies are asked
/// for. Each costs about 0.1 ms.
const PER_SECOND: u32 = 100;
/// Of one address, under load (Linux PACKETS_PER_SECOND, PACKETS_BURSTABLE).
const PER_ADDRESS_SECOND: u32 = 20;
/// Addresses that are counted at once; others wait for the next second.
const ADDRESSES: usize = 8192;
const SECOND: Duration = Duration::from_secs(1);

/// What becomes of a handshake message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It may be looked at.
    Welcome,
    /// Not before it has used this cookie.
    Cookie([u8; COOKIE_REPLY]),
    /// Its address has had its share.
    Refused,
    /// It does not know our key.
    Stranger,
}

#[derive(Default)]
pub(crate) struct Gate {
    second: Option<Instant>,
    count: u32,
    loaded: bool,
    secret: Option<(Instant, [u8; 32])>,
    of_address: HashMap<u128, u32>,
}

impl Gate {
    /// Judges a whole initiation or response.
    pub(crate) fn judge(
        &mut self,
        us: &Identity,
        now: Instant,
        from: SocketAddr,
        message: &[u8],
    ) -> Verdict {
        let Some((body, [mac1, mac2])) = split(message) else { return Verdict::Stranger };
        if !same(&mac(&us.mac1, body, &[]), mac1) {
            return Verdict::Stranger;
        }
        if !self.is_loaded(now) {
            return Verdict::Welcome;
        }
        let Some(cookie) = self.cookie(now, from) else { return Verdict::Refused };
        if same(&mac(&cookie, body, mac1), mac2) {
            return if self.has_share(from.ip()) { Verdict::Welcome } else { Verdict::Refused };
        }
        let Ok(nonce) = random() else { return Verdict::Refused };
        let mut reply = [0; COOKIE_REPLY];
        reply[0] = 3;
        reply[4..8].copy_from_slice(&u32_at(message, 4).to_le_bytes());
        reply[8..32].copy_from_slice(&nonce);
        reply[32..].copy_from_slice(&seal_cookie(&us.cookie, &nonce, mac1, cookie));
        Verdict::Cookie(reply)
    }

    /// Counts one message; load lasts for the second in which it is reached and the
    /// next, so that cookies that were given out can be used.
    fn is_loaded(&mut self, now: Instant) -> bool {
        let age = self.second.map(|began| now.saturating_duration_since(began));
        if age.is_none_or(|age| age >= SECOND) {
            self.loaded = self.count >= PER_SECOND && age.is_some_and(|age| age < 2 * SECOND);
            self.second = Some(now);
            self.count = 0;
            self.of_address.clear();
        }
        self.count += 1;
        self.loaded || self.count > PER_SECOND
    }

    fn cookie(&mut self, now: Instant, from: SocketAddr) -> Option<[u8; 16]> {
        let fresh =
            self.secret.filter(|(made, _)| now.saturating_duration_since(*made) < COOKIE_AGE);
        let (made, secret) = match fresh {
            Some(secret) => secret,
            None => (now, random().ok()?),
        };
        self.secret = Some((made, secret));
        let port = from.port().to_be_bytes();
        Some(match from.ip() {
            IpAddr::V4(address) => mac(&secret, &address.octets(), &port),
            IpAddr::V6(address) => mac(&secret, &address.octets(), &port),
        })
    }

    fn has_share(&mut self, address: IpAddr) -> bool {
        let key = match address {
            IpAddr::V4(address) => u128::from(u32::from(address)),
            // Whoever has one address of a /64 has them all.
            IpAddr::V6(address) => u128::from(address) >> 64 | 1 << 127,
        };
        if self.of_address.len() >= ADDRESSES && !self.of_address.contains_key(&key) {
            return false;
        }
        let count = self.of_address.entry(key).or_default();
        *count += 1;
        *count <= PER_ADDRESS_SECOND
    }
}

/// What the MACs are over, and the two.
fn split(message: &[u8]) -> Option<(&[u8], [&[u8]; 2])> {
    let (body, macs) = message.split_at_checked(message.len().checked_sub(32)?)?;
    let (mac1, mac2) = macs.split_at(16);
    Some((body, [mac1, mac2]))
}
