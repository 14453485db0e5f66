//! The handshake Noise_IKpsk2: initiation and response, made and taken.
//!
//! ```text
//! initiation 0 type  4 sender  8 ephemeral  40 static+tag  88 time+tag  116 mac1  132 mac2  148
//! response   0 type  4 sender  8 receiver  12 ephemeral  44 tag  60 mac1  76 mac2  92
//! ```
//!
//! Source: whitepaper §5.4.2, §5.4.3.

use std::time::Instant;

use x25519_dalek::{PublicKey, StaticSecret};

use super::crypto::{Key, agree, hash, kdf, mac, open_once, seal_once};
use super::session::Session;
use super::{INITIATION, NoiseError, RESPONSE, random, u32_at};

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
const LABEL_MAC1: &[u8] = b"mac1----";
const LABEL_COOKIE: &[u8] = b"cookie--";

/// Who we are.
pub(crate) struct Identity {
    private: StaticSecret,
    pub(crate) public: PublicKey,
    pub(super) mac1: Key,
    pub(super) cookie: Key,
}

impl Identity {
    pub(crate) fn new(private: StaticSecret) -> Self {
        let public = PublicKey::from(&private);
        let [mac1, cookie] = labelled(&public);
        Self { private, public, mac1, cookie }
    }
}

/// Who the peer is, and what can be computed of it once.
pub(super) struct Remote {
    pub(super) public: PublicKey,
    /// `None` for a key with which no secret can be shared.
    shared: Option<Key>,
    preshared: Key,
    pub(super) mac1: Key,
    pub(super) cookie: Key,
}

impl Remote {
    pub(super) fn new(us: &Identity, public: PublicKey, preshared: Option<Key>) -> Self {
        let [mac1, cookie] = labelled(&public);
        let shared = agree(&us.private, &public).ok();
        Self { public, shared, preshared: preshared.unwrap_or_default(), mac1, cookie }
    }

    fn shared(&self) -> Result<&Key, NoiseError> {
        self.shared.as_ref().ok_or(NoiseError::Handshake)
    }
}

fn labelled(public: &PublicKey) -> [Key; 2] {
    [LABEL_MAC1, LABEL_COOKIE].map(|label| hash(label, public.as_bytes()))
}

/// Chaining key and hash, as far as the handshake has come.
#[derive(Clone)]
struct Chain {
    key: Key,
    hash: Key,
}

impl Chain {
    fn new(responder: &PublicKey) -> Self {
        let key = hash(CONSTRUCTION, &[]);
        Self { key, hash: hash(&hash(&key, IDENTIFIER), responder.as_bytes()) }
    }

    fn hash(&mut self, bytes: &[u8]) {
        self.hash = hash(&self.hash, bytes);
    }

    fn ephemeral(&mut self, public: &PublicKey) {
        self.hash(public.as_bytes());
        [self.key] = kdf(&self.key, public.as_bytes());
    }

    fn mix(&mut self, secret: &Key) {
        [self.key] = kdf(&self.key, secret);
    }

    fn mix_for_key(&mut self, secret: &Key) -> Key {
        let [chain, key] = kdf(&self.key, secret);
        self.key = chain;
        key
    }

    fn mix_preshared(&mut self, preshared: &Key) -> Key {
        let [chain, temporary, key] = kdf(&self.key, preshared);
        self.key = chain;
        self.hash(&temporary);
        key
    }
}

/// An initiation of ours that waits for its response.
pub(super) struct Initiated {
    pub(super) local: u32,
    chain: Chain,
    ephemeral: StaticSecret,
}

/// An initiation of somebody's: what it says, before it is known whether the peer of
/// that key may, and before its time is looked at.
pub(crate) struct Claim {
    /// Who it claims to be; it knows our key, no more is proven.
    pub(crate) public: [u8; 32],
    chain: Chain,
    ephemeral: PublicKey,
    sender: u32,
    sealed_time: [u8; 28],
}

impl Claim {
    /// Reads an initiation to us, at the cost of one key agreement.
    pub(crate) fn read(us: &Identity, message: &[u8; INITIATION]) -> Result<Self, NoiseError> {
        let mut chain = Chain::new(&us.public);
        let ephemeral = public_at(message, 8);
        chain.ephemeral(&ephemeral);
        let key = chain.mix_for_key(&agree(&us.private, &ephemeral)?);
        let sealed = &message[40..88];
        let public = open_once(&key, &chain.hash, sealed)?;
        chain.hash(sealed);
        let mut sealed_time = [0; 28];
        sealed_time.copy_from_slice(&message[88..116]);
        Ok(Self { public, chain, ephemeral, sender: u32_at(message, 4), sealed_time })
    }

