//! The link between a remote process and its deputy: frames and call requests.
//!
//! One frame travels in one sealed record of the stream carrier
//! ([`crate::session`] describes the record). All integers are little-endian;
//! both ends are x86-64.
//!
//! ```text
//! frame   := FrameHeader body
//! Call    := Request Desc* data*          data: inputs in order, each padded to 8
//! Reply   := ReplyHead data*              data: outputs in order, each padded to 8
//! ```
//!
//! A request is generic: number, arguments and a list of buffers. What a call
//! means is known to the remote side alone; the deputy rebases pointers and runs
//! it. Peers are hostile until proven otherwise: [`parse_request`] checks every
//! length once, so that the deputy can rely on what it returns.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What a frame carries; the first field of [`FrameHeader`].
pub mod kind {
    /// Home → remote: first sealed record, proves possession of the link's keys.
    pub const HELLO: u32 = 1;
    /// An image's head ([`crate::image::Head`] and the vector state).
    pub const HEAD: u32 = 2;
    /// Memory areas of an image ([`crate::image::Area`]s). Frames of one list have
    /// one sequence; another sequence begins another list.
    pub const AREAS: u32 = 3;
    /// Pages of an image ([`crate::pages`]).
    pub const PAGES: u32 = 4;
    /// The image is complete ([`crate::image::End`]).
    pub const END: u32 = 5;
    /// Remote → home: everything is in place, waiting for [`COMMIT`].
    pub const PREPARED: u32 = 6;
    /// Remote → home: the image cannot be restored ([`super::Refusal`]).
    pub const REFUSED: u32 = 7;
    /// Home → remote: what are your clocks?
    pub const CLOCKS: u32 = 8;
    /// Remote → home: [`crate::image::Clocks`].
    pub const CLOCKS_ARE: u32 = 9;
    /// Home → remote: run ([`crate::image::Commit`]). From here the process
    /// lives at the remote node.
    pub const COMMIT: u32 = 10;
    /// Remote → home: the sandbox stands, send the image.
    pub const READY: u32 = 11;
    /// Pages that read as zero ([`crate::pages`]).
    pub const GONE: u32 = 12;
    /// Home → remote: a round of pre-copy is over. Remote → home: it is in place.
    pub const ROUND: u32 = 13;
    /// Remote → home: a slice of what the program has changed follows, while it runs on:
    /// [`AREAS`], [`PAGES`] and [`GONE`] up to [`END`], as in a delta. The body is the end
    /// of its data segment (brk(2)); END's sequence is 1 where this was the last slice of
    /// a round over all of its memory.
    pub const SLICE: u32 = 14;
    /// Remote → home: a system call to run.
    pub const CALL: u32 = 16;
    /// Home → remote: its result.
    pub const REPLY: u32 = 17;
    /// As [`REPLY`]; somebody wants to know how long calls take
    /// ([`super::Request::took`]).
    pub const REPLY_TIMED: u32 = 22;
    /// Home → remote: come home ([`super::ComeHome`]).
    pub const COME_HOME: u32 = 18;
    /// Remote → home: the program ended by `exit_group` ([`super::Exit`]).
    pub const EXIT: u32 = 19;
    /// Remote → home: become another program ([`crate::family::Exec`]).
    pub const EXEC: u32 = 20;
    /// Remote → home: bytes of its path, arguments and environment.
    pub const EXEC_DATA: u32 = 21;
    /// Remote → home: make a child ([`crate::family::Fork`]).
    pub const FORK: u32 = 22;
    /// Home → remote: the child's link lies with the warden
    /// ([`crate::family::Branch`]).
    pub const BRANCH: u32 = 23;
    /// Home → remote, on the child's link: it is there ([`crate::family::Born`]).
    pub const BORN: u32 = 24;
}

/// Largest data of one call in one direction, in bytes; longer transfers are
/// cut into chunks by the remote side.
pub const CHUNK: usize = 256 * 1024;

