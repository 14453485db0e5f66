//! The two packets of a handshake (Noise IK) and what their sealed parts say.
//!
//! ```text
//! initiation   header, session 0 │ version u16 │ zero u16 │ offered u32 │ Noise message 1
//!   sealed     counter u64 │ incarnation u64 │ session u32 │ zero u32
//! response     header, the initiator's session │ Noise message 2
//!   sealed     incarnation u64 │ session u32 │ chosen u32
//! resumption   as an initiation, of kind RESUMPTION
//!   sealed     counter u64 │ incarnation u64 │ session u32 │ zero u32 │ epoch u64 │ life u64 │ root u64
//! its response as any other
//!   sealed     incarnation u64 │ session u32 │ chosen u32 │ epoch u64 │ life u64
//! cookie       header, number = digest of the initiation │ cookie 16
//! ```
//!
//! An initiation or resumption that answers a cookie has the cookie behind it, outside
//! of the Noise message: it proves an address, nothing else.
//!
//! ```text
//! version 1    offered bits are taken where both ends have them; unknown ones are not chosen
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
/// Feature bit: packets in clear. Only where the owners of both ends want it.
pub const FEATURE_PLAIN: u32 = 2;
/// Feature bit: the frames MARKED, GRANT, SLOTS, RELEASE, CHALLENGE, PROOF and SEEN.
pub const FEATURE_LANES: u32 = 4;
/// Feature bit: resumptions and MOVED.
pub const FEATURE_MOVE: u32 = 8;
/// Only in responses to a resumption: the session of before goes on.
pub const FEATURE_RESUMED: u32 = 16;
/// Only in responses: the session has moved on in a later epoch, and this end of it is
/// no more.
pub const FEATURE_SUPERSEDED: u32 = 32;
/// Feature bit: the frame BULK, padding, and packets over sockets for bulk.
pub const FEATURE_BULK: u32 = 64;
/// Feature bit: the frames WHERE and THERE.
pub const FEATURE_FIND: u32 = 128;
/// Bytes of a cookie.
pub const COOKIE: usize = 16;
/// Bytes of a COOKIE packet.
pub const COOKIE_PACKET: usize = HEADER + COOKIE;
/// Sealed bytes of a resumption, without tag.
pub const RESUMPTION_SECRET: usize = INITIATION_SECRET + 24;
/// Noise IK message 1 of a resumption.
pub const NOISE_1_RESUMPTION: usize = 32 + 32 + TAG + RESUMPTION_SECRET + TAG;
/// Sealed bytes of the response to a resumption, without tag.
pub const RESUMED_SECRET: usize = RESPONSE_SECRET + 16;
/// Bytes of the response to a resumption.
pub const RESUMED: usize = RESPONSE + 16;
/// Bytes of a resumption packet without cookie.
pub const RESUMPTION: usize = INITIATION_CLEAR + NOISE_1_RESUMPTION;
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

/// An initiation or resumption, as far as it can be read without keys.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Initiation<'a> {
    /// Whether it is a resumption.
    pub resumes: bool,
    /// What the initiator can do.
    pub offered: u32,
    /// All bytes in clear, for the prologue.
    pub clear: &'a [u8; INITIATION_CLEAR],
    /// Noise message 1: [`NOISE_1`] or [`NOISE_1_RESUMPTION`] bytes.
    pub noise: &'a [u8],
    /// The cookie behind it.
    pub cookie: Option<&'a [u8; COOKIE]>,
}

impl<'a> Initiation<'a> {
    /// Reads an initiation or resumption packet.
    ///
    /// # Errors
    ///
    /// See [`HandshakeLayoutError`].
    pub fn parse(packet: &'a [u8]) -> Result<Self, HandshakeLayoutError> {
        let wrong = HandshakeLayoutError::Length(packet.len());
        let (clear, rest) = packet.split_first_chunk::<INITIATION_CLEAR>().ok_or(wrong)?;
        let (found, fields) = clear.split_first_chunk::<HEADER>().ok_or(wrong)?;
        let resumes = match found {
            bytes if *bytes == first_header(PacketKind::Initiation) => false,
            bytes if *bytes == first_header(PacketKind::Resumption) => true,
            _ => return Err(HandshakeLayoutError::Header),
        };
        let [v0, v1, z0, z1, o0, o1, o2, o3] = *fields.first_chunk::<8>().ok_or(wrong)?;
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(HandshakeLayoutError::Version(version));
        }
        if [z0, z1] != [0, 0] {
            return Err(HandshakeLayoutError::Header);
        }
        let length = if resumes { NOISE_1_RESUMPTION } else { NOISE_1 };
        let (noise, behind) = rest.split_at_checked(length).ok_or(wrong)?;
        let cookie = match behind {
            [] => None,
            cookie => Some(cookie.try_into().map_err(|_| wrong)?),
        };
        let offered = u32::from_le_bytes([o0, o1, o2, o3]);
        Ok(Self { resumes, offered, clear, noise, cookie })
    }

    /// The clear bytes of an initiation that offers `offered`.
    #[must_use]
    pub fn emit_clear(offered: u32) -> [u8; INITIATION_CLEAR] {
        emit_clear(PacketKind::Initiation, offered)
    }

    /// The clear bytes of a resumption that offers `offered`.
    #[must_use]
    pub fn emit_clear_resumption(offered: u32) -> [u8; INITIATION_CLEAR] {
        emit_clear(PacketKind::Resumption, offered)
    }
}

