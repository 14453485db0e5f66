//! The primitives under the names of the whitepaper: Hash, Hmac, Kdf, Mac, Aead.
//!
//! Sources: whitepaper §5.4; RFC 7693 (BLAKE2s), RFC 8439 (ChaCha20-Poly1305).

use blake2::digest::{FixedOutput, KeyInit, Update, consts::U16};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use x25519_dalek::{PublicKey, StaticSecret};

use super::{NoiseError, TAG};

pub(super) type Key = [u8; 32];

/// Bytes of a BLAKE2s block, over which HMAC spreads its key (RFC 2104).
const BLOCK: usize = 64;

pub(super) fn hash(first: &[u8], second: &[u8]) -> Key {
    Blake2s256::new().chain(first).chain(second).finalize().into()
}

/// HMAC with BLAKE2s (RFC 2104), which is not its keyed mode.
fn hmac(key: &Key, first: &[u8], second: &[u8]) -> Key {
    let (mut inner, mut outer) = ([0x36; BLOCK], [0x5c; BLOCK]);
    for ((i, o), k) in inner.iter_mut().zip(&mut outer).zip(key) {
        *i ^= k;
        *o ^= k;
    }
    let inside: Key = Blake2s256::new().chain(inner).chain(first).chain(second).finalize().into();
    hash(&outer, &inside)
}

/// Kdf1 to Kdf3: each output is an HMAC over the one before and its number.
pub(super) fn kdf<const N: usize>(chain: &Key, input: &[u8]) -> [Key; N] {
    let secret = hmac(chain, input, &[]);
    let mut outputs = [[0; 32]; N];
    let mut before: Option<Key> = None;
    for (number, output) in (1..).zip(&mut outputs) {
        *output = match &before {
            None => hmac(&secret, &[number], &[]),
            Some(before) => hmac(&secret, before, &[number]),
        };
        before = Some(*output);
    }
    outputs
}

/// Mac: keyed BLAKE2s of 16 bytes. Keys have 16 or 32 bytes.
pub(super) fn mac<const K: usize>(key: &[u8; K], first: &[u8], second: &[u8]) -> [u8; 16] {
    const { assert!(K == 16 || K == 32) };
    let keyed = <Blake2sMac<U16> as KeyInit>::new_from_slice(key);
    let Ok(keyed) = keyed else { unreachable!("BLAKE2s takes keys of up to 32 bytes") };
    keyed.chain(first).chain(second).finalize_fixed().into()
}

/// Whether two MACs are the same, in a time that does not depend on where they
/// differ.
pub(super) fn same(one: &[u8; 16], other: &[u8]) -> bool {
    other.len() == 16 && one.iter().zip(other).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

/// Diffie-Hellman; nothing when the result is zero, whatever our key (RFC 7748 §6.1).
pub(super) fn agree(ours: &StaticSecret, theirs: &PublicKey) -> Result<Key, NoiseError> {
    let shared = ours.diffie_hellman(theirs);
    if shared.was_contributory() { Ok(shared.to_bytes()) } else { Err(NoiseError::Handshake) }
}

pub(super) fn aead_key(key: &Key) -> LessSafeKey {
    let Ok(unbound) = UnboundKey::new(&CHACHA20_POLY1305, key) else {
        unreachable!("ChaCha20-Poly1305 has keys of 32 bytes")
    };
    LessSafeKey::new(unbound)
}

/// The nonce of a message: 32 zero bits and the counter, little endian.
pub(super) fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// Aead of a key that is used once: seals `plain` into `out`, 16 bytes longer.
pub(super) fn seal_once(key: &Key, hash: &Key, plain: &[u8], out: &mut [u8]) {
    let (text, tag) = out.split_at_mut(plain.len());
    text.copy_from_slice(plain);
    let sealed = aead_key(key).seal_in_place_separate_tag(nonce(0), Aad::from(hash), text);
    let Ok(sealed) = sealed else { unreachable!("the text is far from the cipher's limit") };
    tag.copy_from_slice(sealed.as_ref());
}

/// The reverse of [`seal_once`] for texts of N bytes.
pub(super) fn open_once<const N: usize>(
    key: &Key,
    hash: &Key,
    sealed: &[u8],
) -> Result<[u8; N], NoiseError> {
    // The longest is a static key.
    let mut buffer = [0; 32 + TAG];
    let buffer = buffer.get_mut(..sealed.len()).ok_or(NoiseError::Tag)?;
    buffer.copy_from_slice(sealed);
    let plain = aead_key(key).open_in_place(nonce(0), Aad::from(hash), buffer);
    plain.ok().and_then(|plain| (&*plain).try_into().ok()).ok_or(NoiseError::Tag)
}

/// Xaead: the cookie of a cookie reply, sealed.
pub(super) fn seal_cookie(key: &Key, at: &[u8; 24], aad: &[u8], cookie: [u8; 16]) -> [u8; 32] {
    let mut sealed = [0; 32];
    let (text, tag) = sealed.split_at_mut(16);
    text.copy_from_slice(&cookie);
    let cipher = XChaCha20Poly1305::new(key.into());
    let made = cipher.encrypt_in_place_detached(XNonce::from_slice(at), aad, text);
    let Ok(made) = made else { unreachable!("16 bytes are far from the cipher's limit") };
    tag.copy_from_slice(&made);
    sealed
}

/// The reverse of [`seal_cookie`].
pub(super) fn open_cookie(
    key: &Key,
    at: &[u8; 24],
    aad: &[u8],
    sealed: &[u8; 32],
) -> Result<[u8; 16], NoiseError> {
    let mut cookie = [0; 16];
    cookie.copy_from_slice(&sealed[..16]);
    let cipher = XChaCha20Poly1305::new(key.into());
    let tag = Tag::from_slice(&sealed[16..]);
    cipher
        .decrypt_in_place_detached(XNonce::from_slice(at), aad, &mut cookie, tag)
        .map_err(|_| NoiseError::Tag)?;
    Ok(cookie)
}