/// Most buffers that one call can have.
pub const MAX_DESCS: usize = 8;

/// Largest frame, header included, in bytes: a chunk with the request and some
/// small buffers beside it.
pub const MAX_FRAME: usize = CHUNK + 4096;

/// Head of every frame.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FrameHeader {
    /// One of [`kind`].
    pub kind: u32,
    /// Sequence of the call for [`kind::CALL`] and [`kind::REPLY`], else 0.
    pub seq: u32,
}

/// Head of a [`kind::CALL`] frame, after the [`FrameHeader`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Request {
    /// System call number of the x86-64 table.
    pub nr: u32,
    /// Number of [`Desc`]s that follow, at most [`MAX_DESCS`].
    pub descs: u32,
    /// Arguments as the program gave them; those that a [`Desc`] names are replaced.
    pub args: [u64; 6],
    /// How long the program waited for the call before, in nanoseconds; 0 where that
    /// was not wanted.
    pub took: u64,
}

/// Which way a buffer goes; bits of [`Desc::direction`].
pub mod direction {
    /// Its bytes travel with the request.
    pub const IN: u8 = 1;
    /// Its bytes travel with the reply.
    pub const OUT: u8 = 2;
    /// The address is used as it is, in the deputy's own memory (file mappings,
    /// calls that were pending when the process moved).
    pub const IN_PLACE: u8 = 4;
}

/// How many bytes of an output buffer travel back; [`Desc::mode`].
pub mod mode {
    /// All, if the call succeeded.
    pub const ON_SUCCESS: u8 = 0;
    /// `min(len, result × unit)`.
    pub const BY_RESULT: u8 = 1;
    /// All, whatever the result.
    pub const ALWAYS: u8 = 2;
}

/// [`Desc::place`] of a buffer that no argument points to.
pub const PLACE_NONE: u8 = 0xff;
/// Added to a buffer's index in [`Desc::place`]: the pointer is stored into that
/// buffer (at [`Desc::offset`]) instead of into an argument.
pub const PLACE_BUFFER: u8 = 0x40;

/// One buffer of a call.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Desc {
    /// The program's own address of the buffer; outputs are stored there when
    /// the call ends after the process came home.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Argument index 0–5, [`PLACE_BUFFER`] + index of an earlier buffer, or [`PLACE_NONE`].
    pub place: u8,
    /// Bits of [`direction`].
    pub direction: u8,
    /// One of [`mode`].
    pub mode: u8,
    /// Bytes that one unit of the result stands for, with [`mode::BY_RESULT`].
    pub unit: u8,
    /// Where in the buffer named by `place` the pointer is stored.
    pub offset: u32,
    /// Zero.
    pub reserved: u32,
}

/// Head of a [`kind::REPLY`] frame, after the [`FrameHeader`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ReplyHead {
    /// What the kernel returned: a value, or −errno.
    pub result: i64,
}

/// Body of [`kind::COME_HOME`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ComeHome {
    /// Sequence of the last call that ran to its end, whose reply was sent.
    pub done: u32,
    /// 1 if the call after `done` is pending in the home kernel and will be
    /// finished there; 0 if it has not run and must be issued again.
    pub pending: u32,
}

/// Body of [`kind::EXIT`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Exit {
    /// Argument of `exit_group(2)`.
    pub status: u64,
}

/// Body of [`kind::REFUSED`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Refusal {
    /// Which step failed; one of [`crate::image::step`].
    pub step: u32,
    /// The error number, positive.
    pub errno: u32,
    /// The address concerned, or 0.
    pub addr: u64,
}

/// Why a call request cannot be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// The frame ends before what it announces.
    Truncated,
    /// More buffers than [`MAX_DESCS`].
    TooManyBuffers,
    /// The buffers are together longer than a frame may be.
    TooLong,
    /// A buffer points at an argument or buffer that does not exist.
    BadPlace,
}

