//! The two packets of a handshake (Noise IK) and what their sealed parts say.
//!
//! ```text
//! initiation   header, session 0 │ version u16 │ zero u16 │ offered u32 │ Noise message 1
//!   sealed     counter u64 │ incarnation u64 │ session u32 │ zero u32
//! response     header, the initiator's session │ Noise message 2
//!   sealed     incarnation u64 │ session u32 │ chosen u32
//! ```
//!
//! Everything in clear goes into the Noise prologue, so that a changed version or
//! feature bit breaks the handshake. The response is shorter than the initiation:
//! a forged sender address gains an attacker nothing.
//!
//! Not here: the Noise messages themselves, and who may connect.

use super::{HEADER, Header, PacketKind, TAG};

/// Version of the session protocol.
pub const VERSION: u16 = 1;
/// Feature bit: AES-128-GCM is fast here. Both ends have it: it is used.
pub const FEATURE_AES: u32 = 1;
/// Clear bytes in front of Noise message 1.
pub const INITIATION_CLEAR: usize = HEADER + 8;
/// Sealed bytes of an initiation, without tag.
pub const INITIATION_SECRET: usize = 24;
/// Sealed bytes of a response, without tag.
pub const RESPONSE_SECRET: usize = 16;
/// Noise IK message 1: ephemeral key, sealed static key, sealed payload (Noise §7.5).
pub const NOISE_1: usize = 32 + 32 + TAG + INITIATION_SECRET + TAG;
/// Noise IK message 2: ephemeral key, sealed payload.
pub const NOISE_2: usize = 32 + RESPONSE_SECRET + TAG;
/// Bytes of an initiation packet.
pub const INITIATION: usize = INITIATION_CLEAR + NOISE_1;
/// Bytes of a response packet.
pub const RESPONSE: usize = HEADER + NOISE_2;

/// Why a packet is no handshake packet; the peer's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HandshakeLayoutError {
    /// Each handshake packet has one length.
    #[error("handshake packet of {0} bytes")]
    Length(usize),
    /// Header fields that a handshake packet must not have, or reserved bits.
    #[error("handshake packet with an impossible header")]
    Header,
    /// Another version of the protocol.
    #[error("the peer speaks version {0} of the session protocol")]
    Version(u16),
}

/// An initiation, as far as it can be read without keys.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Initiation<'a> {
    /// What the initiator can do.
    pub offered: u32,
    /// All bytes in clear, for the prologue.
    pub clear: &'a [u8; INITIATION_CLEAR],
    /// Noise message 1.
    pub noise: &'a [u8; NOISE_1],
}

impl<'a> Initiation<'a> {
    /// Reads an initiation packet.
    ///
    /// # Errors
    ///
    /// See [`HandshakeLayoutError`].
    pub fn parse(packet: &'a [u8]) -> Result<Self, HandshakeLayoutError> {
        let wrong = HandshakeLayoutError::Length(packet.len());
        let (clear, noise) = packet.split_first_chunk::<INITIATION_CLEAR>().ok_or(wrong)?;
        let noise = noise.try_into().map_err(|_| wrong)?;
        let header = Header { kind: PacketKind::Initiation, flags: 0, session: 0, number: 0 };
        let [v0, v1, z0, z1, o0, o1, o2, o3] = match clear.split_first_chunk::<HEADER>() {
            Some((found, rest)) if *found == header.emit() => {
                *rest.first_chunk::<8>().ok_or(wrong)?
            }
            _ => return Err(HandshakeLayoutError::Header),
        };
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(HandshakeLayoutError::Version(version));
        }
        if [z0, z1] != [0, 0] {
            return Err(HandshakeLayoutError::Header);
        }
        Ok(Self { offered: u32::from_le_bytes([o0, o1, o2, o3]), clear, noise })
    }

    /// The clear bytes of an initiation that offers `offered`.
    #[must_use]
    pub fn emit_clear(offered: u32) -> [u8; INITIATION_CLEAR] {
        let header = Header { kind: PacketKind::Initiation, flags: 0, session: 0, number: 0 };
        let mut clear = [0; INITIATION_CLEAR];
        let (front, rest) = clear.split_at_mut(HEADER);
        front.copy_from_slice(&header.emit());
        let (version, features) = rest.split_at_mut(4);
        version[..2].copy_from_slice(&VERSION.to_le_bytes());
        features.copy_from_slice(&offered.to_le_bytes());
        clear
    }
}

/// A response, as far as it can be read without keys.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Response<'a> {
    /// The initiator's session index.
    pub session: u32,
    /// Noise message 2.
    pub noise: &'a [u8; NOISE_2],
}

impl<'a> Response<'a> {
    /// Reads a response packet.
    ///
    /// # Errors
    ///
    /// See [`HandshakeLayoutError`].
    pub fn parse(packet: &'a [u8]) -> Result<Self, HandshakeLayoutError> {
        let wrong = HandshakeLayoutError::Length(packet.len());
        let header = Header::parse(packet).map_err(|_| HandshakeLayoutError::Header)?;
        let noise = packet.get(HEADER..).and_then(|noise| noise.try_into().ok()).ok_or(wrong)?;
        if header.kind != PacketKind::Response || header.flags != 0 || header.number != 0 {
            return Err(HandshakeLayoutError::Header);
        }
        Ok(Self { session: header.session, noise })
    }

