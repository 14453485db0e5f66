//! The shared-memory carrier: two rings between two processes of one host.
//!
//! ```text
//! offer ──memfd over a unix socket──► accept
//!   │ ring 0 ──────── datagrams ────────►│
//!   │◄─────────────── datagrams ─ ring 1 │
//!   └──── the same socket: wake up, and "I am gone" ────┘
//! ```
//!
//! *Trust.* None in the other process: positions and lengths are checked when they are
//! read, payload is copied before it is opened, and the session authenticates it as if it
//! had come over a network. The file is sealed against changes of size. A peer that breaks
//! the rules ends the carrier.
//!
//! *Why a socket to wake by, and not an eventfd or a futex.* An eventfd's flags and count
//! belong to both sides, so the other could make our write block; a futex has no
//! descriptor to poll. The socket also says when the other process has gone.
//!
//! Invariants: nothing blocks but [`Carrier::wait`]; nobody is woken that does not sleep.
//!
//! Needs kernel 3.17 (`memfd_create(2)`, seals).

use super::streams::LONGEST;
use super::{Carrier, Guarantees, Incoming};
use crate::session::ways::stream_address;
use ring::{Hostile, Layout, Reader, Writer};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use sys::Mapping;

pub(crate) mod ring;
mod sys;

/// Words of data of one ring: 1 MiB, a full window of large payloads.
const WORDS: u64 = 128 * 1024;
const TOTAL: usize = 2 * Layout::total(WORDS);
/// What an offer says, beside the file.
const HELLO: [u8; 8] = *b"conetsm2";
/// How long the two wait for each other at the start.
const PATIENCE: Duration = Duration::from_secs(5);
/// Datagrams taken in one turn.
const BATCH: usize = 64;
/// Reads of the socket in one turn.
const RINGS: usize = 8;
/// Empty turns between two looks whether the other process is there.
const LOOK_EVERY: u32 = 1 << 16;

/// Where the peer of a shared-memory carrier is.
#[must_use]
pub const fn peer_address() -> SocketAddr {
    stream_address(u64::MAX)
}

