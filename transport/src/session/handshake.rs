//! Noise IK (Noise rev. 34 §7.5): both ends end up with a key per direction.
//!
//! ```text
//! Initiator ──initiation──►  Received ──accept──► Established (next, until confirmed)
//!           ◄──response───
//! Initiator ──finish──► Established
//! ```
//!
//! `Noise_IK_25519_ChaChaPoly_BLAKE2s`, as WireGuard's without the cookie. snow
//! with its default resolver does it: ring's resolver has no X25519 for static
//! keys, and at 3 packets per session its AEAD's 1.9 µs do not count. The keys
//! go to the packet protection, where they do.
//!
//! Not here: retries, which keys are allowed, replayed initiations (the counter
//! in [`InitiationSecret`] is for that), who uses the keys when.
//!
//! Invariants: the initiator proves its static key in message 1, the responder in
//! message 2; version, features and session indices are part of the transcript. A
//! forged response leaves the [`Initiator`] as it was.

use super::protect::{Cipher, Key};
use conet_wire::session::handshake::{
    FEATURE_AES, INITIATION, INITIATION_CLEAR, INITIATION_SECRET, Initiation, InitiationSecret,
    RESPONSE, RESPONSE_SECRET, Response, ResponseSecret,
};
use core::fmt;
use snow::params::{CipherChoice, DHChoice, HashChoice, NoiseParams};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types;
use zeroize::{Zeroize, Zeroizing};

const NOISE: &str = "Noise_IK_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"conet session";

/// A source of randomness; the only one that a core has.
pub trait Entropy: Send {
    /// Fills `bytes` with unpredictable ones.
    ///
    /// # Errors
    ///
    /// [`EntropyFailed`] if the system has none; nothing is sent then.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), EntropyFailed>;
}

/// The system gave no randomness; the kernel's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the system gives no randomness")]
pub struct EntropyFailed;

/// The system's generator (`getrandom(2)`).
#[derive(Clone, Debug)]
pub struct SystemEntropy(ring::rand::SystemRandom);

impl Default for SystemEntropy {
    fn default() -> Self {
        Self(ring::rand::SystemRandom::new())
    }
}

impl Entropy for SystemEntropy {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), EntropyFailed> {
        ring::rand::SecureRandom::fill(&self.0, bytes).map_err(|_| EntropyFailed)
    }
}

/// A node's X25519 public key: its name to the other nodes.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "PublicKey({a:02x}{b:02x}{c:02x}{d:02x}…)")
    }
}

/// A node's X25519 private key.
#[derive(Debug)]
pub struct PrivateKey(Key);

impl PrivateKey {
    /// Takes over `bytes`, any 32 (RFC 7748 §5 clamps on use).
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(Key::new(bytes))
    }

    /// The key that belongs to it.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        let mut public = PublicKey([0; 32]);
        if let Some(mut dh) = DefaultResolver.resolve_dh(&DHChoice::Curve25519) {
            dh.set(self.0.expose());
            public.0.copy_from_slice(dh.pubkey());
        }
        public
    }
}

/// Why a handshake went no further.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The message was not made for us or was changed; the peer's fault.
    #[error("handshake message does not open")]
    Forged,
    /// The sealed part is malformed; the peer's fault.
    #[error("handshake message says what it may not")]
    Malformed,
    /// No randomness; the kernel's fault.
    #[error(transparent)]
    Entropy(#[from] EntropyFailed),
    /// snow refused a step that the protocol allows; a bug.
    #[error("handshake step failed")]
    Step(#[source] snow::Error),
}

/// What a finished handshake yields.
#[derive(Debug)]
pub struct Established {
    /// For packets to the peer.
    pub sealing: Key,
    /// For packets from the peer.
    pub opening: Key,
    /// What both ends chose.
    pub cipher: Cipher,
    /// Index by which the peer wants to be addressed.
    pub remote_session: u32,
    /// The peer's incarnation.
    pub remote_incarnation: u64,
}

/// The features that this machine offers.
#[must_use]
pub fn local_features() -> u32 {
    match Cipher::preferred() {
        Cipher::Aes128Gcm => FEATURE_AES,
        Cipher::ChaCha20Poly1305 | Cipher::Plain => 0,
    }
}

const fn cipher_of(features: u32) -> Cipher {
    if features & FEATURE_AES != 0 { Cipher::Aes128Gcm } else { Cipher::ChaCha20Poly1305 }
}

/// The end that speaks first, waiting for the response.
pub struct Initiator {
    noise: Box<snow::HandshakeState>,
    offered: u32,
}

impl fmt::Debug for Initiator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Initiator").field("offered", &self.offered).finish_non_exhaustive()
    }
}

