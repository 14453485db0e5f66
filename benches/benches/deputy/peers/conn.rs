//! A call as one message each way, over TCP: what the peers and the bound share.
//!
//! ```text
//! request: │ length 4 │ number 16 │ flags 8 │ call 8 │ arguments 48 │ (buffer 24) │ bytes … │ tag 16 │
//! reply:   │ length 4 │ number 16 │ flags 8 │ result 8 │ bytes … │ tag 16 │
//! ```
//!
//! The lengths are those of conet's records for the same call ([`conet_wire::link`]),
//! the tag's too where nothing is sealed. The buffers are made once; a message is one
//! `send`, and is received by as few `recv` as the kernel has it in.

use crate::work::MAX_SIZE;
use anyhow::{Result, bail, ensure};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::sockopt::set_tcp_congestion;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

const CLEAR: usize = 20;
const REQUEST: usize = CLEAR + 8 + 8 + 48;
/// What describes a buffer.
const BUFFER: usize = 24;
const REPLY: usize = CLEAR + 8 + 8;
const TAG: usize = 16;
const ROOM: usize = REQUEST + BUFFER + MAX_SIZE + TAG;

/// How an end waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    Block,
    /// Polls for [`PATIENCE`] before it blocks, so that it is quiet between batches.
    Spin,
}

/// Longer than any reply takes that is not waiting for a sleeping processor.
const PATIENCE: Duration = Duration::from_micros(200);

/// One end.
pub(crate) struct Conn {
    fd: OwnedFd,
    sent: Box<[u8; ROOM]>,
    received: Box<[u8; ROOM]>,
    key: Option<LessSafeKey>,
    /// Numbers of the next messages, out and in.
    next: (u64, u64),
    /// Which of the two directions this end seals.
    side: u8,
    wait: Wait,
}

/// A call that came in.
pub(crate) struct Call<'a> {
    pub(crate) number: u32,
    pub(crate) args: [u64; 6],
    /// The bytes that a `write` brought.
    pub(crate) input: &'a [u8],
    /// Room for what a `read` gives.
    pub(crate) output: &'a mut [u8],
}

