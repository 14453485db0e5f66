//! The byte-stream carrier: the same packets over TCP or a unix stream, in order.
//!
//! ```text
//! │ length u32 │ header │ ciphertext │ tag │ length u32 │ header │ …
//! ```
//!
//! For bulk between two processes that already share keys, such as a process
//! image: records of up to 256 KiB, one system call each way. Both directions
//! count from zero under a key of their own; a record that is missing, repeated,
//! changed or out of place ends the carrier, because on a stream that is an
//! attack or a bug, and nothing behind it can be trusted.
//!
//! Not here: key exchange, calls, reconnecting.
//!
//! Invariants: a length is checked before memory is taken for it; a read that
//! stops in the middle (a timeout) goes on where it stopped; after a failure
//! nothing more is sent or received.

use crate::session::protect::{Cipher, Key, Label, OpenError, Opener, Replay, SealError, Sealer};
use conet_wire::session::{
    HEADER, MAX_RECORD_DATA, MAX_RECORD_OVERHEAD, PacketKind, RECORD_PREFIX, RecordLengthError,
    TAG, emit_record_prefix, parse_record_prefix,
};
use std::io::{self, Read, Write};

/// Longest payload of one record, bytes.
pub const MAX_PAYLOAD: usize = MAX_RECORD_DATA + MAX_RECORD_OVERHEAD;

const FRONT: usize = RECORD_PREFIX + HEADER;

/// Why a record was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Longer than [`MAX_PAYLOAD`]; the caller's fault. The carrier goes on.
    #[error("record of {0} bytes is longer than {MAX_PAYLOAD}")]
    TooLong(usize),
    /// The carrier has failed before.
    #[error("carrier has failed")]
    Broken,
    /// Packet numbers are used up.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The stream failed; the record may have gone in part.
    #[error("write to the stream")]
    Io(#[source] io::Error),
}

/// Why no record was received.
#[derive(Debug, thiserror::Error)]
pub enum RecvError {
    /// A length that no record has; the peer's fault.
    #[error(transparent)]
    Length(#[from] RecordLengthError),
    /// Forged, repeated or missing records; the peer's fault, or the network's.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A packet that does not belong on a stream; the peer's fault.
    #[error("packet does not belong on a stream")]
    Misplaced,
    /// The stream ended within a record.
    #[error("stream ended within a record")]
    Truncated,
    /// The carrier has failed before.
    #[error("carrier has failed")]
    Broken,
    /// The stream failed. After `WouldBlock` or `TimedOut` the carrier goes on.
    #[error("read from the stream")]
    Io(#[source] io::Error),
}

/// Where a carrier's numbers stand, to continue it with another one on the same
/// keys. Never continue from the same position twice.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Position {
    /// Number of the next record to send.
    pub send: u64,
    /// Number of the next record to receive.
    pub receive: u64,
}

/// Sealed records over a blocking stream.
#[derive(Debug)]
pub struct StreamCarrier<S> {
    stream: S,
    sealer: Sealer,
    opener: Opener,
    out: Vec<u8>,
    incoming: Vec<u8>,
    filled: usize,
    broken: bool,
}

impl<S: Read + Write> StreamCarrier<S> {
    /// Over `stream`, from `position` on: the default for fresh keys.
    pub fn new(
        stream: S,
        cipher: Cipher,
        sealing: &Key,
        opening: &Key,
        position: Position,
    ) -> Self {
        Self {
            stream,
            sealer: Sealer::new(cipher, sealing, position.send),
            opener: Opener::new(cipher, opening, Replay::in_order(position.receive)),
            out: Vec::new(),
            incoming: Vec::new(),
            filled: 0,
            broken: false,
        }
    }

    /// Where the numbers stand.
    #[must_use]
    pub const fn position(&self) -> Position {
        Position { send: self.sealer.next_number(), receive: self.opener.next_number() }
    }

    /// The stream, for its options.
    pub const fn stream(&self) -> &S {
        &self.stream
    }

    /// Gives the stream back. Bytes of a record that was received in part are lost.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// Sends one record.
    ///
    /// # Errors
    ///
    /// See [`SendError`].
    pub fn send(&mut self, payload: &[u8]) -> Result<(), SendError> {
        self.send_with(payload.len(), |room| room.copy_from_slice(payload))
    }

    /// Sends one record of `length` bytes, which `fill` writes straight into the
    /// packet (zeroed before, or with an older record's ciphertext).
    ///
    /// # Errors
    ///
    /// See [`SendError`].
    pub fn send_with(
        &mut self,
        length: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), SendError> {
        if self.broken {
            return Err(SendError::Broken);
        }
        let packet = HEADER + length.min(MAX_PAYLOAD) + TAG;
        let Some(prefix) = emit_record_prefix(packet).filter(|_| length <= MAX_PAYLOAD) else {
            return Err(SendError::TooLong(length));
        };
        if self.out.len() < RECORD_PREFIX + packet {
            self.out.resize(RECORD_PREFIX + packet, 0);
        }
        let (front, rest) = self.out.split_at_mut(RECORD_PREFIX);
        front.copy_from_slice(&prefix);
        fill(&mut rest[HEADER..HEADER + length]);
        self.sealer.seal_in_place(Label::data(0), rest, length)?;
        let written = self.stream.write_all(&self.out[..RECORD_PREFIX + packet]);
        written.map_err(|error| {
            self.broken = true;
            SendError::Io(error)
        })
    }

    /// Receives one record; `None` where the peer closed the stream between two.
    ///
    /// # Errors
    ///
    /// See [`RecvError`].
    pub fn recv(&mut self) -> Result<Option<&[u8]>, RecvError> {
        if self.broken {
            return Err(RecvError::Broken);
        }
        let result = self.recv_packet();
        let waits = |kind| matches!(kind, io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
        match result {
            Ok(Some(range)) => Ok(self.incoming.get(range)),
            Ok(None) => Ok(None),
            Err(error) => {
                self.broken = !matches!(&error, RecvError::Io(error) if waits(error.kind()));
                Err(error)
            }
        }
    }

    fn recv_packet(&mut self) -> Result<Option<core::ops::Range<usize>>, RecvError> {
        if !self.fill(RECORD_PREFIX)? {
            return if self.filled == 0 { Ok(None) } else { Err(RecvError::Truncated) };
        }
        let prefix = self.incoming.first_chunk().ok_or(RecvError::Truncated)?;
        let packet = parse_record_prefix(*prefix)?;
        if !self.fill(RECORD_PREFIX + packet)? {
            return Err(RecvError::Truncated);
        }
        self.filled = 0;
        let bytes = self.incoming.get_mut(RECORD_PREFIX..RECORD_PREFIX + packet);
        let (header, payload) = self.opener.open_in_place(bytes.ok_or(RecvError::Truncated)?)?;
        if header.kind != PacketKind::Data || header.session != 0 || header.flags != 0 {
            return Err(RecvError::Misplaced);
        }
        debug_assert_eq!(payload.start + RECORD_PREFIX, FRONT);
        Ok(Some(payload.start + RECORD_PREFIX..payload.end + RECORD_PREFIX))
    }

    /// Reads until `want` bytes are there; `false` at the end of the stream.
    fn fill(&mut self, want: usize) -> Result<bool, RecvError> {
        if self.incoming.len() < want {
            self.incoming.resize(want, 0);
        }
        while self.filled < want {
            let room = self.incoming.get_mut(self.filled..want).unwrap_or_default();
            match self.stream.read(room) {
                Ok(0) => return Ok(false),
                Ok(n) => self.filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(RecvError::Io(error)),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