impl core::fmt::Display for RequestError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Truncated => "the call request ends too early",
            Self::TooManyBuffers => "the call request has too many buffers",
            Self::TooLong => "the call request's buffers are too long",
            Self::BadPlace => "a buffer of the call request has no place",
        })
    }
}

impl core::error::Error for RequestError {}

/// A checked call request: lengths and places hold, inputs are present.
#[derive(Clone, Copy, Debug)]
pub struct ParsedRequest {
    /// Number and arguments.
    pub request: Request,
    /// Buffers; the first `request.descs` are valid.
    pub descs: [Desc; MAX_DESCS],
    /// Offset of each input's bytes in the body given to [`parse_request`].
    pub inputs: [usize; MAX_DESCS],
}

impl ParsedRequest {
    /// The valid buffers.
    #[must_use]
    pub fn descs(&self) -> &[Desc] {
        self.descs.get(..self.request.descs as usize).unwrap_or(&[])
    }
}

/// Rounds `len` up to the next multiple of 8, the padding of data in frames.
#[must_use]
pub const fn padded(len: usize) -> usize {
    (len + 7) & !7
}

/// How many bytes of `desc`'s buffer travel back when the call returned `result`.
///
/// Both ends compute it, so the reply carries no lengths.
#[must_use]
pub fn output_len(desc: &Desc, result: i64) -> usize {
    if desc.direction & direction::OUT == 0 {
        return 0;
    }
    let len = desc.len as usize;
    match desc.mode {
        mode::ALWAYS => len,
        mode::BY_RESULT => usize::try_from(result)
            .map_or(0, |units| units.saturating_mul(usize::from(desc.unit).max(1)).min(len)),
        _ => {
            if (-4095..0).contains(&result) {
                0
            } else {
                len
            }
        }
    }
}

/// Checks the body of a [`kind::CALL`] frame (all after the [`FrameHeader`]).
///
/// # Errors
/// [`RequestError`] names what is wrong with the peer's request.
pub fn parse_request(body: &[u8]) -> Result<ParsedRequest, RequestError> {
    let (request, mut rest) =
        Request::read_from_prefix(body).map_err(|_| RequestError::Truncated)?;
    let count = request.descs as usize;
    if count > MAX_DESCS {
        return Err(RequestError::TooManyBuffers);
    }
    let mut parsed =
        ParsedRequest { request, descs: [Desc::default(); MAX_DESCS], inputs: [0; MAX_DESCS] };
    for slot in parsed.descs.iter_mut().take(count) {
        let (desc, tail) = Desc::read_from_prefix(rest).map_err(|_| RequestError::Truncated)?;
        *slot = desc;
        rest = tail;
    }
    let mut at = body.len() - rest.len();
    let mut output = 0usize;
    for i in 0..count {
        let desc = parsed.descs[i];
        let len = desc.len as usize;
        check_place(&parsed.descs[..i], &desc)?;
        if desc.direction & direction::IN_PLACE == 0 {
            if len > CHUNK {
                return Err(RequestError::TooLong);
            }
            if desc.direction & direction::IN != 0 {
                parsed.inputs[i] = at;
                at += padded(len);
                if at > body.len() {
                    return Err(RequestError::Truncated);
                }
            }
        } else if len > CHUNK {
            return Err(RequestError::TooLong);
        }
        output += padded(len);
    }
    if output > MAX_FRAME - 64 { Err(RequestError::TooLong) } else { Ok(parsed) }
}

fn check_place(earlier: &[Desc], desc: &Desc) -> Result<(), RequestError> {
    match desc.place {
        0..=5 | PLACE_NONE => Ok(()),
        place => {
            let holder = place
                .checked_sub(PLACE_BUFFER)
                .and_then(|i| earlier.get(usize::from(i)))
                .filter(|h| h.direction & direction::IN_PLACE == 0)
                .ok_or(RequestError::BadPlace)?;
            let end = u64::from(desc.offset) + 8;
            if end <= u64::from(holder.len) { Ok(()) } else { Err(RequestError::BadPlace) }
        }
    }
}

