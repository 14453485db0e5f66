//! A saved connection, and its layout on the way to another host.
//!
//! ```text
//! "cnsk" │ version u16 │ flags u16 │ local 22 │ peer 22 │ mss u32 │ timestamp u32
//! │ scales u8 u8 │ window 5 × u32 │ recv end u32 │ send end u32
//! │ reuse u8 │ buffer lock u8 │ sndbuf u32 │ rcvbuf u32
//! │ congestion u8 length, bytes │ options u8 count, (id u8, value i64) …
//! │ unsent u32 │ recv u32 length, bytes │ send u32 length, bytes        little-endian
//! address   family u8 (4 or 6) │ zero u8 │ port u16 │ address 16 │ zero u16
//! ```
//!
//! Own layout and not a serialiser's: it is written once and read by hosts of other
//! versions, and what it may contain is checked in one place.
//!
//! Invariants: decoding takes memory only for bytes that are there; a decoded state
//! has valid ranges, so that restoring it fails for the kernel's reasons only; what
//! `encode` writes, `decode` reads back to the same value, and only that.

mod codec;

use crate::lock::Flow;
use crate::options::SavedOption;
use codec::{Reader, Writer};
use std::fmt;

/// Longest queue that is carried, bytes: beyond Linux's largest `tcp_wmem` and
/// `tcp_rmem` in any distribution.
pub const MAX_QUEUE: usize = 64 * 1024 * 1024;
const MAGIC: [u8; 4] = *b"cnsk";
/// Version of the layout.
pub const VERSION: u16 = 1;

const FLAG_IPV6: u16 = 1;
const FLAG_V6ONLY: u16 = 2;
const FLAG_SACK: u16 = 4;
const FLAG_SCALES: u16 = 8;
const FLAG_TIMESTAMP: u16 = 16;

/// `struct tcp_repair_window`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RepairWindow {
    /// Sequence of the last window update.
    pub snd_wl1: u32,
    /// The peer's window, bytes.
    pub snd_wnd: u32,
    /// The largest it ever was.
    pub max_window: u32,
    /// Our window.
    pub rcv_wnd: u32,
    /// Sequence at our last window update.
    pub rcv_wup: u32,
}

impl RepairWindow {
    /// Bytes of the kernel's form.
    pub(crate) const LEN: usize = 20;

    pub(crate) fn from_kernel(bytes: &[u8; Self::LEN]) -> Self {
        let word = |at: usize| {
            let word = bytes.get(at * 4..at * 4 + 4).and_then(<[u8]>::first_chunk);
            word.map_or(0, |word| u32::from_ne_bytes(*word))
        };
        Self {
            snd_wl1: word(0),
            snd_wnd: word(1),
            max_window: word(2),
            rcv_wnd: word(3),
            rcv_wup: word(4),
        }
    }

    pub(crate) fn words(&self) -> [u32; 5] {
        [self.snd_wl1, self.snd_wnd, self.max_window, self.rcv_wnd, self.rcv_wup]
    }
}

/// Window scales (RFC 7323 §2.2), 0..=14.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct WindowScales {
    /// Of the windows that the peer announces.
    pub send: u8,
    /// Of the windows that we announce.
    pub receive: u8,
}

/// `SO_SNDBUF` and its kin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Buffers {
    /// As `SO_SNDBUF` gives it: twice what was asked for.
    pub send: u32,
    /// As `SO_RCVBUF` gives it.
    pub receive: u32,
    /// `SO_BUF_LOCK`: which of the two the kernel may not tune; 0..=3.
    pub lock: u8,
}