    /// Its time, which proves that the peer made it, and the state after it.
    pub(super) fn verify(mut self, peer: &Remote) -> Result<([u8; 12], Verified), NoiseError> {
        let key = self.chain.mix_for_key(peer.shared()?);
        let time = open_once(&key, &self.chain.hash, &self.sealed_time)?;
        self.chain.hash(&self.sealed_time);
        let Self { chain, ephemeral, sender, .. } = self;
        Ok((time, Verified { chain, ephemeral, sender }))
    }
}

/// An initiation that its peer has made.
pub(super) struct Verified {
    chain: Chain,
    ephemeral: PublicKey,
    sender: u32,
}

/// Writes an initiation, without the MACs.
pub(super) fn initiate(
    us: &Identity,
    peer: &Remote,
    local: u32,
    time: [u8; 12],
    out: &mut [u8; INITIATION],
) -> Result<Initiated, NoiseError> {
    let mut chain = Chain::new(&peer.public);
    let ephemeral = StaticSecret::from(random()?);
    let public = PublicKey::from(&ephemeral);
    out.fill(0);
    out[0] = 1;
    out[4..8].copy_from_slice(&local.to_le_bytes());
    out[8..40].copy_from_slice(public.as_bytes());
    chain.ephemeral(&public);
    let key = chain.mix_for_key(&agree(&ephemeral, &peer.public)?);
    seal_once(&key, &chain.hash, us.public.as_bytes(), &mut out[40..88]);
    chain.hash(&out[40..88]);
    let key = chain.mix_for_key(peer.shared()?);
    seal_once(&key, &chain.hash, &time, &mut out[88..116]);
    chain.hash(&out[88..116]);
    Ok(Initiated { local, chain, ephemeral })
}

/// Writes the response to an initiation, without the MACs; gives the session.
pub(super) fn respond(
    peer: &Remote,
    initiation: Verified,
    local: u32,
    now: Instant,
    out: &mut [u8; RESPONSE],
) -> Result<Session, NoiseError> {
    let Verified { mut chain, ephemeral: theirs, sender } = initiation;
    let ours = StaticSecret::from(random()?);
    let public = PublicKey::from(&ours);
    out.fill(0);
    out[0] = 2;
    out[4..8].copy_from_slice(&local.to_le_bytes());
    out[8..12].copy_from_slice(&sender.to_le_bytes());
    out[12..44].copy_from_slice(public.as_bytes());
    chain.ephemeral(&public);
    chain.mix(&agree(&ours, &theirs)?);
    chain.mix(&agree(&ours, &peer.public)?);
    let key = chain.mix_preshared(&peer.preshared);
    seal_once(&key, &chain.hash, &[], &mut out[44..60]);
    let [receiving, sending] = kdf(&chain.key, &[]);
    Ok(Session::new([local, sender], [&sending, &receiving], now, false))
}

impl Initiated {
    /// Takes the response; gives the session. What does not fit changes nothing.
    pub(super) fn finish(
        &self,
        us: &Identity,
        peer: &Remote,
        now: Instant,
        message: &[u8; RESPONSE],
    ) -> Result<Session, NoiseError> {
        let mut chain = self.chain.clone();
        let theirs = public_at(message, 12);
        chain.ephemeral(&theirs);
        chain.mix(&agree(&self.ephemeral, &theirs)?);
        chain.mix(&agree(&us.private, &theirs)?);
        let key = chain.mix_preshared(&peer.preshared);
        open_once::<0>(&key, &chain.hash, &message[44..60])?;
        let [sending, receiving] = kdf(&chain.key, &[]);
        let remote = u32_at(message, 4);
        Ok(Session::new([self.local, remote], [&sending, &receiving], now, true))
    }
}

/// Fills in the MACs at the end of a handshake message; gives the first.
pub(super) fn put_macs(peer: &Remote, cookie: Option<&[u8; 16]>, message: &mut [u8]) -> [u8; 16] {
    let end = message.len() - 32;
    let (body, macs) = message.split_at_mut(end);
    let mac1 = mac(&peer.mac1, body, &[]);
    macs[..16].copy_from_slice(&mac1);
    if let Some(cookie) = cookie {
        macs[16..].copy_from_slice(&mac(cookie, body, &mac1));
    }
    mac1
}

fn public_at(message: &[u8], at: usize) -> PublicKey {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(&message[at..at + 32]);
    PublicKey::from(bytes)
}