/// Splits a frame into its header and body.
///
/// # Errors
/// [`RequestError::Truncated`] when shorter than a [`FrameHeader`].
pub fn split_frame(frame: &[u8]) -> Result<(FrameHeader, &[u8]), RequestError> {
    // A copy: a view would take a frame at an odd address for a short one.
    FrameHeader::read_from_prefix(frame).map_err(|_| RequestError::Truncated)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    fn encode(request: Request, descs: &[Desc], data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(request.as_bytes());
        for d in descs {
            out.extend_from_slice(d.as_bytes());
        }
        out.extend_from_slice(data);
        out
    }

    #[test]
    fn a_write_request_round_trips() {
        let desc =
            Desc { addr: 0x1000, len: 5, place: 1, direction: direction::IN, ..Desc::default() };
        let body = encode(
            Request { nr: 1, descs: 1, args: [1, 0x1000, 5, 0, 0, 0], took: 0 },
            &[desc],
            b"hello\0\0\0",
        );
        let parsed = parse_request(&body).unwrap();
        assert_eq!(parsed.request.nr, 1);
        assert_eq!(parsed.descs(), &[desc]);
        assert_eq!(&body[parsed.inputs[0]..][..5], b"hello");
    }

    #[test]
    fn a_frame_is_split_wherever_it_lies() {
        let mut bytes = [0; 24];
        let header = FrameHeader { kind: 7, seq: 9 };
        for at in 0..8 {
            bytes.fill(0);
            bytes[at..at + 8].copy_from_slice(header.as_bytes());
            assert_eq!(split_frame(&bytes[at..]), Ok((header, &[0; 24][at + 8..])));
        }
        assert_eq!(split_frame(&bytes[..7]).map(|_| ()), Err(RequestError::Truncated));
    }

    #[test]
    fn every_truncation_is_refused() {
        let desc = Desc { len: 16, place: 1, direction: direction::IN, ..Desc::default() };
        let body = encode(Request { nr: 1, descs: 1, args: [0; 6], took: 0 }, &[desc], &[7; 16]);
        for cut in 0..body.len() {
            assert_eq!(
                parse_request(&body[..cut]).map(|_| ()),
                Err(RequestError::Truncated),
                "{cut}"
            );
        }
    }

    #[test]
    fn hostile_lengths_and_places_are_refused() {
        let long = Desc { len: u32::MAX, place: 0, direction: direction::OUT, ..Desc::default() };
        let forward = Desc { len: 8, place: PLACE_BUFFER, ..Desc::default() };
        for (desc, want) in [(long, RequestError::TooLong), (forward, RequestError::BadPlace)] {
            let body = encode(Request { nr: 0, descs: 1, args: [0; 6], took: 0 }, &[desc], &[]);
            assert_eq!(parse_request(&body).map(|_| ()), Err(want));
        }
        let body = encode(Request { nr: 0, descs: 9, args: [0; 6], took: 0 }, &[], &[]);
        assert_eq!(parse_request(&body).map(|_| ()), Err(RequestError::TooManyBuffers));
    }

    #[test]
    fn output_lengths_follow_the_result() {
        let by_result = Desc {
            len: 100,
            direction: direction::OUT,
            mode: mode::BY_RESULT,
            unit: 12,
            ..Desc::default()
        };
        assert_eq!(output_len(&by_result, 3), 36);
        assert_eq!(output_len(&by_result, 30), 100);
        assert_eq!(output_len(&by_result, -4), 0);
        let on_success = Desc { len: 144, direction: direction::OUT, ..Desc::default() };
        assert_eq!(output_len(&on_success, 0), 144);
        assert_eq!(output_len(&on_success, -2), 0);
        let always = Desc { mode: mode::ALWAYS, ..on_success };
        assert_eq!(output_len(&always, -4), 144);
    }
}
