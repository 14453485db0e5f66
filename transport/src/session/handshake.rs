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
//! A session that was moved makes the same handshake with a longer first message: its
//! keys are those of the handshake mixed with the secret of before the move, the epoch
//! and a number that chance gave to this life. So both ends have proved that they are the
//! session's, and two thaws of one image have nothing in common but the image.
//!
//! Not here: retries, which keys are allowed, replayed initiations (the counter
//! in [`InitiationSecret`] is for that), who uses the keys when.
//!
//! Invariants: the initiator proves its static key in message 1, the responder in
//! message 2; version, features and session indices are part of the transcript. A
//! forged response leaves the [`Initiator`] as it was.

/// Packets go in the clear where both ends offer this: anybody on the way can read and change
/// them.
pub use conet_wire::session::handshake::FEATURE_PLAIN;

use super::key::Root;
use super::protect::{Cipher, Key};
use alloc::boxed::Box;
use alloc::vec::Vec;
use conet_wire::session::handshake::{
    FEATURE_AES, FEATURE_BULK, FEATURE_FIND, FEATURE_LANES, FEATURE_MOVE, FEATURE_RESUMED,
    FEATURE_SUPERSEDED, INITIATION, INITIATION_CLEAR, INITIATION_SECRET, Initiation,
    InitiationSecret, NOISE_2, RESPONSE, RESPONSE_SECRET, RESUMED_SECRET, RESUMPTION,
    RESUMPTION_SECRET, Response, ResponseSecret, ResumptionSecret,
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
    /// The features in use.
    pub features: u32,
    /// For moves to come.
    pub(crate) root: Root,
    /// The responder's epoch and life, in answer to a resumption.
    pub(crate) responder: Option<(u64, u64)>,
}

/// The features that this build has on any machine.
pub const FEATURES: u32 = FEATURE_LANES | FEATURE_MOVE | FEATURE_BULK | FEATURE_FIND;

/// The features that this machine offers.
#[cfg(feature = "std")]
#[must_use]
pub fn local_features() -> u32 {
    match Cipher::preferred() {
        Cipher::Aes128Gcm => FEATURE_AES | FEATURES,
        Cipher::ChaCha20Poly1305 | Cipher::Plain => FEATURES,
    }
}

/// Both ends must want packets in clear; it is part of the transcript like the rest.
const fn cipher_of(features: u32) -> Cipher {
    if features & FEATURE_PLAIN != 0 {
        Cipher::Plain
    } else if features & FEATURE_AES != 0 {
        Cipher::Aes128Gcm
    } else {
        Cipher::ChaCha20Poly1305
    }
}

/// What a session that was moved resumes with.
#[derive(Debug)]
pub(crate) struct Resume {
    pub(crate) epoch: u64,
    pub(crate) life: u64,
    pub(crate) root: Root,
}

impl Resume {
    /// The keys of a moved session: the handshake's, the initiator's first.
    fn mix(&self, (first, second): (Key, Key)) -> (Key, Key) {
        let Self { epoch, life, root } = self;
        (root.mix(&first, *epoch, *life), root.mix(&second, *epoch, *life))
    }
}

