//! Packet protection: sealing and opening packets in place.
//!
//! ```text
//! seal   buf: │ head room 16 │ payload … │ room for tag 16 │ → │ header │ ciphertext │ tag │
//! open   packet: │ header │ ciphertext │ tag │ → range of the payload within it
//! ```
//!
//! The header is the associated data; the nonce is four zero bytes and the packet
//! number, little-endian (as WireGuard §5.4.6). Two ways to refuse a replay:
//! [`Replay::Window`] for carriers that lose and reorder, and
//! [`Replay::InOrder`] for byte streams, where any gap is an attack or a bug.
//!
//! Not here: who gets which key, when keys are changed, and whether the session
//! index is the right one (it is authenticated; the caller compares).
//!
//! Invariants: a sealer never uses a number twice; an opener changes its replay
//! state only after the tag was right. A packet that does not open has been
//! overwritten and must be dropped. Nothing allocates.

use super::replay::Window;
use conet_wire::session::{HEADER, Header, HeaderError, PacketKind, TAG};
use core::ops::Range;
use ring::aead::{self, LessSafeKey, Nonce, UnboundKey};

pub use super::key::{Key, LinkKeys, link_keys};

/// Which AEAD protects packets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cipher {
    /// AES-128-GCM (RFC 5116 §5.1): 0.11 µs for 64 B where the processor has AES.
    Aes128Gcm,
    /// ChaCha20-Poly1305 (RFC 8439): 0.23 µs for 64 B anywhere.
    ChaCha20Poly1305,
    /// Nothing is hidden, and nothing but an accident is noticed: numbers count, tags
    /// are zero. Only where the owners of both ends want it, for networks on which
    /// nobody else is. Never chosen by itself.
    Plain,
}

impl Cipher {
    /// The faster one on this processor; both ends of a session must agree, so it
    /// is a wish and not a decision.
    #[cfg(feature = "std")]
    #[must_use]
    pub fn preferred() -> Self {
        #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
        let fast = std::arch::is_x86_feature_detected!("aes")
            && std::arch::is_x86_feature_detected!("pclmulqdq");
        #[cfg(target_arch = "aarch64")]
        let fast = std::arch::is_aarch64_feature_detected!("aes")
            && std::arch::is_aarch64_feature_detected!("pmull");
        #[cfg(not(any(target_arch = "x86_64", target_arch = "x86", target_arch = "aarch64")))]
        let fast = false;
        if fast { Self::Aes128Gcm } else { Self::ChaCha20Poly1305 }
    }

    /// The cipher with its key; none for [`Self::Plain`].
    ///
    /// # Panics
    ///
    /// Never: each algorithm gets a key of its own length.
    fn with(self, key: &Key) -> Option<LessSafeKey> {
        let (algorithm, bytes) = match self {
            Self::Aes128Gcm => (&aead::AES_128_GCM, &key.expose()[..16]),
            Self::ChaCha20Poly1305 => (&aead::CHACHA20_POLY1305, &key.expose()[..]),
            Self::Plain => return None,
        };
        let Ok(key) = UnboundKey::new(algorithm, bytes) else {
            unreachable!("the only failure is a wrong key length");
        };
        Some(LessSafeKey::new(key))
    }
}

fn nonce(number: u64) -> Nonce {
    let [n0, n1, n2, n3, n4, n5, n6, n7] = number.to_le_bytes();
    Nonce::assume_unique_for_key([0, 0, 0, 0, n0, n1, n2, n3, n4, n5, n6, n7])
}

/// The clear part of a packet that the caller chooses; the number is the sealer's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Label {
    /// What follows.
    pub kind: PacketKind,
    /// Free to the layer above.
    pub flags: u8,
    /// Index that the receiver chose.
    pub session: u32,
}

impl Label {
    /// A data packet without flags to `session`.
    #[must_use]
    pub const fn data(session: u32) -> Self {
        Self { kind: PacketKind::Data, flags: 0, session }
    }
}

/// Seals packets of one direction under one key.
#[derive(Debug)]
pub struct Sealer {
    key: Option<LessSafeKey>,
    next: u64,
}

/// Why a packet was not sealed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SealError {
    /// The buffer has no room for header, payload and tag; the caller's fault.
    #[error("buffer has no room for header, payload and tag")]
    NoRoom,
    /// All numbers are used; the session needs new keys.
    #[error("packet numbers are exhausted")]
    Exhausted,
    /// The cipher refuses the length; the caller's fault.
    #[error("payload is too long for the cipher")]
    TooLong,
}

impl Sealer {
    /// Seals under `key`, counting from `next_number`.
    ///
    /// A pair of key and number must never be used twice: continue another
    /// sealer's life only from its [`next_number`](Self::next_number), and only
    /// when that one seals no more.
    #[must_use]
    pub fn new(cipher: Cipher, key: &Key, next_number: u64) -> Self {
        Self { key: cipher.with(key), next: next_number }
    }

    /// Number of the next packet.
    #[must_use]
    pub const fn next_number(&self) -> u64 {
        self.next
    }

    /// Whether packets go in the clear, so that their bytes may be anywhere.
    pub(crate) const fn is_clear(&self) -> bool {
        self.key.is_none()
    }

