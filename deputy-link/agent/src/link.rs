//! The link as the agent sees it: frames in sealed records over one descriptor.
//!
//! ```text
//! buffer: │ prefix 4 │ header 16 │ FrameHeader 8 │ body … │ tag 16 │
//! ```
//!
//! Inputs are gathered straight into the send buffer and encrypted there; a record
//! leaves in one `send`. On the call path one `recv` brings a whole reply.

use crate::sys;
use conet_deputy_core::boot::family::LinkKeys;
use conet_deputy_core::boot::{ABORTED, BROKEN_OFF};
use conet_deputy_core::waiting::Waiting;
use conet_transport::session::protect::{Cipher, Key, Label, Opener, Replay, Sealer};
use conet_wire::link::{FrameHeader, MAX_FRAME, split_frame};
use conet_wire::session::{RECORD_PREFIX, TAG, emit_record_prefix, parse_record_prefix};
use core::cell::Cell;
use core::ops::Range;
use zerocopy::IntoBytes;

const BODY: usize = RECORD_PREFIX + conet_wire::session::HEADER + size_of::<FrameHeader>();
/// A small read first: a reply of ordinary size comes whole, and little is left
/// over to be moved when there is more.
const FIRST_READ: usize = 8192;
const MSG_DONTWAIT: u32 = 0x40;
/// −EAGAIN.
const NOTHING_YET: i64 = -11;

/// Why nothing was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The other side closed, or the network did.
    End,
    /// What came was forged, replayed or malformed.
    Forged,
    /// [`conet_deputy_core::boot::ABORTED`]: the daemon wants the program home.
    Interrupted,
}

/// One end of the link.
pub(crate) struct Link {
    /// Its descriptor.
    pub(crate) fd: i32,
    /// Which buffers it uses.
    pub(crate) set: u32,
    sealer: Option<Sealer>,
    opener: Option<Opener>,
    /// Bytes in the receive buffer.
    filled: usize,
    /// Of these, bytes of the record last given out.
    consumed: usize,
    waiting: Waiting,
}

/// A frame that was received; its body lies in the link's receive buffer.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) header: FrameHeader,
    pub(crate) body: Range<usize>,
}

/// Keys and positions, as they are handed over.
pub(crate) struct Keys {
    pub(crate) cipher: u32,
    pub(crate) seal: [u8; 32],
    pub(crate) open: [u8; 32],
    pub(crate) seal_next: u64,
    pub(crate) open_next: u64,
}

impl From<LinkKeys> for Keys {
    fn from(keys: LinkKeys) -> Self {
        let LinkKeys { cipher, reserved: _, seal, open, seal_next, open_next } = keys;
        Self { cipher, seal, open, seal_next, open_next }
    }
}

impl Link {
    pub(crate) const fn none() -> Self {
        let waiting = Waiting::new();
        Self { fd: 0, set: 0, sealer: None, opener: None, filled: 0, consumed: 0, waiting }
    }

    /// Takes over descriptor and keys.
    pub(crate) fn start(&mut self, fd: i32, set: u32, keys: &Keys) {
        let cipher = match keys.cipher {
            0 => Cipher::Aes128Gcm,
            2 => Cipher::Plain,
            _ => Cipher::ChaCha20Poly1305,
        };
        self.fd = fd;
        self.set = set;
        self.sealer = Some(Sealer::new(cipher, &Key::new(keys.seal), keys.seal_next));
        let replay = Replay::in_order(keys.open_next);
        self.opener = Some(Opener::new(cipher, &Key::new(keys.open), replay));
        self.filled = 0;
        self.consumed = 0;
        self.waiting = Waiting::new();
    }

    /// Goes on with the other buffers, because these hold a pending call's data.
    pub(crate) fn switch_buffers(&mut self) {
        let (from, _) = sys::buffers(self.set);
        self.set = 1 - self.set;
        let (to, _) = sys::buffers(self.set);
        let rest = self.filled - self.consumed;
        to[..rest].copy_from_slice(&from[self.consumed..self.filled]);
        self.filled = rest;
        self.consumed = 0;
    }

    /// Whether part of a record has come in.
    pub(crate) const fn has_begun(&self) -> bool {
        self.filled > self.consumed
    }

