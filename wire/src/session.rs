//! Layouts of a session: the packet header, the record prefix of byte streams,
//! and (in [`frame`]) what a packet carries once it is opened.
//!
//! Not here: keys, replay windows, sequence logic. Those are `conet-transport`.
//!
//! ```text
//! packet   ┌────────┬─────────────────────┬────────┐
//!          │ header │ frames, encrypted   │ tag 16 │   over a stream: u32 length in front
//!          └────────┴─────────────────────┴────────┘
//! header    0    1     2        4               8                        16
//!          │kind│flags│ zero u16│ session u32   │ number u64             │  little-endian
//! ```
//!
//! The header travels in clear and is authenticated as associated data. A
//! *session index* is chosen by the receiver, so that it finds its state with one
//! slab access (WireGuard §5.4). The *number* is the AEAD nonce; a
//! retransmission takes a new one, so that an acknowledgement always means one
//! transmission (RFC 9002 §2).
//!
//! Invariants: parsing never panics, allocates nothing and looks at no byte
//! twice; whatever `emit` writes, `parse` reads back to the same value.

pub mod frame;
pub mod handshake;
pub mod moved;

/// Bytes of a packet header.
pub const HEADER: usize = 16;
/// Bytes of the AEAD tag behind the payload (RFC 5116 §5.1, RFC 8439 §2.8).
pub const TAG: usize = 16;
/// Bytes of the length in front of each packet on a byte stream.
pub const RECORD_PREFIX: usize = 4;
/// Most payload bytes that one record may move: 256 KiB, the size at which one
/// system call's cost has vanished beside the copy.
pub const MAX_RECORD_DATA: usize = 256 * 1024;
/// Room in a record beside [`MAX_RECORD_DATA`]: frame headers and descriptions.
pub const MAX_RECORD_OVERHEAD: usize = 4096;
/// Longest packet on any carrier, header and tag included.
pub const MAX_PACKET: usize = HEADER + MAX_RECORD_DATA + MAX_RECORD_OVERHEAD + TAG;
/// Shortest packet: a header, an empty payload, a tag.
pub const MIN_PACKET: usize = HEADER + TAG;

/// Header flag of a data packet: its sender wants it acknowledged.
pub const FLAG_TRACKED: u8 = 1;
/// Header flag of a data packet with `FEATURE_BULK`: it was sent from and to the sockets
/// for bulk, so that where it came from says nothing of where its sender is.
pub const FLAG_BULK: u8 = 2;

/// What a packet is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PacketKind {
    /// First message of a handshake; its session index is zero.
    Initiation,
    /// Second message of a handshake.
    Response,
    /// Frames under a session's keys.
    Data,
    /// Answer to an initiation in a time of many: say it again, with this.
    Cookie,
    /// Answer of a node from which a session has gone: where it is now.
    Moved,
    /// First message of the handshake of a session that was moved; its session index
    /// is zero.
    Resumption,
}

impl PacketKind {
    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Initiation),
            2 => Some(Self::Response),
            3 => Some(Self::Data),
            4 => Some(Self::Cookie),
            5 => Some(Self::Moved),
            6 => Some(Self::Resumption),
            _ => None,
        }
    }

    const fn to_byte(self) -> u8 {
        match self {
            Self::Initiation => 1,
            Self::Response => 2,
            Self::Data => 3,
            Self::Cookie => 4,
            Self::Moved => 5,
            Self::Resumption => 6,
        }
    }
}

/// The 16 bytes in clear at the front of every packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header {
    /// What follows.
    pub kind: PacketKind,
    /// Free to the layer above; authenticated, not interpreted here.
    pub flags: u8,
    /// Index that the receiver chose for the session.
    pub session: u32,
    /// Packet number, which is the nonce.
    pub number: u64,
}

impl Header {
    /// Reads a header from the front of `packet`.
    ///
    /// # Errors
    ///
    /// The peer's fault in every case: too short, an unknown kind, or a bit set
    /// that must be zero.
    #[inline]
    pub fn parse(packet: &[u8]) -> Result<Self, HeaderError> {
        let Some(bytes) = packet.first_chunk::<HEADER>() else {
            return Err(HeaderError::Truncated);
        };
        let [kind, flags, r0, r1, s0, s1, s2, s3, number @ ..] = *bytes;
        let kind = PacketKind::from_byte(kind).ok_or(HeaderError::UnknownKind(kind))?;
        if [r0, r1] != [0, 0] {
            return Err(HeaderError::ReservedBits);
        }
        Ok(Self {
            kind,
            flags,
            session: u32::from_le_bytes([s0, s1, s2, s3]),
            number: u64::from_le_bytes(number),
        })
    }

