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
//! CHUNK   5     slot head, tag = direction, lane in bits 8–9 │ offset u32 │ zero u32 │ data
//! ACK     6     largest u64 │ delay_us u32 │ zero u32 │ bitmap 4 × u64
//! PING    7     token u64
//! PONG    8     token u64
//! CLOSE   9     reason u32 │ zero u32
//!
//! with FEATURE_LANES
//! MARKED  10    slot head, tag = marks │ after slot u16 │ zero u16 │ zero u32 │ after sequence u64 │ data
//! GRANT   11    slot head, tag = direction, total = bytes that may be sent
//! SLOTS   12    version u32 │ count u32
//! RELEASE 13    version u32 │ count u32 │ floor u64
//! CHALLENGE 14  token u64
//! PROOF   15    token u64
//! SEEN    16    largest u64 │ delay_us u32 │ marked u32 │ bitmap 16 × u64
//!
//! with FEATURE_BULK
//! BULK    17    port u16 │ zero u16 │ buffer u32
//! PADDING 18    anything                                    may be skipped, as BULK
//!
//! with FEATURE_FIND, may be skipped
//! WHERE   19    public key 32
//! THERE   20    public key 32 │ family u16 │ port u16 │ zero u32 │ address 16
//!
//! marks         bits 0–1 lane │ bit 8 after another call │ bit 9 also if that one stopped
//! ```
//!
//! `total` is the length of the whole payload; a payload that does not fit one
//! packet continues in CHUNKs. Flag bit 0, [`MUST_KNOW`], says "refuse if you do
//! not know this frame": unknown frames without it are skipped, so that a newer
//! peer may add hints. All other flag bits are zero.
//!
//! A MARKED call is a CALL with a lane, or one that takes another call's result as an
//! argument. GRANT lets the rest of a large payload come; SLOTS and RELEASE let the
//! number of slots grow and shrink; CHALLENGE and PROOF show that a peer is where its
//! packets come from. SEEN is an ACK that tells of more packets, and how many came with
//! a congestion mark (RFC 3168 §6.1.3). BULK says where large payloads are taken: at a
//! port beside the one that everything else goes to, and how much its socket holds. PADDING
//! makes a packet as long as a path is to be tried with (RFC 8899 §4.4). WHERE asks for the
//! address of a third node, THERE gives it, as MOVED does.
//!
//! Not here: PAGE. Process images travel as opaque records.
//!
//! Invariants: as for the packet header. A [`Frames`] iterator ends after its first
//! error, so no byte behind a damaged frame is believed.

use core::net::SocketAddr;

mod emit;
mod parse;

pub use emit::NoRoom;
pub use parse::{FrameError, Frames, Message, Says};

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
pub(crate) const MARKED: u8 = 10;
pub(crate) const GRANT: u8 = 11;
pub(crate) const SLOTS: u8 = 12;
pub(crate) const RELEASE: u8 = 13;
pub(crate) const CHALLENGE: u8 = 14;
pub(crate) const PROOF: u8 = 15;
pub(crate) const SEEN: u8 = 16;
pub(crate) const BULK: u8 = 17;
pub(crate) const PADDING: u8 = 18;
pub(crate) const WHERE: u8 = 19;
pub(crate) const THERE: u8 = 20;

/// Bytes of a public key.
pub const KEY: usize = 32;

/// Words of a SEEN's bitmap.
pub const SEEN_WORDS: usize = 16;
/// Bytes of it.
pub const SEEN_BYTES: usize = 8 * SEEN_WORDS;
/// Fixed bytes of a MARKED in front of its data, frame header included.
pub const MARKED_OVERHEAD: usize = CALL_OVERHEAD + 16;

const AFTER: u16 = 1 << 8;
const AFTER_ANYHOW: u16 = 1 << 9;

/// How urgent a call and its reply are; smaller is more.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Lane {
    /// Keeping the nodes together.
    Control,
    /// Somebody waits for a microsecond.
    #[default]
    Calls,
    /// A page that a program waits for.
    Pages,
    /// Nobody waits for any one of these.
    Bulk,
}