/// The end that speaks first, waiting for the response.
pub struct Initiator {
    noise: Box<snow::HandshakeState>,
    offered: u32,
    resume: Option<Resume>,
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
        let mut packet = [0; INITIATION];
        let noise = write_first(local, remote, &clear, &secret.emit(), entropy, &mut packet)?;
        Ok((Self { noise, offered, resume: None }, packet))
    }

    /// Writes the resumption packet of a session that was moved.
    pub(crate) fn resume(
        local: &PrivateKey,
        remote: &PublicKey,
        offered: u32,
        common: InitiationSecret,
        resume: Resume,
        entropy: &mut dyn Entropy,
    ) -> Result<(Self, [u8; RESUMPTION]), HandshakeError> {
        let clear = Initiation::emit_clear_resumption(offered);
        let Resume { epoch, life, root } = &resume;
        let secret = ResumptionSecret { common, epoch: *epoch, life: *life, root: root.id };
        let mut packet = [0; RESUMPTION];
        let noise = write_first(local, remote, &clear, &secret.emit(), entropy, &mut packet)?;
        Ok((Self { noise, offered, resume: Some(resume) }, packet))
    }

    /// Reads the response.
    ///
    /// # Errors
    ///
    /// [`HandshakeError::Forged`] if it answers something else: the handshake is as
    /// it was and may still finish. [`HandshakeError::Malformed`] if the peer
    /// chose what was not offered.
    pub fn finish(&mut self, response: &Response<'_>) -> Result<Established, HandshakeError> {
        let is_long = response.noise.len() > NOISE_2;
        if is_long != self.resume.is_some() {
            return Err(HandshakeError::Forged);
        }
        let mut payload = [0; RESUMED_SECRET];
        self.noise
            .read_message(response.noise, &mut payload)
            .map_err(|_| HandshakeError::Forged)?;
        let (front, back) =
            payload.split_first_chunk::<RESPONSE_SECRET>().ok_or(HandshakeError::Malformed)?;
        let secret = ResponseSecret::parse(front);
        let responder = back.first_chunk().zip(back.last_chunk()).filter(|_| is_long);
        let responder =
            responder.map(|(epoch, life)| (u64::from_le_bytes(*epoch), u64::from_le_bytes(*life)));
        let mut allowed = self.offered | FEATURE_SUPERSEDED;
        if self.resume.is_some() {
            allowed |= FEATURE_RESUMED;
        }
        if secret.chosen & !allowed != 0 {
            return Err(HandshakeError::Malformed);
        }
        let mut keys = split(&mut self.noise);
        if let Some(resume) = self.resume.take_if(|_| secret.chosen & FEATURE_RESUMED != 0) {
            keys = resume.mix(keys);
        }
        let (first, second) = keys;
        Ok(Established {
            root: Root::of_handshake(&first, &second),
            sealing: first,
            opening: second,
            cipher: cipher_of(secret.chosen),
            remote_session: secret.session,
            remote_incarnation: secret.incarnation,
            features: secret.chosen,
            responder,
        })
    }
}

