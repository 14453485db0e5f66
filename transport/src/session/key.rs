//! Symmetric keys and how link keys derive from one secret.
//!
//! Invariants: a [`Key`] is wiped when it is dropped and never printed. The two
//! directions of a link never share a key, so both may count from zero.

use core::fmt;
use ring::hkdf;
use zeroize::Zeroize;

/// A 256-bit symmetric key or secret.
///
/// [`Cipher::Aes128Gcm`](super::protect::Cipher::Aes128Gcm) uses its first 16
/// bytes; all keys here come from a key derivation, whose every part is as good
/// as the whole.
pub struct Key([u8; Self::LEN]);

impl Key {
    /// Bytes of a key.
    pub const LEN: usize = 32;

    /// Takes over `bytes`; the caller wipes its own copy.
    #[must_use]
    pub const fn new(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The secret itself, for handing it to another process over a trusted channel.
    #[must_use]
    pub const fn expose(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// A second copy of the secret; each is wiped on its own.
    #[must_use]
    pub const fn duplicate(&self) -> Self {
        Self(self.0)
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(redacted)")
    }
}

/// The keys of a link between the two halves of a process, one per direction.
#[derive(Debug)]
pub struct LinkKeys {
    /// Home seals, remote opens.
    pub home_to_remote: Key,
    /// Remote seals, home opens.
    pub remote_to_home: Key,
}

/// Derives both keys of a link from the secret `root` by HKDF-SHA256 (RFC 5869).
///
/// `context` binds the keys to one link and one of its lives (process, epoch):
/// a pair that has been used must not be derived again, or nonces would repeat.
#[must_use]
pub fn link_keys(root: &Key, context: &[u8]) -> LinkKeys {
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, b"conet link v1").extract(&root.0);
    LinkKeys {
        home_to_remote: expand(&prk, b"home to remote", context),
        remote_to_home: expand(&prk, b"remote to home", context),
    }
}

/// A secret that both ends of a session share and no packet is sealed under, from which
/// the keys of a moved session and of MOVED packets derive.
#[cfg(feature = "hub")]
#[derive(Debug)]
pub(crate) struct Root {
    /// Names it; no secret.
    pub(crate) id: u64,
    key: Key,
}

#[cfg(feature = "hub")]
impl Root {
    /// From both keys that a handshake yielded, the initiator's first.
    pub(crate) fn of_handshake(first: &Key, second: &Key) -> Self {
        let mut both = [0; 2 * Key::LEN];
        let (front, back) = both.split_at_mut(Key::LEN);
        front.copy_from_slice(&first.0);
        back.copy_from_slice(&second.0);
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, b"conet root v1").extract(&both);
        both.zeroize();
        Self::new(expand(&prk, b"root", b""))
    }

    /// Continues one that was exported.
    pub(crate) fn new(key: Key) -> Self {
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, b"conet root v1").extract(&key.0);
        let id = expand(&prk, b"id", b"");
        let id = id.0.first_chunk().map_or(0, |id| u64::from_le_bytes(*id));
        Self { id, key }
    }

    pub(crate) const fn duplicate(&self) -> Self {
        Self { id: self.id, key: self.key.duplicate() }
    }

    pub(crate) const fn expose(&self) -> &Key {
        &self.key
    }

    /// The key of one direction after a move: of the handshake's fresh key, this secret,
    /// the epoch, and the number that chance gave to this life. Two lives of one image
    /// never share a key, whatever the image says.
    pub(crate) fn mix(&self, fresh: &Key, epoch: u64, life: u64) -> Key {
        let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, &self.key.0);
        let mut context = [0; 16];
        context[..8].copy_from_slice(&epoch.to_le_bytes());
        context[8..].copy_from_slice(&life.to_le_bytes());
        expand(&salt.extract(&fresh.0), b"resumed", &context)
    }

    /// The key of MOVED packets.
    pub(crate) fn moved_key(&self) -> Key {
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, b"conet root v1").extract(&self.key.0);
        expand(&prk, b"moved", b"")
    }
}

struct KeyLength;

impl hkdf::KeyType for KeyLength {
    fn len(&self) -> usize {
        Key::LEN
    }
}

/// # Panics
///
/// Never: HKDF-SHA256 fails only beyond 255 × 32 bytes (RFC 5869 §2.3).
fn expand(prk: &hkdf::Prk, label: &[u8], context: &[u8]) -> Key {
    let mut key = Key::new([0; Key::LEN]);
    // The label's length goes in front, so that no two (label, context) pairs
    // run together to the same bytes.
    let length = [u8::try_from(label.len()).unwrap_or(u8::MAX)];
    let filled = prk
        .expand(&[&length, label, context], KeyLength)
        .and_then(|output| output.fill(&mut key.0));
    assert!(filled.is_ok(), "HKDF refuses 32 bytes");
    key
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::format;

    #[test]
    fn directions_and_contexts_have_keys_of_their_own() {
        let root = Key::new([7; 32]);
        let one = link_keys(&root, b"pid 1, epoch 1");
        let again = link_keys(&root, b"pid 1, epoch 1");
        let two = link_keys(&root, b"pid 1, epoch 2");
        assert_eq!(one.home_to_remote.expose(), again.home_to_remote.expose());
        assert_eq!(one.remote_to_home.expose(), again.remote_to_home.expose());
        assert_ne!(one.home_to_remote.expose(), one.remote_to_home.expose());
        assert_ne!(one.home_to_remote.expose(), two.home_to_remote.expose());
        assert_ne!(one.remote_to_home.expose(), two.remote_to_home.expose());
        assert_ne!(one.home_to_remote.expose(), root.expose());
    }

    /// Pins the derivation: two builds that disagree here cannot talk.
    #[test]
    fn derivation_golden_vector() {
        let keys = link_keys(&Key::new([7; 32]), b"golden");
        assert_eq!(keys.home_to_remote.expose()[..8], GOLDEN_HOME);
        assert_eq!(keys.remote_to_home.expose()[..8], GOLDEN_REMOTE);
    }

    /// Computed with Python's hmac, apart from ring.
    const GOLDEN_HOME: [u8; 8] = [36, 93, 109, 57, 207, 59, 62, 247];
    const GOLDEN_REMOTE: [u8; 8] = [119, 242, 99, 40, 72, 114, 233, 212];

    #[test]
    fn lives_epochs_and_roots_have_keys_of_their_own() {
        let root = Root::of_handshake(&Key::new([1; 32]), &Key::new([2; 32]));
        let other = Root::of_handshake(&Key::new([2; 32]), &Key::new([1; 32]));
        let fresh = Key::new([3; 32]);
        assert_ne!(root.id, other.id);
        let mixed = root.mix(&fresh, 1, 1);
        assert_eq!(mixed.expose(), root.duplicate().mix(&fresh, 1, 1).expose());
        for other in [
            root.mix(&fresh, 2, 1),
            root.mix(&fresh, 1, 2),
            root.mix(&Key::new([4; 32]), 1, 1),
            other.mix(&fresh, 1, 1),
            root.moved_key(),
        ] {
            assert_ne!(mixed.expose(), other.expose());
        }
        assert_eq!(Root::new(root.expose().duplicate()).id, root.id);
    }

    #[test]
    fn debug_shows_no_secret() {
        assert_eq!(format!("{:?}", Key::new([0x5a; 32])), "Key(redacted)");
    }
}