/// An established connection, outside of any kernel.
#[derive(Clone, Eq, PartialEq)]
pub struct SavedSocket {
    /// Its two ends, as the socket sees them.
    pub flow: Flow,
    /// Whether the socket is an IPv6 one, which may carry IPv4.
    pub ipv6: bool,
    /// `IPV6_V6ONLY`.
    pub v6only: bool,
    /// Negotiated maximum segment size, bytes.
    pub mss: u32,
    /// Whether SACK was negotiated (RFC 2018).
    pub sack: bool,
    /// Window scales, if negotiated.
    pub scales: Option<WindowScales>,
    /// `TCP_TIMESTAMP`, if timestamps were negotiated; bit 0 says microseconds.
    pub timestamp: Option<u32>,
    /// Windows of both ends.
    pub window: RepairWindow,
    /// Sequence number behind the last byte received.
    pub recv_end: u32,
    /// Sequence number behind the last byte written.
    pub send_end: u32,
    /// Bytes that arrived and were not read.
    pub recv: Vec<u8>,
    /// Bytes that were written and not acknowledged; the last `unsent` of them were
    /// never sent.
    pub send: Vec<u8>,
    /// See [`send`](Self::send).
    pub unsent: usize,
    /// `SO_REUSEADDR`, which repair mode overwrites.
    pub reuse_address: bool,
    /// Buffer sizes.
    pub buffers: Buffers,
    /// Congestion control, 1..=15 bytes of ASCII.
    pub congestion: String,
    /// All other options.
    pub options: Vec<SavedOption>,
}

impl fmt::Debug for SavedSocket {
    /// Without the bytes that it carries: they are somebody's data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SavedSocket")
            .field("flow", &self.flow)
            .field("unread", &self.recv.len())
            .field("unacknowledged", &(self.send.len() - self.unsent.min(self.send.len())))
            .field("unsent", &self.unsent)
            .field("congestion", &self.congestion)
            .finish_non_exhaustive()
    }
}

/// Why bytes are no saved socket; the sender's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum StateError {
    /// They end too early.
    #[error("saved socket is cut short")]
    Truncated,
    /// They begin with something else.
    #[error("not a saved socket")]
    Magic,
    /// Another version of the layout.
    #[error("saved socket of version {0}")]
    Version(u16),
    /// A field has a value that no connection has.
    #[error("saved socket has an impossible {0}")]
    Field(&'static str),
    /// Bytes are left over.
    #[error("saved socket is followed by something")]
    Trailing,
}

