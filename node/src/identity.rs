//! A node's keys: one Ed25519 identity, and the X25519 pair that derives from it.
//!
//! ```text
//! seed (32 bytes, what `conet keygen` prints)
//!   ├─ Ed25519 (RFC 8032)                        who this node is
//!   └─ SHA-512(seed)[..32], clamped → X25519     WireGuard and the session handshake
//! ```
//!
//! The X25519 public key follows from the Ed25519 public key alone, by the map
//! from the Edwards to the Montgomery curve (RFC 7748 §4.1), so that a peer
//! needs one public key in its configuration.
//!
//! What it is not: a key store. Secrets are zeroed when dropped and do not
//! appear in `Debug`.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{SigningKey, VerifyingKey};
use thiserror::Error;
use zeroize::Zeroizing;

/// Bytes of every key here.
pub const KEY_LEN: usize = 32;

/// A key text that cannot be used; the text itself is never part of the error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum KeyError {
    /// Not standard base64 with padding (RFC 4648 §4).
    #[error("not base64; give the 44 characters that `conet keygen` or `conet pubkey` prints")]
    NotBase64,
    /// Base64 of another length than a key has.
    #[error(
        "{length} bytes long where a key has 32; give the 44 characters that `conet keygen` or \
         `conet pubkey` prints"
    )]
    Length {
        /// Bytes that the text decodes to.
        length: usize,
    },
    /// Not a point of the curve, or one of its points of small order.
    #[error("not an Ed25519 public key; take the one that `conet pubkey` prints")]
    NotAPoint,
}

/// Decodes a key text: base64 of exactly [`KEY_LEN`] bytes, space around it ignored.
///
/// # Errors
///
/// [`KeyError::NotBase64`] and [`KeyError::Length`].
pub fn decode_key(text: &str) -> Result<Zeroizing<[u8; KEY_LEN]>, KeyError> {
    let bytes = Zeroizing::new(BASE64.decode(text.trim()).map_err(|_| KeyError::NotBase64)?);
    let key = <[u8; KEY_LEN]>::try_from(bytes.as_slice())
        .map_err(|_| KeyError::Length { length: bytes.len() })?;
    Ok(Zeroizing::new(key))
}

/// A node's secret half: it signs, and it derives the tunnel's and the session's key.
#[derive(Clone)]
pub struct Identity {
    signing: SigningKey,
}

impl Identity {
    /// The identity of a seed, as in RFC 8032 §5.1.5.
    #[must_use]
    pub fn from_seed(seed: &[u8; KEY_LEN]) -> Self {
        Self { signing: SigningKey::from_bytes(seed) }
    }

    /// A new identity from the kernel's random numbers (`getrandom(2)`).
    ///
    /// # Errors
    ///
    /// That of the system call.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut seed = Zeroizing::new([0; KEY_LEN]);
        getrandom::fill(seed.as_mut())?;
        Ok(Self::from_seed(&seed))
    }

    /// The seed as text, for the key file.
    #[must_use]
    pub fn seed_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(BASE64.encode(self.signing.as_bytes()))
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.signing.verifying_key())
    }

    /// The X25519 secret: the first half of SHA-512 of the seed, clamped as
    /// RFC 7748 §5 asks, which is the Ed25519 scalar itself.
    #[must_use]
    pub fn x25519_secret(&self) -> Zeroizing<[u8; KEY_LEN]> {
        let mut secret = Zeroizing::new(self.signing.to_scalar_bytes());
        secret[0] &= 0b1111_1000;
        secret[31] &= 0b0111_1111;
        secret[31] |= 0b0100_0000;
        secret
    }
}

impl FromStr for Identity {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Ok(Self::from_seed(&*decode_key(text)?))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("public", &self.public()).finish_non_exhaustive()
    }
}