fn first_header(kind: PacketKind) -> [u8; HEADER] {
    Header { kind, flags: 0, session: 0, number: 0 }.emit()
}

fn emit_clear(kind: PacketKind, offered: u32) -> [u8; INITIATION_CLEAR] {
    let mut clear = [0; INITIATION_CLEAR];
    let (front, rest) = clear.split_at_mut(HEADER);
    front.copy_from_slice(&first_header(kind));
    let (version, features) = rest.split_at_mut(4);
    version[..2].copy_from_slice(&VERSION.to_le_bytes());
    features.copy_from_slice(&offered.to_le_bytes());
    clear
}

/// A COOKIE packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CookiePacket {
    /// The first bytes of the SHA-256 digest of the initiation that it answers, without
    /// a cookie: who has not seen that one cannot make this.
    pub digest: u64,
    /// What to put behind the next one.
    pub cookie: [u8; COOKIE],
}

impl CookiePacket {
    /// Reads a COOKIE packet; `None` if it is none.
    #[must_use]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let packet: &[u8; COOKIE_PACKET] = packet.try_into().ok()?;
        let header = Header::parse(packet).ok()?;
        let good = header.kind == PacketKind::Cookie && header.flags == 0 && header.session == 0;
        let cookie = *packet.last_chunk()?;
        good.then_some(Self { digest: header.number, cookie })
    }

    /// The packet.
    #[must_use]
    pub fn emit(&self) -> [u8; COOKIE_PACKET] {
        let kind = PacketKind::Cookie;
        let header = Header { kind, flags: 0, session: 0, number: self.digest };
        let mut packet = [0; COOKIE_PACKET];
        let (front, cookie) = packet.split_at_mut(HEADER);
        front.copy_from_slice(&header.emit());
        cookie.copy_from_slice(&self.cookie);
        packet
    }
}

/// A response, as far as it can be read without keys.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Response<'a> {
    /// The initiator's session index.
    pub session: u32,
    /// Noise message 2: [`NOISE_2`] bytes, or 16 more in answer to a resumption.
    pub noise: &'a [u8],
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
        let noise = packet.get(HEADER..).filter(|_| [RESPONSE, RESUMED].contains(&packet.len()));
        let noise = noise.ok_or(wrong)?;
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

/// What an initiator says under seal when its session was moved.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ResumptionSecret {
    /// As in every initiation.
    pub common: InitiationSecret,
    /// How often the session has moved; grows with every thaw.
    pub epoch: u64,
    /// Chosen by chance at each thaw: two thaws of one image differ in it.
    pub life: u64,
    /// Names the secret that both ends share since before the move.
    pub root: u64,
}

impl ResumptionSecret {
    /// Reads the opened payload; `None` if reserved bits are set.
    #[must_use]
    pub fn parse(bytes: &[u8; RESUMPTION_SECRET]) -> Option<Self> {
        let (common, rest) = bytes.split_first_chunk()?;
        let (epoch, rest) = rest.split_first_chunk()?;
        let (life, rest) = rest.split_first_chunk()?;
        Some(Self {
            common: InitiationSecret::parse(common)?,
            epoch: u64::from_le_bytes(*epoch),
            life: u64::from_le_bytes(*life),
            root: u64::from_le_bytes(*rest.first_chunk()?),
        })
    }

    /// The payload to seal.
    #[must_use]
    pub fn emit(&self) -> [u8; RESUMPTION_SECRET] {
        let mut bytes = [0; RESUMPTION_SECRET];
        let (common, rest) = bytes.split_at_mut(INITIATION_SECRET);
        common.copy_from_slice(&self.common.emit());
        rest[..8].copy_from_slice(&self.epoch.to_le_bytes());
        rest[8..16].copy_from_slice(&self.life.to_le_bytes());
        rest[16..].copy_from_slice(&self.root.to_le_bytes());
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
        let long = [&good[..], &[5; 16]].concat();
        assert_eq!((Response::parse(&long).is_ok(), long.len()), (true, RESUMED));
        assert!(Response::parse(&long[..RESUMED - 1]).is_err());
        good[8] = 1;
        assert_eq!(Response::parse(&good), Err(HandshakeLayoutError::Header));
    }