    /// The header's bytes.
    #[must_use]
    #[inline]
    pub fn emit(&self) -> [u8; HEADER] {
        let [s0, s1, s2, s3] = self.session.to_le_bytes();
        let [n0, n1, n2, n3, n4, n5, n6, n7] = self.number.to_le_bytes();
        let kind = self.kind.to_byte();
        [kind, self.flags, 0, 0, s0, s1, s2, s3, n0, n1, n2, n3, n4, n5, n6, n7]
    }
}

/// Why bytes are no packet header; the peer's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HeaderError {
    /// Fewer than [`HEADER`] bytes.
    #[error("packet is shorter than its header")]
    Truncated,
    /// A kind that this version does not know.
    #[error("unknown packet kind {0}")]
    UnknownKind(u8),
    /// Reserved bits are not zero.
    #[error("reserved header bits are set")]
    ReservedBits,
}

/// Reads the length in front of a record and says how long the packet is.
///
/// # Errors
///
/// The peer's fault: a length that no packet can have. Nothing must be
/// allocated before this has answered.
pub const fn parse_record_prefix(prefix: [u8; RECORD_PREFIX]) -> Result<usize, RecordLengthError> {
    let length = u32::from_le_bytes(prefix);
    // u32 to usize: lossless, as every target of this project has 64-bit pointers
    // and the range check below holds on 32-bit ones too.
    let bytes = length as usize;
    if bytes < MIN_PACKET || bytes > MAX_PACKET {
        return Err(RecordLengthError { length });
    }
    Ok(bytes)
}

/// The prefix of a record that holds a packet of `length` bytes, or `None` if no
/// packet may be so long or so short.
#[must_use]
pub fn emit_record_prefix(length: usize) -> Option<[u8; RECORD_PREFIX]> {
    if !(MIN_PACKET..=MAX_PACKET).contains(&length) {
        return None;
    }
    u32::try_from(length).ok().map(u32::to_le_bytes)
}

/// A record length outside [`MIN_PACKET`]`..=`[`MAX_PACKET`]; the peer's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("record of {length} bytes is outside {MIN_PACKET}..={MAX_PACKET}")]
pub struct RecordLengthError {
    /// What the prefix said, in bytes.
    pub length: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn header_golden_vector() {
        let header = Header {
            kind: PacketKind::Data,
            flags: 0x80,
            session: 0x0403_0201,
            number: 0x0c0b_0a09_0807_0605,
        };
        let bytes = [3, 0x80, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        assert_eq!(header.emit(), bytes);
        assert_eq!(Header::parse(&bytes), Ok(header));
    }

    /// Pins the kinds and flags of packets.
    #[test]
    fn golden_vectors_of_kinds() {
        let kinds = [
            PacketKind::Initiation,
            PacketKind::Response,
            PacketKind::Data,
            PacketKind::Cookie,
            PacketKind::Moved,
            PacketKind::Resumption,
        ];
        for (byte, kind) in (1..).zip(kinds) {
            let header = Header { kind, flags: 0, session: 0, number: 0 };
            assert_eq!(header.emit()[0], byte);
        }
        assert_eq!((FLAG_TRACKED, FLAG_BULK, HEADER, TAG), (1, 2, 16, 16));
        assert_eq!(emit_record_prefix(0x0201), Some([1, 2, 0, 0]));
    }

    #[test]
    fn header_refuses_what_it_does_not_know() {
        let mut bytes = [0u8; HEADER];
        assert_eq!(Header::parse(&bytes), Err(HeaderError::UnknownKind(0)));
        bytes[0] = 3;
        assert_eq!(Header::parse(&bytes[..15]), Err(HeaderError::Truncated));
        bytes[2] = 1;
        assert_eq!(Header::parse(&bytes), Err(HeaderError::ReservedBits));
    }

    #[test]
    fn record_lengths_at_the_edges() {
        for (length, good) in [
            (0, false),
            (MIN_PACKET - 1, false),
            (MIN_PACKET, true),
            (MAX_PACKET, true),
            (MAX_PACKET + 1, false),
            (usize::MAX, false),
        ] {
            let prefix = emit_record_prefix(length);
            assert_eq!(prefix.is_some(), good, "{length}");
            if let Some(prefix) = prefix {
                assert_eq!(parse_record_prefix(prefix), Ok(length));
            }
        }
        assert!(parse_record_prefix([0xff; 4]).is_err());
        assert!(parse_record_prefix([0; 4]).is_err());
    }

    proptest! {
        #[test]
        fn header_round_trip(kind in 1u8..=6, flags: u8, session: u32, number: u64) {
            let kind = PacketKind::from_byte(kind).expect("known");
            let header = Header { kind, flags, session, number };
            prop_assert_eq!(Header::parse(&header.emit()), Ok(header));
        }

        #[test]
        fn header_parse_then_emit_is_identity(bytes: [u8; HEADER]) {
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert_eq!(header.emit(), bytes);
            }
        }
    }
}