/// A node's Ed25519 public key: its name among keys. Printed as base64.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// Checks the bytes of a public key.
    ///
    /// # Errors
    ///
    /// [`KeyError::NotAPoint`], also for points of small order, with which
    /// every peer would agree on the same secret.
    pub fn from_bytes(bytes: &[u8; KEY_LEN]) -> Result<Self, KeyError> {
        let key = VerifyingKey::from_bytes(bytes).map_err(|_| KeyError::NotAPoint)?;
        if key.is_weak() { Err(KeyError::NotAPoint) } else { Ok(Self(key)) }
    }

    /// The key's bytes (RFC 8032 §5.1.2).
    #[must_use]
    pub fn to_bytes(self) -> [u8; KEY_LEN] {
        self.0.to_bytes()
    }

    /// The X25519 public key that belongs to it (RFC 7748 §4.1).
    #[must_use]
    pub fn x25519(self) -> X25519Public {
        X25519Public(self.0.to_montgomery().to_bytes())
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(&*decode_key(text)?)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// An X25519 public key: what WireGuard and the session handshake know a peer by.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct X25519Public(pub [u8; KEY_LEN]);

impl X25519Public {
    /// The public half of a secret (RFC 7748 §6.1).
    #[must_use]
    pub fn of(secret: &[u8; KEY_LEN]) -> Self {
        let private = conet_tunnel::PrivateKey::from_bytes(*secret);
        Self(private.public().0)
    }
}

impl FromStr for X25519Public {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Ok(Self(*decode_key(text)?))
    }
}

impl fmt::Display for X25519Public {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for X25519Public {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "X25519Public({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8032 §7.1, test 1.
    const SEED: [u8; 32] = [
        0x9d, 0x61, 0xb1, 0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c,
        0xc4, 0x44, 0x49, 0xc5, 0x69, 0x7b, 0x32, 0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae,
        0x7f, 0x60,
    ];
    const PUBLIC: [u8; 32] = [
        0xd7, 0x5a, 0x98, 0x01, 0x82, 0xb1, 0x0a, 0xb7, 0xd5, 0x4b, 0xfe, 0xd3, 0xc9, 0x64, 0x07,
        0x3a, 0x0e, 0xe1, 0x72, 0xf3, 0xda, 0xa6, 0x23, 0x25, 0xaf, 0x02, 0x1a, 0x68, 0xf7, 0x07,
        0x51, 0x1a,
    ];

    #[test]
    fn the_public_key_is_that_of_rfc_8032() {
        let identity = Identity::from_seed(&SEED);
        assert_eq!(identity.public().to_bytes(), PUBLIC);
        assert_eq!(identity.public(), PublicKey::from_bytes(&PUBLIC).unwrap());
    }

    #[test]
    fn both_conversions_give_one_x25519_pair() {
        for _ in 0..16 {
            let identity = Identity::generate().unwrap();
            let secret = x25519_dalek::StaticSecret::from(*identity.x25519_secret());
            let public = x25519_dalek::PublicKey::from(&secret);
            assert_eq!(public.to_bytes(), identity.public().x25519().0);
        }
    }

    #[test]
    fn texts_go_round() {
        let identity = Identity::from_seed(&SEED);
        let again: Identity = identity.seed_base64().parse().unwrap();
        assert_eq!(again.public(), identity.public());
        let public: PublicKey = format!(" {}\n", identity.public()).parse().unwrap();
        assert_eq!(public, identity.public());
    }

    #[test]
    fn wrong_texts_are_told_apart() {
        assert_eq!("!".parse::<PublicKey>().unwrap_err(), KeyError::NotBase64);
        assert_eq!("AAAA".parse::<PublicKey>().unwrap_err(), KeyError::Length { length: 3 });
        // The neutral element: of order one.
        let neutral = BASE64.encode([&[1_u8][..], &[0; 31][..]].concat());
        assert_eq!(neutral.parse::<PublicKey>().unwrap_err(), KeyError::NotAPoint);
    }

    #[test]
    fn debug_shows_no_secret() {
        let identity = Identity::from_seed(&SEED);
        let shown = format!("{identity:?}");
        assert!(!shown.contains(identity.seed_base64().as_str()));
        assert!(shown.contains(&identity.public().to_string()));
    }
}