/// An initiation that opened: its sender holds the private key of `remote`.
pub struct Received {
    noise: Box<snow::HandshakeState>,
    offered: u32,
    remote: PublicKey,
    secret: ResumptionSecret,
    resumes: bool,
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
        let mut payload = [0; RESUMPTION_SECRET];
        let length = noise
            .read_message(initiation.noise, &mut payload)
            .map_err(|_| HandshakeError::Forged)?;
        let resumes = initiation.resumes;
        let secret = match (resumes, length) {
            (true, RESUMPTION_SECRET) => ResumptionSecret::parse(&payload),
            (false, INITIATION_SECRET) => {
                let common = payload.first_chunk().and_then(InitiationSecret::parse);
                common.map(|common| ResumptionSecret { common, epoch: 0, life: 0, root: 0 })
            }
            _ => None,
        };
        let secret = secret.ok_or(HandshakeError::Malformed)?;
        let remote = noise.get_remote_static().and_then(|key| key.try_into().ok());
        let remote = PublicKey(remote.ok_or(HandshakeError::Malformed)?);
        let offered = initiation.offered;
        Ok(Self { noise: Box::new(noise), offered, remote, secret, resumes })
    }

    /// Who sent it.
    #[must_use]
    pub const fn remote(&self) -> PublicKey {
        self.remote
    }

    /// What it said under seal.
    #[must_use]
    pub const fn secret(&self) -> InitiationSecret {
        self.secret.common
    }

    /// What a session that was moved said; epoch, life and root are zero in others.
    #[must_use]
    pub const fn resumption(&self) -> ResumptionSecret {
        self.secret
    }

    /// Whether it is the first message of a session that was moved.
    #[must_use]
    pub const fn resumes(&self) -> bool {
        self.resumes
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
        self,
        session: u32,
        incarnation: u64,
        supported: u32,
    ) -> Result<(Established, [u8; RESPONSE]), HandshakeError> {
        let (established, packet) = self.answer(session, incarnation, supported, None, (0, 0))?;
        let packet = packet.first_chunk().copied().ok_or(HandshakeError::Malformed)?;
        Ok((established, packet))
    }

    /// Answers it, and resumes a session where `resume` says so. `ours` is our own epoch
    /// and life, told to who resumes.
    pub(crate) fn answer(
        self,
        session: u32,
        incarnation: u64,
        supported: u32,
        resume: Option<&Root>,
        ours: (u64, u64),
    ) -> Result<(Established, Vec<u8>), HandshakeError> {
        let mut chosen = self.offered & supported & (FEATURE_AES | FEATURE_PLAIN | FEATURES);
        if resume.is_some() {
            chosen |= FEATURE_RESUMED;
        }
        self.respond(ResponseSecret { incarnation, session, chosen }, resume, ours)
    }

    /// Tells it that its session is another's by now.
    pub(crate) fn refuse(self) -> Result<Vec<u8>, HandshakeError> {
        let chosen = FEATURE_SUPERSEDED;
        let secret = ResponseSecret { incarnation: 0, session: 0, chosen };
        self.respond(secret, None, (0, 0)).map(|(_, packet)| packet)
    }

    fn respond(
        mut self,
        response: ResponseSecret,
        resume: Option<&Root>,
        ours: (u64, u64),
    ) -> Result<(Established, Vec<u8>), HandshakeError> {
        let ResumptionSecret { common, epoch, life, .. } = self.secret;
        let mut secret = response.emit().to_vec();
        if self.resumes {
            secret.extend_from_slice(&ours.0.to_le_bytes());
            secret.extend_from_slice(&ours.1.to_le_bytes());
        }
        let mut packet = Response::emit_clear(common.session).to_vec();
        let front = packet.len();
        packet.resize(RESPONSE - RESPONSE_SECRET + secret.len(), 0);
        let message = packet.get_mut(front..).unwrap_or_default();
        self.noise.write_message(&secret, message).map_err(HandshakeError::Step)?;
        let mut keys = split(&mut self.noise);
        if let Some(root) = resume {
            keys = Resume { epoch, life, root: root.duplicate() }.mix(keys);
        }
        let (first, second) = keys;
        let established = Established {
            root: Root::of_handshake(&first, &second),
            sealing: second,
            opening: first,
            cipher: cipher_of(response.chosen),
            remote_session: common.session,
            remote_incarnation: common.incarnation,
            features: response.chosen,
            responder: None,
        };
        Ok((established, packet))
    }
}

/// Writes Noise message 1 behind the clear bytes.
fn write_first(
    local: &PrivateKey,
    remote: &PublicKey,
    clear: &[u8; INITIATION_CLEAR],
    secret: &[u8],
    entropy: &mut dyn Entropy,
    packet: &mut [u8],
) -> Result<Box<snow::HandshakeState>, HandshakeError> {
    let prologue = prologue(clear);
    let mut noise = builder(entropy)?
        .local_private_key(local.0.expose())
        .and_then(|builder| builder.remote_public_key(&remote.0))
        .and_then(|builder| builder.prologue(&prologue))
        .and_then(snow::Builder::build_initiator)
        .map_err(HandshakeError::Step)?;
    let (front, message) = packet.split_at_mut(INITIATION_CLEAR);
    front.copy_from_slice(clear);
    noise.write_message(secret, message).map_err(HandshakeError::Step)?;
    Ok(Box::new(noise))
}

fn prologue(clear: &[u8; INITIATION_CLEAR]) -> Vec<u8> {
    [PROLOGUE, &clear[..]].concat()
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