impl Initiator {
    /// Writes an initiation packet from `local` to `remote`.
    ///
    /// # Errors
    ///
    /// [`HandshakeError::Entropy`] or [`HandshakeError::Step`].
    pub fn start(
        local: &PrivateKey,
        remote: &PublicKey,
        offered: u32,
        secret: InitiationSecret,
        entropy: &mut dyn Entropy,
    ) -> Result<(Self, [u8; INITIATION]), HandshakeError> {
        let clear = Initiation::emit_clear(offered);
        let prologue = prologue(&clear);
        let mut noise = builder(entropy)?
            .local_private_key(local.0.expose())
            .and_then(|builder| builder.remote_public_key(&remote.0))
            .and_then(|builder| builder.prologue(&prologue))
            .and_then(snow::Builder::build_initiator)
            .map_err(HandshakeError::Step)?;
        let mut packet = [0; INITIATION];
        let (front, message) = packet.split_at_mut(INITIATION_CLEAR);
        front.copy_from_slice(&clear);
        noise.write_message(&secret.emit(), message).map_err(HandshakeError::Step)?;
        Ok((Self { noise: Box::new(noise), offered }, packet))
    }

    /// Reads the response.
    ///
    /// # Errors
    ///
    /// [`HandshakeError::Forged`] if it answers something else: the handshake is as
    /// it was and may still finish. [`HandshakeError::Malformed`] if the peer
    /// chose what was not offered.
    pub fn finish(&mut self, response: &Response<'_>) -> Result<Established, HandshakeError> {
        let mut payload = [0; RESPONSE_SECRET];
        match self.noise.read_message(response.noise, &mut payload) {
            Ok(RESPONSE_SECRET) => {}
            Ok(_) => return Err(HandshakeError::Malformed),
            Err(_) => return Err(HandshakeError::Forged),
        }
        let secret = ResponseSecret::parse(&payload);
        if secret.chosen & !self.offered != 0 {
            return Err(HandshakeError::Malformed);
        }
        let (first, second) = split(&mut self.noise);
        Ok(Established {
            sealing: first,
            opening: second,
            cipher: cipher_of(secret.chosen),
            remote_session: secret.session,
            remote_incarnation: secret.incarnation,
        })
    }
}

/// An initiation that opened: its sender holds the private key of `remote`.
pub struct Received {
    noise: Box<snow::HandshakeState>,
    offered: u32,
    remote: PublicKey,
    secret: InitiationSecret,
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("remote", &self.remote)
            .field("secret", &self.secret)
            .finish_non_exhaustive()
    }
}