/// Why no memory is shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// Memory could not be made, sealed or mapped.
    #[error("{0} for shared memory")]
    Memory(&'static str, #[source] io::Error),
    /// The unix socket failed, or the other side said nothing in 5 s.
    #[error("pass shared memory over the unix socket")]
    Socket(#[source] io::Error),
    /// The other side offered something else; its fault.
    #[error("the other side offered no sealed memory of the right size")]
    Offer,
}

/// Rings that are shared with one other process.
#[derive(Debug)]
pub struct Shared {
    memory: Mapping,
    writer: Writer,
    reader: Reader,
    /// To wake the other side, and to be woken.
    bell: UnixStream,
    room: Vec<u8>,
    is_unpublished: bool,
    empty_turns: u32,
}

impl Shared {
    /// Makes memory and offers it to the process at the other end of `bell`, which must
    /// [`accept`](Self::accept) it.
    ///
    /// # Errors
    ///
    /// [`ShareError`].
    pub fn offer(bell: UnixStream) -> Result<Self, ShareError> {
        let memory = |call| move |error: Errno| ShareError::Memory(call, error.into());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("conet-rings", flags).map_err(memory("memfd_create"))?;
        ftruncate(&file, TOTAL as u64 * 8).map_err(memory("ftruncate"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(memory("fcntl"))?;
        let mapping = Mapping::new(file.as_fd(), TOTAL).map_err(memory("mmap"))?;
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
        let sent = sendmsg(&bell, &[IoSlice::new(&HELLO)], &mut ancillary, SendFlags::NOSIGNAL);
        match sent {
            Ok(length) if length == HELLO.len() => Ok(Self::over(mapping, bell, 0)),
            // A stream socket that has just been made takes eight bytes.
            Ok(_) => Err(ShareError::Offer),
            Err(error) => Err(ShareError::Socket(error.into())),
        }
    }

    /// Takes the memory that the process at the other end of `bell` offers.
    ///
    /// # Errors
    ///
    /// [`ShareError`].
    pub fn accept(bell: UnixStream) -> Result<Self, ShareError> {
        bell.set_read_timeout(Some(PATIENCE)).map_err(ShareError::Socket)?;
        let mut hello = [0; HELLO.len()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut hello)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let until = std::time::Instant::now() + PATIENCE;
        let received = loop {
            match recvmsg(&bell, &mut into, &mut ancillary, flags) {
                // A signal; also one that stops the process for a while (`man 7 signal`).
                Err(Errno::INTR) if std::time::Instant::now() < until => {}
                received => break received,
            }
        };
        let received = received.map_err(|error| ShareError::Socket(error.into()))?;
        let mut files: Vec<OwnedFd> = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        let (1, Some(file)) = (files.len(), files.first()) else { return Err(ShareError::Offer) };
        if received.bytes != HELLO.len() || hello != HELLO {
            return Err(ShareError::Offer);
        }
        let mapping = match Mapping::new(file.as_fd(), TOTAL) {
            Ok(mapping) => mapping,
            Err(Errno::INVAL) => return Err(ShareError::Offer),
            Err(error) => return Err(ShareError::Memory("mmap", error.into())),
        };
        Ok(Self::over(mapping, bell, 1))
    }

    /// Writes ring `ours` and reads the other one.
    fn over(memory: Mapping, bell: UnixStream, ours: usize) -> Self {
        let layout = |ring: usize| Layout::new(ring * Layout::total(WORDS), WORDS);
        Self {
            memory,
            writer: Writer::new(layout(ours)),
            reader: Reader::new(layout(1 - ours)),
            bell,
            room: vec![0; LONGEST],
            is_unpublished: false,
            empty_turns: 0,
        }
    }

    /// Empties the socket of what woke us; an error where the other side has gone.
    fn silence(&self) -> io::Result<()> {
        let mut rings = [0; 256];
        // Who rings without end wakes us without end, but keeps us from nothing.
        for _ in 0..RINGS {
            match rustix::net::recv(&self.bell, &mut rings[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(io::ErrorKind::ConnectionReset.into()),
                Ok((_, length)) if length == rings.len() => {}
                Ok(_) | Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn broken(hostile: Hostile) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, hostile)
}

impl Carrier for Shared {
    fn guarantees(&self) -> Guarantees {
        Guarantees { datagram: LONGEST, reliable: true }
    }

    #[inline]
    fn send(&mut self, _to: SocketAddr, datagrams: &[u8], segment: usize) -> io::Result<()> {
        for datagram in datagrams.chunks(segment.max(1)).filter(|one| one.len() <= LONGEST) {
            // Without room it is lost, as everywhere.
            self.is_unpublished |= self.writer.push(&self.memory, datagram).map_err(broken)?;
        }
        Ok(())
    }

    #[inline]
    fn flush(&mut self) -> io::Result<()> {
        if core::mem::take(&mut self.is_unpublished) && self.writer.publish(&self.memory) {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.bell, &[1], flags) {
                // A full socket has bells enough in it.
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    #[inline]
    fn receive(&mut self, mut take: impl FnMut(Incoming<'_>) -> bool) -> io::Result<usize> {
        let (mut taken, from) = (0, peer_address());
        while taken < BATCH {
            let popped = self.reader.pop(&self.memory, &mut self.room).map_err(broken)?;
            let Some(length) = popped else { break };
            taken += 1;
            let bytes = self.room.get_mut(..length).unwrap_or_default();
            if !take(Incoming { from, bytes, marked: false }) {
                break;
            }
        }
        if taken > 0 {
            self.reader.release(&self.memory);
            self.empty_turns = 0;
        } else {
            self.empty_turns += 1;
            if self.empty_turns >= LOOK_EVERY {
                // Who spins hears no bell, and must not wait for the dead.
                self.empty_turns = 0;
                self.silence()?;
            }
        }
        Ok(taken)
    }

    fn wait(&mut self, most: Duration) -> io::Result<bool> {
        if !self.reader.may_sleep(&self.memory) {
            self.reader.is_awake(&self.memory);
            return Ok(true);
        }
        let rung = super::udp::wait_for(&mut [PollFd::new(&self.bell, PollFlags::IN)], most)?;
        self.reader.is_awake(&self.memory);
        if rung {
            self.silence()?;
        }
        Ok(rung)
    }
}

#[cfg(test)]
mod tests;