impl SavedSocket {
    /// The state's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.bytes.reserve(256 + self.recv.len() + self.send.len());
        w.put(&MAGIC);
        w.u16(VERSION);
        let flags = [
            (self.ipv6, FLAG_IPV6),
            (self.v6only, FLAG_V6ONLY),
            (self.sack, FLAG_SACK),
            (self.scales.is_some(), FLAG_SCALES),
            (self.timestamp.is_some(), FLAG_TIMESTAMP),
        ];
        w.u16(flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag));
        w.address(self.flow.local);
        w.address(self.flow.peer);
        w.u32(self.mss);
        w.u32(self.timestamp.unwrap_or(0));
        let scales = self.scales.unwrap_or(WindowScales { send: 0, receive: 0 });
        w.put(&[scales.send, scales.receive]);
        for word in self.window.words() {
            w.u32(word);
        }
        w.u32(self.recv_end);
        w.u32(self.send_end);
        w.put(&[u8::from(self.reuse_address), self.buffers.lock]);
        w.u32(self.buffers.send);
        w.u32(self.buffers.receive);
        w.short(self.congestion.as_bytes());
        w.put(&[u8::try_from(self.options.len()).unwrap_or(u8::MAX)]);
        for option in &self.options {
            w.put(&[option.id]);
            w.put(&option.value.to_le_bytes());
        }
        w.u32(u32::try_from(self.unsent).unwrap_or(u32::MAX));
        w.long(&self.recv);
        w.long(&self.send);
        w.bytes
    }

    /// Reads a state, and checks every field's range.
    ///
    /// # Errors
    ///
    /// See [`StateError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let mut r = Reader { rest: bytes };
        if r.take()? != MAGIC {
            return Err(StateError::Magic);
        }
        let version = r.u16()?;
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let flags = r.u16()?;
        if flags & !(FLAG_IPV6 | FLAG_V6ONLY | FLAG_SACK | FLAG_SCALES | FLAG_TIMESTAMP) != 0 {
            return Err(StateError::Field("flag"));
        }
        let flow = Flow { local: r.address()?, peer: r.address()? };
        let (mss, timestamp) = (r.u32()?, r.u32()?);
        let [send, receive] = r.take()?;
        let words = [r.u32()?, r.u32()?, r.u32()?, r.u32()?, r.u32()?];
        let [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup] = words;
        let (recv_end, send_end) = (r.u32()?, r.u32()?);
        let [reuse, lock] = r.take()?;
        let buffers = Buffers { send: r.u32()?, receive: r.u32()?, lock };
        let congestion = r.short()?;
        let options = r.options()?;
        let unsent = r.u32()? as usize;
        let (recv, send_queue) = (r.long()?, r.long()?);
        r.end()?;
        let state = Self {
            flow,
            ipv6: flags & FLAG_IPV6 != 0,
            v6only: flags & FLAG_V6ONLY != 0,
            mss,
            sack: flags & FLAG_SACK != 0,
            scales: optional(flags & FLAG_SCALES != 0, WindowScales { send, receive }, |s| {
                s.send == 0 && s.receive == 0
            })?,
            timestamp: optional(flags & FLAG_TIMESTAMP != 0, timestamp, |t| *t == 0)?,
            window: RepairWindow { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup },
            recv_end,
            send_end,
            recv,
            send: send_queue,
            unsent,
            reuse_address: match reuse {
                0 => false,
                1 => true,
                _ => return Err(StateError::Field("SO_REUSEADDR")),
            },
            buffers,
            congestion: text(congestion)?,
            options,
        };
        state.check()?;
        Ok(state)
    }

    /// Whether all fields have values that a connection can have.
    pub(crate) fn check(&self) -> Result<(), StateError> {
        let Flow { local, peer } = self.flow;
        let max_int = i32::MAX.cast_unsigned();
        let checks = [
            (local.port() != 0 && peer.port() != 0, "port"),
            (!local.ip().is_unspecified() && !peer.ip().is_unspecified(), "address"),
            (local.is_ipv6() == self.ipv6 && peer.is_ipv6() == self.ipv6, "address family"),
            (
                local.ip().to_canonical().is_ipv4() == peer.ip().to_canonical().is_ipv4(),
                "pair of addresses",
            ),
            (self.ipv6 || !self.v6only, "IPV6_V6ONLY"),
            ((1..=u32::from(u16::MAX)).contains(&self.mss), "MSS"),
            (self.scales.is_none_or(|s| s.send <= 14 && s.receive <= 14), "window scale"),
            (self.window.max_window >= self.window.snd_wnd, "window"),
            (self.unsent <= self.send.len(), "count of unsent bytes"),
            (self.buffers.lock <= 3, "SO_BUF_LOCK"),
            (self.buffers.send <= max_int && self.buffers.receive <= max_int, "buffer size"),
        ];
        match checks.iter().find(|(good, _)| !good) {
            Some((_, field)) => Err(StateError::Field(field)),
            None => Ok(()),
        }
    }
}

/// A field that is there only under a flag, and zero otherwise.
fn optional<T>(
    there: bool,
    value: T,
    is_zero: impl FnOnce(&T) -> bool,
) -> Result<Option<T>, StateError> {
    match (there, is_zero(&value)) {
        (true, _) => Ok(Some(value)),
        (false, true) => Ok(None),
        (false, false) => Err(StateError::Field("field without its flag")),
    }
}

fn text(bytes: &[u8]) -> Result<String, StateError> {
    let name = bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    match core::str::from_utf8(bytes) {
        Ok(text) if name && (1..=15).contains(&text.len()) => Ok(text.to_owned()),
        _ => Err(StateError::Field("congestion control")),
    }
}

#[cfg(test)]
mod tests;