    #[test]
    fn resumptions_and_cookies_are_read_back() {
        let mut packet = Initiation::emit_clear_resumption(8).to_vec();
        packet.extend([7; NOISE_1_RESUMPTION]);
        assert_eq!(packet.len(), RESUMPTION);
        assert_eq!(packet[..HEADER][0], 6);
        let read = Initiation::parse(&packet).expect("good");
        assert!(read.resumes && read.cookie.is_none() && read.offered == 8);
        packet.extend([5; COOKIE]);
        assert_eq!(Initiation::parse(&packet).expect("good").cookie, Some(&[5; COOKIE]));
        for length in 0..packet.len() {
            let whole = length == RESUMPTION;
            assert_eq!(Initiation::parse(&packet[..length]).is_ok(), whole, "{length}");
        }
        let cookie = CookiePacket { digest: 0x0807_0605_0403_0201, cookie: [9; COOKIE] };
        let bytes = cookie.emit();
        assert_eq!(bytes[..HEADER], [4, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(CookiePacket::parse(&bytes), Some(cookie));
        assert_eq!(CookiePacket::parse(&bytes[1..]), None);
        assert_eq!(CookiePacket::parse(&packet), None);
    }

    /// Pins the layouts: two builds that disagree here cannot talk.
    #[test]
    fn golden_vectors_of_secrets() {
        let common = InitiationSecret { counter: 0x0102, incarnation: 0x0304, session: 0x0506 };
        let bytes = [2, 1, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0, 6, 5, 0, 0, 0, 0, 0, 0];
        assert_eq!(common.emit(), bytes);
        let moved = ResumptionSecret { common, epoch: 7, life: 8, root: 9 };
        let rest = [7u64, 8, 9].map(u64::to_le_bytes).concat();
        assert_eq!(moved.emit()[..], [&bytes[..], &rest].concat());
        let answer = ResponseSecret { incarnation: 0x0304, session: 0x0506, chosen: 0x0708 };
        assert_eq!(answer.emit(), [4, 3, 0, 0, 0, 0, 0, 0, 6, 5, 0, 0, 8, 7, 0, 0]);
        let clear = Initiation::emit_clear(0x0102);
        assert_eq!(clear[HEADER..], [1, 0, 0, 0, 2, 1, 0, 0]);
    }

    /// Pins what is in clear of each packet, its length, and the feature bits.
    #[test]
    fn golden_vectors_of_packets() {
        let features = [
            FEATURE_AES,
            FEATURE_PLAIN,
            FEATURE_LANES,
            FEATURE_MOVE,
            FEATURE_RESUMED,
            FEATURE_SUPERSEDED,
            FEATURE_BULK,
            FEATURE_FIND,
        ];
        assert_eq!(features, [1, 2, 4, 8, 16, 32, 64, 128]);
        let offers = |kind: u8| {
            let mut bytes = [0; INITIATION_CLEAR];
            (bytes[0], bytes[16]) = (kind, 1);
            bytes[20..].copy_from_slice(&[1, 2, 3, 4]);
            bytes
        };
        assert_eq!(Initiation::emit_clear(0x0403_0201), offers(1));
        assert_eq!(Initiation::emit_clear_resumption(0x0403_0201), offers(6));
        let answers = [2, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(Response::emit_clear(0x0403_0201), answers);
        let cookie = core::array::from_fn(|n| u8::try_from(n).expect("below 16"));
        let packet = CookiePacket { digest: 0x0807_0605_0403_0201, cookie };
        let bytes = [[4, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8], cookie].concat();
        assert_eq!(packet.emit()[..], bytes);
        assert_eq!(CookiePacket::parse(&bytes), Some(packet));
        let lengths = [INITIATION, RESUMPTION, RESPONSE, RESUMED, COOKIE_PACKET];
        assert_eq!(lengths, [144, 168, 80, 96, 32]);
    }

    proptest! {
        #[test]
        fn secrets_round_trip(
            counter: u64,
            incarnation: u64,
            session: u32,
            chosen: u32,
            epoch: u64,
            life: u64,
            root: u64,
        ) {
            let secret = InitiationSecret { counter, incarnation, session };
            prop_assert_eq!(InitiationSecret::parse(&secret.emit()), Some(secret));
            let moved = ResumptionSecret { common: secret, epoch, life, root };
            prop_assert_eq!(ResumptionSecret::parse(&moved.emit()), Some(moved));
            let secret = ResponseSecret { incarnation, session, chosen };
            prop_assert_eq!(ResponseSecret::parse(&secret.emit()), secret);
        }

        #[test]
        fn any_bytes_end_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let initiation = Initiation::parse(&bytes);
            prop_assert!(initiation.is_err() || bytes.len() >= INITIATION);
            let cookie = CookiePacket::parse(&bytes);
            prop_assert!(cookie.is_none_or(|cookie| cookie.emit()[..] == bytes[..]));
            prop_assert!(Response::parse(&bytes).is_err() || [RESPONSE, RESUMED].contains(&bytes.len()));
        }
    }
}