impl Lane {
    /// All of them, the most urgent first.
    pub const ALL: [Self; 4] = [Self::Control, Self::Calls, Self::Pages, Self::Bulk];

    /// Two bits. A call without a mark is of [`Lane::Calls`].
    pub(crate) const fn from_wire(value: u16) -> Self {
        match value & 3 {
            0 => Self::Calls,
            1 => Self::Control,
            2 => Self::Pages,
            _ => Self::Bulk,
        }
    }

    pub(crate) const fn to_wire(self) -> u16 {
        match self {
            Self::Calls => 0,
            Self::Control => 1,
            Self::Pages => 2,
            Self::Bulk => 3,
        }
    }
}

/// The call whose result is an argument of this one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct After {
    /// Its slot.
    pub slot: u16,
    /// Its sequence in that slot.
    pub sequence: u64,
    /// Run this one also if that one stopped the row.
    pub anyhow: bool,
}

/// What a MARKED call says beside what a CALL says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Marks {
    /// How urgent it and its reply are.
    pub lane: Lane,
    /// The call it waits for.
    pub after: Option<After>,
}

impl Marks {
    pub(crate) fn from_wire(tag: u16, slot: u16, sequence: u64) -> Option<Self> {
        if tag & !(3 | AFTER | AFTER_ANYHOW) != 0 {
            return None;
        }
        let anyhow = tag & AFTER_ANYHOW != 0;
        let after = (tag & AFTER != 0).then_some(After { slot, sequence, anyhow });
        if after.is_none() && (anyhow || slot != 0 || sequence != 0) {
            return None;
        }
        Some(Self { lane: Lane::from_wire(tag), after })
    }

    pub(crate) fn to_wire(self) -> (u16, u16, u64) {
        let lane = self.lane.to_wire();
        match self.after {
            None => (lane, 0, 0),
            Some(After { slot, sequence, anyhow }) => {
                (lane | AFTER | if anyhow { AFTER_ANYHOW } else { 0 }, slot, sequence)
            }
        }
    }
}

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
    /// It ran, the payload is its result, and calls that wait for it to go well do not
    /// run.
    Stopped,
    /// It never ran: the call it waited for stopped the row, or never ran.
    Aborted,
    /// It was begun, and who ran it is gone: whether it ran is not known.
    Lost,
}

impl Status {
    pub(crate) const fn from_wire(value: u16) -> Option<Self> {
        match value {
            0 => Some(Self::Done),
            1 => Some(Self::Cancelled),
            2 => Some(Self::Refused),
            3 => Some(Self::Stopped),
            4 => Some(Self::Aborted),
            5 => Some(Self::Lost),
            _ => None,
        }
    }

    pub(crate) const fn to_wire(self) -> u16 {
        match self {
            Self::Done => 0,
            Self::Cancelled => 1,
            Self::Refused => 2,
            Self::Stopped => 3,
            Self::Aborted => 4,
            Self::Lost => 5,
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

/// As [`Ack`], but wider, and with congestion marks.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Seen {
    /// Largest packet number received.
    pub largest: u64,
    /// Time between its arrival and this frame, µs.
    pub delay_us: u32,
    /// Tracked packets that came with a congestion mark, ever; wraps.
    pub marked: u32,
    /// Bit `i` of the whole is set if packet `largest − 1 − i` has arrived.
    pub bitmap: [u64; SEEN_WORDS],
}

impl Seen {
    /// Whether this frame says that packet `number` has arrived.
    #[must_use]
    pub fn covers(&self, number: u64) -> bool {
        let Some(below) = self.largest.checked_sub(number) else { return false };
        let Some(bit) = below.checked_sub(1) else { return true };
        let word = usize::try_from(bit / 64).ok().and_then(|at| self.bitmap.get(at));
        word.is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }

    /// As much of it as an ACK holds.
    #[must_use]
    pub const fn narrow(&self) -> Ack {
        let [a, b, c, d, ..] = self.bitmap;
        Ack { largest: self.largest, delay_us: self.delay_us, bitmap: [a, b, c, d] }
    }
}

/// [`Seen`] as it lies in a packet: a frame is handed around, and this one's bitmap is twice as
/// long as any other's everything.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SeenFrame<'a> {
    /// As [`Seen::largest`].
    pub largest: u64,
    /// As [`Seen::delay_us`].
    pub delay_us: u32,
    /// As [`Seen::marked`].
    pub marked: u32,
    /// [`Seen::bitmap`], each word little-endian.
    pub bitmap: &'a [u8; SEEN_BYTES],
}

impl SeenFrame<'_> {
    /// What it says.
    #[must_use]
    pub fn to_seen(&self) -> Seen {
        let Self { largest, delay_us, marked, .. } = *self;
        let (words, _) = self.bitmap.as_chunks::<8>();
        let mut bitmap = [0; SEEN_WORDS];
        for (to, from) in bitmap.iter_mut().zip(words) {
            *to = u64::from_le_bytes(*from);
        }
        Seen { largest, delay_us, marked, bitmap }
    }
}