    /// Seals `buf[HEADER..HEADER + payload_len]` in place, writes the header in front
    /// and the tag behind, and gives the length of the packet, which starts at
    /// `buf[0]`. `buf` must be `HEADER + payload_len + TAG` long or longer.
    ///
    /// # Errors
    ///
    /// See [`SealError`]. No number is used up; `buf` is unchanged but for
    /// [`SealError::TooLong`], after which it must not be sent.
    pub fn seal_in_place(
        &mut self,
        label: Label,
        buf: &mut [u8],
        payload_len: usize,
    ) -> Result<usize, SealError> {
        let end = HEADER.checked_add(payload_len).ok_or(SealError::NoRoom)?;
        let packet = end.checked_add(TAG).ok_or(SealError::NoRoom)?;
        let buf = buf.get_mut(..packet).ok_or(SealError::NoRoom)?;
        // The last number is never given out, so `next` cannot wrap.
        if self.next == u64::MAX {
            return Err(SealError::Exhausted);
        }
        let Label { kind, flags, session } = label;
        let header = Header { kind, flags, session, number: self.next }.emit();
        let (sealed, tag_room) = buf.split_at_mut(end);
        let (head_room, payload) = sealed.split_at_mut(HEADER);
        match &self.key {
            Some(key) => {
                let tag = key
                    .seal_in_place_separate_tag(nonce(self.next), aead::Aad::from(header), payload)
                    .map_err(|_| SealError::TooLong)?;
                tag_room.copy_from_slice(tag.as_ref());
            }
            None => tag_room.fill(0),
        }
        head_room.copy_from_slice(&header);
        self.next += 1;
        Ok(packet)
    }
}

/// How an [`Opener`] refuses a packet it has seen.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "1 KiB once per opener; a box would need an allocator"
)]
pub enum Replay {
    /// Any order, each number once, [`WIDTH`](super::replay::WIDTH) back.
    Window(Window),
    /// Exactly the next number.
    InOrder {
        /// The number that must come next.
        next: u64,
    },
}

impl Replay {
    /// A fresh window.
    #[must_use]
    pub const fn window() -> Self {
        Self::Window(Window::new())
    }

    /// In order, from number `next` on.
    #[must_use]
    pub const fn in_order(next: u64) -> Self {
        Self::InOrder { next }
    }

    fn check(&self, number: u64) -> Result<(), OpenError> {
        match self {
            Self::Window(window) if window.is_new(number) => Ok(()),
            Self::Window(_) => Err(OpenError::Replayed),
            Self::InOrder { next } if number < *next || number == u64::MAX => {
                Err(OpenError::Replayed)
            }
            Self::InOrder { next } if number > *next => Err(OpenError::Gap),
            Self::InOrder { .. } => Ok(()),
        }
    }

    fn mark(&mut self, number: u64) {
        match self {
            Self::Window(window) => {
                window.mark(number);
            }
            Self::InOrder { next } => *next = number + 1,
        }
    }
}

/// Opens packets of one direction under one key.
#[derive(Debug)]
pub struct Opener {
    key: Option<LessSafeKey>,
    replay: Replay,
}

/// Why a packet was not opened; always the peer's fault, or the network's.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum OpenError {
    /// Shorter than a header and a tag.
    #[error("packet is shorter than header and tag")]
    Truncated,
    /// The header is none.
    #[error("{0}")]
    Header(HeaderError),
    /// The number was seen before, or is too old to tell.
    #[error("packet number was seen before")]
    Replayed,
    /// In order was asked for, and packets are missing in front of this one.
    #[error("packets are missing in front of this one")]
    Gap,
    /// The tag is wrong: another key, or other bytes than were sealed.
    #[error("packet is forged or damaged")]
    Forged,
}

impl Opener {
    /// Opens under `key`, with `replay` continuing where it stands.
    #[must_use]
    pub fn new(cipher: Cipher, key: &Key, replay: Replay) -> Self {
        Self { key: cipher.with(key), replay }
    }

    /// Where the replay protection stands, to continue it elsewhere.
    #[must_use]
    pub const fn replay(&self) -> &Replay {
        &self.replay
    }

    /// One more than the highest number opened: in order, the number that must come
    /// next.
    #[must_use]
    pub const fn next_number(&self) -> u64 {
        match &self.replay {
            Replay::Window(window) => window.next(),
            Replay::InOrder { next } => *next,
        }
    }

    /// Whether packets come in the clear, so that their bytes may be anywhere.
    pub(crate) const fn is_clear(&self) -> bool {
        self.key.is_none()
    }

    /// As [`open_in_place`](Self::open_in_place), of a packet in the clear whose payload is
    /// elsewhere.
    pub(crate) fn open_parts(&mut self, header: Header, tag: &[u8]) -> Result<(), OpenError> {
        self.replay.check(header.number)?;
        if !self.is_clear() || *tag != [0; TAG] {
            return Err(OpenError::Forged);
        }
        self.replay.mark(header.number);
        Ok(())
    }

    /// Opens `packet`, which must be exactly one packet, in place; gives its header
    /// and where the payload lies within `packet`.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]. The opener is unchanged. After [`OpenError::Forged`] the
    /// bytes behind the header are unspecified.
    pub fn open_in_place(
        &mut self,
        packet: &mut [u8],
    ) -> Result<(Header, Range<usize>), OpenError> {
        let Some(payload_len) = packet.len().checked_sub(HEADER + TAG) else {
            return Err(OpenError::Truncated);
        };
        let header = Header::parse(packet).map_err(OpenError::Header)?;
        self.replay.check(header.number)?;
        let Some((clear, sealed)) = packet.split_first_chunk_mut::<HEADER>() else {
            return Err(OpenError::Truncated);
        };
        match &self.key {
            Some(key) => {
                key.open_in_place(nonce(header.number), aead::Aad::from(*clear), sealed)
                    .map_err(|_| OpenError::Forged)?;
            }
            None if sealed.ends_with(&[0; TAG]) => {}
            None => return Err(OpenError::Forged),
        }
        self.replay.mark(header.number);
        Ok((header, HEADER..HEADER + payload_len))
    }
}

#[cfg(test)]
mod tests;