    /// Where to write the body of the next frame.
    pub(crate) fn body(&self) -> &'static mut [u8] {
        let (_, send) = sys::buffers(self.set);
        &mut send[BODY..BODY + MAX_FRAME - size_of::<FrameHeader>()]
    }

    /// The body of a received frame.
    pub(crate) fn received(&self, frame: &Frame) -> &'static mut [u8] {
        let (receive, _) = sys::buffers(self.set);
        &mut receive[frame.body.clone()]
    }

    /// Seals and sends a frame whose body of `len` bytes is in [`Self::body`].
    pub(crate) fn send(&mut self, kind: u32, seq: u32, len: usize) -> Result<(), Broken> {
        let (_, buffer) = sys::buffers(self.set);
        let sealer = self.sealer.as_mut().ok_or(Broken::End)?;
        buffer[BODY - size_of::<FrameHeader>()..BODY]
            .copy_from_slice(FrameHeader { kind, seq }.as_bytes());
        let packet = sealer
            .seal_in_place(
                Label::data(0),
                &mut buffer[RECORD_PREFIX..],
                size_of::<FrameHeader>() + len,
            )
            .map_err(|_| Broken::End)?;
        let prefix = emit_record_prefix(packet).ok_or(Broken::End)?;
        buffer[..RECORD_PREFIX].copy_from_slice(&prefix);
        let mut rest = &buffer[..RECORD_PREFIX + packet];
        while !rest.is_empty() {
            match sys::send(self.fd, rest) {
                -4 => {}
                sent => {
                    let sent = usize::try_from(sent).map_err(|_| Broken::End)?;
                    rest = rest.get(sent..).ok_or(Broken::End)?;
                }
            }
        }
        Ok(())
    }

    /// Sends `body` as a frame.
    pub(crate) fn send_value(
        &mut self,
        kind: u32,
        seq: u32,
        body: &(impl IntoBytes + zerocopy::Immutable),
    ) -> Result<(), Broken> {
        let bytes = body.as_bytes();
        self.body()[..bytes.len()].copy_from_slice(bytes);
        self.send(kind, seq, bytes.len())
    }

    /// Receives one frame; `read` is `recv` as this role does it.
    pub(crate) fn receive(
        &mut self,
        read: impl Fn(i32, &mut [u8]) -> i64,
    ) -> Result<Frame, Broken> {
        let (buffer, _) = sys::buffers(self.set);
        if self.consumed > 0 {
            buffer.copy_within(self.consumed..self.filled, 0);
            self.filled -= self.consumed;
            self.consumed = 0;
        }
        loop {
            let wanted = match buffer.first_chunk::<RECORD_PREFIX>() {
                Some(prefix) if self.filled >= RECORD_PREFIX => {
                    let packet = parse_record_prefix(*prefix).map_err(|_| Broken::Forged)?;
                    let record = RECORD_PREFIX + packet;
                    if self.filled >= record {
                        return self.open(record);
                    }
                    record
                }
                _ => FIRST_READ,
            };
            let room = buffer.get_mut(self.filled..wanted).ok_or(Broken::Forged)?;
            match read(self.fd, room) {
                // The node that hosts has given the socket a time limit for the beginning.
                -4 | NOTHING_YET => {}
                n if is_aborted(n) => return Err(Broken::Interrupted),
                n if n <= 0 => return Err(Broken::End),
                n => self.filled += usize::try_from(n).map_err(|_| Broken::End)?,
            }
        }
    }

    /// As [`Self::receive`], where the other half is expected to answer soon; `read`
    /// takes the flags of recv(2).
    pub(crate) fn expect(
        &mut self,
        read: impl Fn(i32, &mut [u8], u32) -> i64,
    ) -> Result<Frame, Broken> {
        let tries = self.waiting.tries();
        let left = Cell::new(tries);
        let frame = self.receive(|fd, into| {
            while left.get() > 0 {
                left.set(left.get() - 1);
                match read(fd, into, MSG_DONTWAIT) {
                    NOTHING_YET => core::hint::spin_loop(),
                    result => return result,
                }
            }
            read(fd, into, 0)
        });
        self.waiting.learn(tries, left.get(), sys::switches);
        frame
    }

    fn open(&mut self, record: usize) -> Result<Frame, Broken> {
        let (buffer, _) = sys::buffers(self.set);
        let opener = self.opener.as_mut().ok_or(Broken::End)?;
        let packet = &mut buffer[RECORD_PREFIX..record];
        debug_assert!(packet.len() >= TAG);
        let (_, payload) = opener.open_in_place(packet).map_err(|_| Broken::Forged)?;
        let (header, body) = split_frame(&packet[payload.clone()]).map_err(|_| Broken::Forged)?;
        self.consumed = record;
        let end = RECORD_PREFIX + payload.end;
        Ok(Frame { header, body: end - body.len()..end })
    }
}

/// Whether a gated call was given up because the program is wanted home.
pub(crate) fn is_aborted(result: i64) -> bool {
    (BROKEN_OFF - 514..=ABORTED).contains(&result)
}

/// `recv` that waits, for a process that is still being moved: when its other half
/// is silent for as long as the socket's time limit, that is its end.
pub(crate) fn wait(fd: i32, into: &mut [u8]) -> i64 {
    match sys::receive(fd, into, 0) {
        NOTHING_YET => 0,
        result => result,
    }
}