impl Seen {
    /// The bitmap as a frame has it.
    #[must_use]
    pub fn bitmap_bytes(&self) -> [u8; SEEN_BYTES] {
        let mut bytes = [0; SEEN_BYTES];
        let (words, _) = bytes.as_chunks_mut::<8>();
        for (to, from) in words.iter_mut().zip(self.bitmap) {
            *to = from.to_le_bytes();
        }
        bytes
    }

    /// The frame, whose bitmap are [`bitmap_bytes`](Self::bitmap_bytes).
    #[must_use]
    pub const fn frame<'a>(&self, bitmap: &'a [u8; SEEN_BYTES]) -> Frame<'a> {
        let Self { largest, delay_us, marked, .. } = *self;
        Frame::Seen(SeenFrame { largest, delay_us, marked, bitmap })
    }
}

impl From<Ack> for Seen {
    fn from(ack: Ack) -> Self {
        let mut bitmap = [0; SEEN_WORDS];
        bitmap[..4].copy_from_slice(&ack.bitmap);
        Self { largest: ack.largest, delay_us: ack.delay_us, marked: 0, bitmap }
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
        /// How urgent the call is.
        lane: Lane,
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
    /// Run this, as the marks say.
    Marked {
        /// Which call.
        head: SlotHead,
        /// Lane, and the call it waits for.
        marks: Marks,
        /// The whole payload; empty, where the call comes in CHUNKs.
        data: &'a [u8],
    },
    /// More of a payload may come.
    Grant {
        /// The client's slot.
        slot: u16,
        /// The call in it.
        sequence: u64,
        /// Call or reply.
        direction: Direction,
        /// The payload's bytes below this offset may be sent.
        upto: u32,
    },
    /// The client may use so many slots.
    Slots {
        /// Grows with every SLOTS of a session.
        version: u32,
        /// Slots below this may be used.
        count: u32,
    },
    /// The client uses no slot from `count` on, and all calls in them have ended.
    Release {
        /// The SLOTS that this obeys.
        version: u32,
        /// As in that SLOTS.
        count: u32,
        /// No call in a released slot had a higher sequence.
        floor: u64,
    },
    /// Large payloads are taken at another port of the same address.
    Bulk {
        /// The port.
        port: u16,
        /// Bytes that may be on their way there.
        buffer: u32,
    },
    /// Makes the packet longer. Skipped when read.
    Padding {
        /// Bytes behind the frame's header.
        length: u32,
    },
    /// Show that you are where I send this.
    Challenge {
        /// Unpredictable.
        token: u64,
    },
    /// I am.
    Proof {
        /// The CHALLENGE's token.
        token: u64,
    },
    /// What has arrived.
    Seen(SeenFrame<'a>),
    /// At which address is this node?
    Where {
        /// Its public key.
        key: &'a [u8; KEY],
    },
    /// It is there, or was a moment ago.
    There {
        /// The WHERE's.
        key: &'a [u8; KEY],
        /// Its address and port, without an IPv6 scope.
        address: SocketAddr,
    },
}

#[cfg(test)]
mod tests;
