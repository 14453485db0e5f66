//! Frames: what an opened packet carries, several in a row.
//!
//! ```text
//! every frame   type u8 │ flags u8 │ zero u16 │ length u32 │ body (length bytes)
//! slot head     slot u16 │ tag u16 │ total u32 │ sequence u64        (16 bytes)
//!
//! CALL    1     slot head, tag 0                            data from offset 0
//! REPLY   2     slot head, tag = status                     data from offset 0
//! WORKING 3     slot head, tag 0, total 0
//! CANCEL  4     slot head, tag 0, total 0
//! CHUNK   5     slot head, tag = direction │ offset u32 │ zero u32 │ data
//! ACK     6     largest u64 │ delay_us u32 │ zero u32 │ bitmap 4 × u64
//! PING    7     token u64
//! PONG    8     token u64
//! CLOSE   9     reason u32 │ zero u32
//! ```
//!
//! `total` is the length of the whole payload; a payload that does not fit one
//! packet continues in CHUNKs. Flag bit 0, [`MUST_KNOW`], says "refuse if you do
//! not know this frame": unknown frames without it are skipped, so that a newer
//! peer may add hints. All other flag bits are zero.
//!
//! Not here: PAGE and GRANT. Process images travel as opaque records, and
//! nothing grants memory yet.
//!
//! Invariants: as for the packet header. A [`Frames`] iterator ends after its first
//! error, so no byte behind a damaged frame is believed.

mod emit;
mod parse;

pub use emit::NoRoom;
pub use parse::{FrameError, Frames};

/// Bytes of type, flags and length in front of every frame.
pub const FRAME_HEADER: usize = 8;
/// Bytes of a slot head.
pub const SLOT_HEAD: usize = 16;
/// Fixed bytes of a CALL or REPLY in front of its data, frame header included.
pub const CALL_OVERHEAD: usize = FRAME_HEADER + SLOT_HEAD;
/// Fixed bytes of a CHUNK in front of its data, frame header included.
pub const CHUNK_OVERHEAD: usize = FRAME_HEADER + SLOT_HEAD + 8;
/// Packets that one ACK tells about below its largest.
pub const ACK_BITS: u32 = 256;
/// Flag: a receiver that does not know the frame's type must refuse the packet.
pub const MUST_KNOW: u8 = 1;

pub(crate) const CALL: u8 = 1;
pub(crate) const REPLY: u8 = 2;
pub(crate) const WORKING: u8 = 3;
pub(crate) const CANCEL: u8 = 4;
pub(crate) const CHUNK: u8 = 5;
pub(crate) const ACK: u8 = 6;
pub(crate) const PING: u8 = 7;
pub(crate) const PONG: u8 = 8;
pub(crate) const CLOSE: u8 = 9;

/// Which call a frame is about, and how long its payload is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SlotHead {
    /// The client's slot.
    pub slot: u16,
    /// Sequence number of the call within its slot.
    pub sequence: u64,
    /// Bytes of the whole payload, however many frames it takes.
    pub total: u32,
}

/// How a call ended at the server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Status {
    /// It ran; the payload is its result.
    Done,
    /// It was cancelled before it ran, and never will.
    Cancelled,
    /// The server refused it without running it.
    Refused,
}

impl Status {
    pub(crate) const fn from_wire(value: u16) -> Option<Self> {
        match value {
            0 => Some(Self::Done),
            1 => Some(Self::Cancelled),
            2 => Some(Self::Refused),
            _ => None,
        }
    }

    pub(crate) const fn to_wire(self) -> u16 {
        match self {
            Self::Done => 0,
            Self::Cancelled => 1,
            Self::Refused => 2,
        }
    }
}

/// Which payload a CHUNK continues.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Direction {
    /// The client's call.
    Call,
    /// The server's reply.
    Reply,
}

impl Direction {
    pub(crate) const fn from_wire(value: u16) -> Option<Self> {
        match value {
            0 => Some(Self::Call),
            1 => Some(Self::Reply),
            _ => None,
        }
    }

    pub(crate) const fn to_wire(self) -> u16 {
        match self {
            Self::Call => 0,
            Self::Reply => 1,
        }
    }
}

/// Which tracked packets have arrived.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Ack {
    /// Largest packet number received.
    pub largest: u64,
    /// Time between its arrival and this frame, µs.
    pub delay_us: u32,
    /// Bit `i` of the whole is set if packet `largest − 1 − i` has arrived.
    pub bitmap: [u64; 4],
}

impl Ack {
    /// Whether this frame says that packet `number` has arrived.
    #[must_use]
    pub fn covers(&self, number: u64) -> bool {
        let Some(below) = self.largest.checked_sub(number) else { return false };
        match below {
            0 => true,
            1..=256 => {
                let bit = below - 1;
                let word = usize::try_from(bit / 64).unwrap_or(usize::MAX);
                self.bitmap.get(word).is_some_and(|word| word >> (bit % 64) & 1 == 1)
            }
            _ => false,
        }
    }
}

/// One frame; its data borrow from the packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Frame<'a> {
    /// Run this.
    Call {
        /// Which call.
        head: SlotHead,
        /// Payload from offset 0; shorter than `head.total` if CHUNKs follow.
        data: &'a [u8],
    },
    /// It has ended.
    Reply {
        /// Which call.
        head: SlotHead,
        /// How it ended.
        status: Status,
        /// Payload from offset 0; shorter than `head.total` if CHUNKs follow.
        data: &'a [u8],
    },
    /// It is running; ask again in a second.
    Working {
        /// The client's slot.
        slot: u16,
        /// The call in it.
        sequence: u64,
    },
    /// The client no longer wants it.
    Cancel {
        /// The client's slot.
        slot: u16,
        /// The call in it.
        sequence: u64,
    },
    /// A further piece of a payload.
    Chunk {
        /// Which call.
        head: SlotHead,
        /// Call or reply.
        direction: Direction,
        /// Where `data` begins in the payload, bytes.
        offset: u32,
        /// The piece.
        data: &'a [u8],
    },
    /// What has arrived.
    Ack(Ack),
    /// Are you there?
    Ping {
        /// Comes back in the PONG.
        token: u64,
    },
    /// Yes.
    Pong {
        /// The PING's token.
        token: u64,
    },
    /// The sender forgets this session now.
    Close {
        /// Why; see `conet-transport`.
        reason: u32,
    },
}

#[cfg(test)]
mod tests;
