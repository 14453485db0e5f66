//! The link as the daemon uses it while it moves a process: blocking frames in
//! sealed records. Afterwards the socket and the positions go to the deputy.

use conet_transport::session::protect::{Cipher, Key, Label, OpenError, Opener, Replay, Sealer};
use conet_wire::link::{FrameHeader, split_frame};
use conet_wire::session::{
    HEADER, MAX_PACKET, RECORD_PREFIX, TAG, emit_record_prefix, parse_record_prefix,
};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Why a frame was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection failed or ended.
    #[error("link to the other node: {0}")]
    Io(#[from] io::Error),
    /// What came was not sealed by the peer.
    #[error("record from the other node refused: {0}")]
    Open(#[from] OpenError),
    /// What came is no frame of this protocol, or not at this point.
    #[error("frame {0} from the other node is out of place")]
    Unexpected(u32),
    /// A frame is longer than a record may be; a bug.
    #[error("frame too long")]
    TooLong,
    /// The peer is there, but keeps a stopped process waiting.
    #[error("the other node is too slow to keep a process stopped for it")]
    Slow,
}

/// What a peer may take while a process is stopped for it: ten seconds, and one more for
/// every 64 KiB that passed. A limit for each step alone would let a peer that takes a
/// byte now and then hold the process for as long as it likes.
#[derive(Clone, Copy, Debug)]
struct Patience {
    begin: Instant,
    bytes: u64,
}

impl Patience {
    const GRACE: Duration = Duration::from_secs(10);
    const BYTES_PER_SECOND: u64 = 64 << 10;

    const fn new(begin: Instant) -> Self {
        Self { begin, bytes: 0 }
    }

    /// Counts what passed by `now`.
    fn pass(&mut self, bytes: usize, now: Instant) -> Result<(), ChannelError> {
        self.bytes = self.bytes.saturating_add(bytes as u64);
        let allowed = Self::GRACE + Duration::from_secs(self.bytes / Self::BYTES_PER_SECOND);
        if now.duration_since(self.begin) > allowed { Err(ChannelError::Slow) } else { Ok(()) }
    }
}

/// Keys and cipher of one link, as the two daemons agreed on them.
#[derive(Debug)]
pub struct LinkSecret {
    /// The AEAD of both directions.
    pub cipher: Cipher,
    /// Key of what this side seals.
    pub seal: Key,
    /// Key of what the other side seals.
    pub open: Key,
}

impl LinkSecret {
    /// The cipher's number in [`conet_deputy_core::boot`].
    pub(crate) const fn cipher_number(&self) -> u32 {
        match self.cipher {
            Cipher::Aes128Gcm => 0,
            Cipher::ChaCha20Poly1305 => 1,
            Cipher::Plain => 2,
        }
    }
}

/// One end of a link.
#[derive(Debug)]
pub(crate) struct Channel {
    stream: TcpStream,
    secret: LinkSecret,
    sealer: Sealer,
    opener: Opener,
    send: Vec<u8>,
    receive: Vec<u8>,
    patience: Option<Patience>,
}

impl Channel {
    pub(crate) fn new(stream: TcpStream, secret: LinkSecret) -> Self {
        Self {
            stream,
            sealer: Sealer::new(secret.cipher, &secret.seal, 0),
            opener: Opener::new(secret.cipher, &secret.open, Replay::in_order(0)),
            send: vec![0; RECORD_PREFIX + MAX_PACKET],
            receive: vec![0; MAX_PACKET],
            patience: None,
            secret,
        }
    }

    pub(crate) const fn secret(&self) -> &LinkSecret {
        &self.secret
    }

    pub(crate) const fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// A process is stopped from here on: the peer's time is limited as a whole, if each
    /// of its steps is ([`TcpStream::set_read_timeout`]).
    pub(crate) fn hurry(&mut self) {
        self.patience = Some(Patience::new(Instant::now()));
    }

    /// Numbers of the next records: sealed here, opened here.
    pub(crate) const fn positions(&self) -> (u64, u64) {
        (self.sealer.next_number(), self.opener.next_number())
    }

    /// Sends one frame whose body is `parts`, one after the other.
    pub(crate) fn send(
        &mut self,
        kind: u32,
        seq: u32,
        parts: &[&[u8]],
    ) -> Result<(), ChannelError> {
        let sent = self.send_with(kind, seq, |body| {
            let mut end = 0;
            for part in parts {
                body.get_mut(end..end + part.len())?.copy_from_slice(part);
                end += part.len();
            }
            Some(end)
        })?;
        if sent { Ok(()) } else { Err(ChannelError::TooLong) }
    }

    /// Sends one frame whose body `write` puts where it is sealed; it gives the length.
    /// Sends nothing, and says so, where it gives none.
    pub(crate) fn send_with(
        &mut self,
        kind: u32,
        seq: u32,
        write: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> Result<bool, ChannelError> {
        const BODY: usize = RECORD_PREFIX + HEADER + size_of::<FrameHeader>();
        let end = self.send.len() - TAG;
        let Some(len) = write(&mut self.send[BODY..end]) else { return Ok(false) };
        let header = FrameHeader { kind, seq };
        self.send[RECORD_PREFIX + HEADER..BODY].copy_from_slice(header.as_bytes());
        self.seal_and_write(BODY + len)?;
        Ok(true)
    }

    fn seal_and_write(&mut self, end: usize) -> Result<(), ChannelError> {
        let payload = end - RECORD_PREFIX - HEADER;
        let packet = self
            .sealer
            .seal_in_place(Label::data(0), &mut self.send[RECORD_PREFIX..], payload)
            .map_err(|_| ChannelError::TooLong)?;
        let prefix = emit_record_prefix(packet).ok_or(ChannelError::TooLong)?;
        self.send[..RECORD_PREFIX].copy_from_slice(&prefix);
        let mut rest = &self.send[..RECORD_PREFIX + packet];
        while !rest.is_empty() {
            let passed =
                step(&mut self.patience, io::ErrorKind::WriteZero, || self.stream.write(rest))?;
            rest = &rest[passed..];
        }
        Ok(())
    }

    /// Receives one frame: its header and body.
    pub(crate) fn receive(&mut self) -> Result<(FrameHeader, &[u8]), ChannelError> {
        let mut prefix = [0; RECORD_PREFIX];
        read_exact(&self.stream, &mut self.patience, &mut prefix)?;
        let len = parse_record_prefix(prefix).map_err(|_| OpenError::Truncated)?;
        let packet = self.receive.get_mut(..len).ok_or(ChannelError::TooLong)?;
        read_exact(&self.stream, &mut self.patience, packet)?;
        let (_, payload) = self.opener.open_in_place(packet)?;
        split_frame(&packet[payload]).map_err(|_| ChannelError::Unexpected(0))
    }
}

fn read_exact(
    mut stream: &TcpStream,
    patience: &mut Option<Patience>,
    mut bytes: &mut [u8],
) -> Result<(), ChannelError> {
    while !bytes.is_empty() {
        let passed =
            step(patience, io::ErrorKind::UnexpectedEof, || Read::read(&mut stream, bytes))?;
        bytes = &mut bytes[passed..];
    }
    Ok(())
}

/// One system call on the stream; `end` is what it means if nothing passes.
fn step(
    patience: &mut Option<Patience>,
    end: io::ErrorKind,
    mut call: impl FnMut() -> io::Result<usize>,
) -> Result<usize, ChannelError> {
    let passed = match call() {
        Ok(0) => return Err(io::Error::from(end).into()),
        Ok(passed) => passed,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
        Err(error) => return Err(error.into()),
    };
    patience.as_mut().map_or(Ok(()), |patience| patience.pass(passed, Instant::now()))?;
    Ok(passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A second node that took a byte every nine seconds held a stopped process for as
    /// long as it liked.
    #[test]
    fn a_peer_that_dawdles_is_given_up() {
        let begin = Instant::now();
        let mut patience = Patience::new(begin);
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert!(patience.pass(1, at(9)).is_ok());
        assert!(matches!(patience.pass(1, at(18)), Err(ChannelError::Slow)));
        // A slow network is not a peer that dawdles: 1 Mbit/s for an hour.
        let mut patience = Patience::new(begin);
        assert!((1..3600).all(|second| patience.pass(125_000, at(second)).is_ok()));
    }
}