fn nonce(side: u8, number: u64) -> Nonce {
    let mut bytes = [side; 12];
    bytes[4..].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

fn number_of(call: libc::c_long) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

/// Whether a call writes or reads the buffer of its second argument.
pub(crate) fn is_write(number: u32) -> bool {
    number == number_of(libc::SYS_write)
}

pub(crate) fn is_read(number: u32) -> bool {
    number == number_of(libc::SYS_read)
}

impl Conn {
    fn new(stream: TcpStream, side: u8, sealed: bool, wait: Wait) -> Result<Self> {
        stream.set_nodelay(true)?;
        // What a machine has by default may pace, which one message each way has no use
        // for; conet's links do the same. Where there is neither, it stays as it is.
        set_tcp_congestion(&stream, "cubic").or_else(|_| set_tcp_congestion(&stream, "reno")).ok();
        let key = UnboundKey::new(&AES_128_GCM, &[3; 16]).map(LessSafeKey::new).ok();
        Ok(Self {
            fd: stream.into(),
            sent: Box::new([0; ROOM]),
            received: Box::new([0; ROOM]),
            key: key.filter(|_| sealed),
            next: (0, 0),
            side,
            wait,
        })
    }

    /// The caller's end.
    pub(crate) fn connect(port: u16, sealed: bool, wait: Wait) -> Result<Self> {
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self::new(TcpStream::connect(at)?, 1, sealed, wait)
    }

    /// The other end: says where it listens, and takes one connection.
    pub(crate) fn accept(sealed: bool) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = u64::from(listener.local_addr()?.port());
        rustix::io::write(rustix::stdio::stdout(), &port.to_le_bytes())?;
        Self::new(listener.accept()?.0, 2, sealed, Wait::Block)
    }

    /// Sends what lies in `sent` up to `end`, without the tag.
    fn send(&mut self, end: usize) -> Result<()> {
        let (number, all) = (self.next.0, end + TAG);
        self.next.0 += 1;
        self.sent[..4].copy_from_slice(&u32::try_from(all)?.to_le_bytes());
        self.sent[4..12].copy_from_slice(&number.to_le_bytes());
        if let Some(key) = &self.key {
            let (clear, rest) = self.sent[..all].split_at_mut(CLEAR);
            let (body, tag) = rest.split_at_mut(end - CLEAR);
            let aad = Aad::from(&clear[4..]);
            let Ok(sealed) = key.seal_in_place_separate_tag(nonce(self.side, number), aad, body)
            else {
                bail!("not sealed")
            };
            tag.copy_from_slice(sealed.as_ref());
        }
        let sent = send(&self.fd, &self.sent[..all], SendFlags::NOSIGNAL)?;
        ensure!(sent == all, "a short send");
        Ok(())
    }

    /// Receives a message; its length without the tag, or nothing at the end.
    fn receive(&mut self) -> Result<Option<usize>> {
        let (mut filled, mut all) = (0, 4);
        let since = Instant::now();
        while filled < all {
            let polls = self.wait == Wait::Spin && since.elapsed() < PATIENCE;
            let flags = if polls { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
            match recv(&self.fd, &mut self.received[filled..], flags) {
                Err(Errno::AGAIN) => continue,
                Err(Errno::CONNRESET) | Ok((0, _)) => return Ok(None),
                Ok((n, _)) => filled += n,
                Err(error) => return Err(error.into()),
            }
            if let Some(prefix) = self.received.first_chunk().filter(|_| filled >= 4) {
                all = u32::from_le_bytes(*prefix) as usize;
                ensure!((CLEAR + TAG..=ROOM).contains(&all), "a message of {all} bytes");
            }
        }
        let number = self.next.1;
        self.next.1 += 1;
        if let Some(key) = &self.key {
            let (clear, body) = self.received[..all].split_at_mut(CLEAR);
            let aad = Aad::from(&clear[4..]);
            ensure!(key.open_in_place(nonce(3 - self.side, number), aad, body).is_ok(), "forged");
        }
        Ok(Some(all - TAG))
    }

    /// Has a call made at the other end; `input` and `output` are its buffers.
    pub(crate) fn call(
        &mut self,
        number: u32,
        args: &[u64; 6],
        input: &[u8],
        output: &mut [u8],
    ) -> Result<i64> {
        let has_buffer = is_read(number) || is_write(number);
        self.sent[CLEAR] = u8::from(self.wait == Wait::Spin);
        self.sent[CLEAR + 8..CLEAR + 16].copy_from_slice(&u64::from(number).to_le_bytes());
        let room = &mut self.sent[CLEAR + 16..REQUEST];
        for (room, arg) in room.chunks_exact_mut(8).zip(args) {
            room.copy_from_slice(&arg.to_le_bytes());
        }
        let from = REQUEST + if has_buffer { BUFFER } else { 0 };
        self.sent[from..from + input.len()].copy_from_slice(input);
        self.send(from + input.len())?;
        let Some(end) = self.receive()? else { bail!("the other end is gone") };
        let result = word(&*self.received, CLEAR + 8).unwrap_or(0).cast_signed();
        let bytes = &self.received[REPLY.min(end)..end];
        ensure!(bytes.len() <= output.len(), "a reply longer than its buffer");
        output[..bytes.len()].copy_from_slice(bytes);
        Ok(result)
    }

    /// Has every call that comes made by `run`, until the connection ends.
    pub(crate) fn serve(mut self, mut run: impl FnMut(Call<'_>) -> Result<i64>) -> Result<()> {
        while let Some(end) = self.receive()? {
            let call = self.received[..end].split_at(REQUEST);
            let number = u32::try_from(word(call.0, CLEAR + 8).unwrap_or(0))?;
            let mut args = [0; 6];
            for (i, arg) in args.iter_mut().enumerate() {
                *arg = word(call.0, CLEAR + 16 + 8 * i).unwrap_or(0);
            }
            // What follows are bulk bytes, or a batch's end: wait as the caller does.
            self.wait = if call.0[CLEAR] == 1 { Wait::Spin } else { Wait::Block };
            let len = if is_read(number) { usize::try_from(args[2])? } else { 0 };
            ensure!(len <= MAX_SIZE, "a read of {len} bytes");
            let input = call.1.get(BUFFER..).unwrap_or(&[]);
            let output = &mut self.sent[REPLY..REPLY + len];
            let result = run(Call { number, args, input, output })?;
            self.sent[CLEAR + 8..REPLY].copy_from_slice(&result.to_le_bytes());
            self.send(REPLY + len)?;
        }
        Ok(())
    }
}