    /// The clear bytes of a response to `session`.
    #[must_use]
    pub fn emit_clear(session: u32) -> [u8; HEADER] {
        Header { kind: PacketKind::Response, flags: 0, session, number: 0 }.emit()
    }
}

/// What an initiator says under seal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct InitiationSecret {
    /// Grows with every initiation of this key, also across restarts.
    pub counter: u64,
    /// Chosen anew each time the initiator starts.
    pub incarnation: u64,
    /// Index by which the initiator wants to be addressed.
    pub session: u32,
}

impl InitiationSecret {
    /// Reads the opened payload; `None` if reserved bits are set.
    #[must_use]
    pub fn parse(bytes: &[u8; INITIATION_SECRET]) -> Option<Self> {
        let (counter, rest) = bytes.split_first_chunk::<8>()?;
        let (incarnation, rest) = rest.split_first_chunk::<8>()?;
        let (session, zero) = rest.split_first_chunk::<4>()?;
        (zero == [0; 4]).then(|| Self {
            counter: u64::from_le_bytes(*counter),
            incarnation: u64::from_le_bytes(*incarnation),
            session: u32::from_le_bytes(*session),
        })
    }

    /// The payload to seal.
    #[must_use]
    pub fn emit(&self) -> [u8; INITIATION_SECRET] {
        let mut bytes = [0; INITIATION_SECRET];
        bytes[..8].copy_from_slice(&self.counter.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.incarnation.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.session.to_le_bytes());
        bytes
    }
}

/// What a responder says under seal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ResponseSecret {
    /// Chosen anew each time the responder starts.
    pub incarnation: u64,
    /// Index by which the responder wants to be addressed.
    pub session: u32,
    /// The features in use, a subset of those offered.
    pub chosen: u32,
}

impl ResponseSecret {
    /// Reads the opened payload.
    #[must_use]
    pub fn parse(bytes: &[u8; RESPONSE_SECRET]) -> Self {
        let [i0, i1, i2, i3, i4, i5, i6, i7, s0, s1, s2, s3, c0, c1, c2, c3] = *bytes;
        Self {
            incarnation: u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]),
            session: u32::from_le_bytes([s0, s1, s2, s3]),
            chosen: u32::from_le_bytes([c0, c1, c2, c3]),
        }
    }

    /// The payload to seal.
    #[must_use]
    pub fn emit(&self) -> [u8; RESPONSE_SECRET] {
        let mut bytes = [0; RESPONSE_SECRET];
        bytes[..8].copy_from_slice(&self.incarnation.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.session.to_le_bytes());
        bytes[12..].copy_from_slice(&self.chosen.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn initiation(offered: u32, noise: u8) -> Vec<u8> {
        let mut packet = Initiation::emit_clear(offered).to_vec();
        packet.extend([noise; NOISE_1]);
        packet
    }

    #[test]
    fn initiation_is_read_back_and_nothing_else_is_taken() {
        let good = initiation(0x0403_0201, 9);
        assert_eq!(good.len(), INITIATION);
        assert_eq!(good[HEADER..INITIATION_CLEAR], [1, 0, 0, 0, 1, 2, 3, 4]);
        assert_eq!(Initiation::parse(&good).map(|i| i.offered), Ok(0x0403_0201));
        for length in 0..good.len() {
            assert!(Initiation::parse(&good[..length]).is_err());
        }
        for (at, error) in [
            (0, HandshakeLayoutError::Header),
            (1, HandshakeLayoutError::Header),
            (4, HandshakeLayoutError::Header),
            (15, HandshakeLayoutError::Header),
            (16, HandshakeLayoutError::Version(0)),
            (18, HandshakeLayoutError::Header),
        ] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(Initiation::parse(&bad), Err(error), "byte {at}");
        }
    }

    #[test]
    fn response_is_read_back_and_nothing_else_is_taken() {
        let mut good = Response::emit_clear(77).to_vec();
        good.extend([5; NOISE_2]);
        assert_eq!(good.len(), RESPONSE);
        assert_eq!(Response::parse(&good).map(|r| r.session), Ok(77));
        for length in 0..good.len() {
            assert!(Response::parse(&good[..length]).is_err());
        }
        good[8] = 1;
        assert_eq!(Response::parse(&good), Err(HandshakeLayoutError::Header));
    }

    proptest! {
        #[test]
        fn secrets_round_trip(counter: u64, incarnation: u64, session: u32, chosen: u32) {
            let secret = InitiationSecret { counter, incarnation, session };
            prop_assert_eq!(InitiationSecret::parse(&secret.emit()), Some(secret));
            let secret = ResponseSecret { incarnation, session, chosen };
            prop_assert_eq!(ResponseSecret::parse(&secret.emit()), secret);
        }

        #[test]
        fn any_bytes_end_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Initiation::parse(&bytes).is_err() || bytes.len() == INITIATION);
            prop_assert!(Response::parse(&bytes).is_err() || bytes.len() == RESPONSE);
        }
    }
}
