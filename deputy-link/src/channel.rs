//! The link as the daemon uses it while it moves a process: blocking frames in
//! sealed records. Afterwards the socket and the positions go to the deputy.

use conet_transport::session::protect::{Cipher, Key, Label, OpenError, Opener, Replay, Sealer};
use conet_wire::link::{FrameHeader, split_frame};
use conet_wire::session::{
    HEADER, MAX_PACKET, RECORD_PREFIX, TAG, emit_record_prefix, parse_record_prefix,
};
use std::io::{self, Read, Write};
use std::net::TcpStream;
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
}

impl Channel {
    pub(crate) fn new(stream: TcpStream, secret: LinkSecret) -> Self {
        Self {
            stream,
            sealer: Sealer::new(secret.cipher, &secret.seal, 0),
            opener: Opener::new(secret.cipher, &secret.open, Replay::in_order(0)),
            send: vec![0; RECORD_PREFIX + MAX_PACKET],
            receive: vec![0; MAX_PACKET],
            secret,
        }
    }

    pub(crate) const fn secret(&self) -> &LinkSecret {
        &self.secret
    }

    pub(crate) const fn stream(&self) -> &TcpStream {
        &self.stream
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
        self.stream.write_all(&self.send[..RECORD_PREFIX + packet])?;
        Ok(())
    }

    /// Receives one frame: its header and body.
    pub(crate) fn receive(&mut self) -> Result<(FrameHeader, &[u8]), ChannelError> {
        let mut prefix = [0; RECORD_PREFIX];
        self.stream.read_exact(&mut prefix)?;
        let len = parse_record_prefix(prefix).map_err(|_| OpenError::Truncated)?;
        let packet = self.receive.get_mut(..len).ok_or(ChannelError::TooLong)?;
        self.stream.read_exact(packet)?;
        let (_, payload) = self.opener.open_in_place(packet)?;
        split_frame(&packet[payload]).map_err(|_| ChannelError::Unexpected(0))
    }
}