impl Received {
    /// Opens an initiation made for `local`.
    ///
    /// # Errors
    ///
    /// See [`HandshakeError`].
    pub fn open(
        local: &PrivateKey,
        initiation: &Initiation<'_>,
        entropy: &mut dyn Entropy,
    ) -> Result<Self, HandshakeError> {
        let prologue = prologue(initiation.clear);
        let mut noise = builder(entropy)?
            .local_private_key(local.0.expose())
            .and_then(|builder| builder.prologue(&prologue))
            .and_then(snow::Builder::build_responder)
            .map_err(HandshakeError::Step)?;
        let mut payload = [0; INITIATION_SECRET];
        match noise.read_message(initiation.noise, &mut payload) {
            Ok(INITIATION_SECRET) => {}
            Ok(_) => return Err(HandshakeError::Malformed),
            Err(_) => return Err(HandshakeError::Forged),
        }
        let secret = InitiationSecret::parse(&payload).ok_or(HandshakeError::Malformed)?;
        let remote = noise.get_remote_static().and_then(|key| key.try_into().ok());
        let remote = PublicKey(remote.ok_or(HandshakeError::Malformed)?);
        Ok(Self { noise: Box::new(noise), offered: initiation.offered, remote, secret })
    }

    /// Who sent it.
    #[must_use]
    pub const fn remote(&self) -> PublicKey {
        self.remote
    }

    /// What it said under seal.
    #[must_use]
    pub const fn secret(&self) -> InitiationSecret {
        self.secret
    }

    /// Answers it. `session` is the index by which we want to be addressed,
    /// `supported` the features that we have.
    ///
    /// The keys must carry no data of ours until a packet has been opened with
    /// them: only that proves that the initiation was not an old one.
    ///
    /// # Errors
    ///
    /// [`HandshakeError::Step`].
    pub fn accept(
        mut self,
        session: u32,
        incarnation: u64,
        supported: u32,
    ) -> Result<(Established, [u8; RESPONSE]), HandshakeError> {
        let chosen = self.offered & supported & FEATURE_AES;
        let clear = Response::emit_clear(self.secret.session);
        let mut packet = [0; RESPONSE];
        let (front, message) = packet.split_at_mut(clear.len());
        front.copy_from_slice(&clear);
        let secret = ResponseSecret { incarnation, session, chosen };
        self.noise.write_message(&secret.emit(), message).map_err(HandshakeError::Step)?;
        let (first, second) = split(&mut self.noise);
        let established = Established {
            sealing: second,
            opening: first,
            cipher: cipher_of(chosen),
            remote_session: self.secret.session,
            remote_incarnation: self.secret.incarnation,
        };
        Ok((established, packet))
    }
}

fn prologue(clear: &[u8; INITIATION_CLEAR]) -> Vec<u8> {
    [PROLOGUE, clear].concat()
}

fn split(noise: &mut snow::HandshakeState) -> (Key, Key) {
    let (mut first, mut second) = noise.dangerously_get_raw_split();
    let keys = (Key::new(first), Key::new(second));
    first.zeroize();
    second.zeroize();
    keys
}

fn builder<'k>(entropy: &mut dyn Entropy) -> Result<snow::Builder<'k>, HandshakeError> {
    let mut seed = Zeroizing::new([0; 32]);
    entropy.fill(&mut *seed)?;
    let params: NoiseParams = NOISE.parse().map_err(HandshakeError::Step)?;
    Ok(snow::Builder::with_resolver(params, Box::new(Resolver { seed })))
}

/// snow's default primitives, but for the randomness, which comes from outside.
struct Resolver {
    seed: Zeroizing<[u8; 32]>,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn types::Random>> {
        Some(Box::new(OneKey { seed: Some(self.seed.clone()) }))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn types::Dh>> {
        DefaultResolver.resolve_dh(choice)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn types::Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn types::Cipher>> {
        DefaultResolver.resolve_cipher(choice)
    }
}

/// Random bytes for one ephemeral key; there is no second, so none can repeat.
struct OneKey {
    seed: Option<Zeroizing<[u8; 32]>>,
}

impl types::Random for OneKey {
    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), snow::Error> {
        match self.seed.take() {
            Some(seed) if seed.len() == bytes.len() => {
                bytes.copy_from_slice(&*seed);
                Ok(())
            }
            _ => Err(snow::Error::Rng),
        }
    }
}

#[cfg(test)]
mod tests;
