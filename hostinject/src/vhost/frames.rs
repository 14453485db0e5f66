//! A card by frames on a unix socket, for VMMs that have no virtqueue to share.
//!
//! | transport | of | framing |
//! |---|---|---|
//! | `stream` | QEMU, `-netdev stream` | a length of four bytes, big-endian, and a frame; SOCK_STREAM |
//! | `bess` | User-Mode Linux, `vec0:transport=bess` | a frame a message; SOCK_SEQPACKET |
//!
//! ```text
//! guest ─ VMM ─ socket ─► frame ─ judged, as of a virtqueue ([`Card`]) ─► TUN
//! guest ─ VMM ◄─ socket ── as many frames as wait, in one write ◄──────── TUN
//! ```
//!
//! Neither transport has a header for offloads, so the host's kernel splits segments and
//! completes checksums before. Where the VMM does not read, nothing is taken from the
//! device: its queue, which is bounded, drops.
//!
//! Invariants: a frame is judged from a copy of ours; a length that no frame has ends the
//! connection, since what follows cannot be told from it; what a VMM says, and what it does
//! not read, costs bounded memory.
//!
//! Thread: the one that serves the guest; it sleeps in one `poll`.
//!
//! Sources: QEMU `net/stream.c`; Linux `Documentation/virt/uml/user_mode_linux_howto_v2.rst`.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, listen,
    recv, send, socket_with,
};
use rustix::process::umask;

use super::net::{Card, LONGEST_FRAME, NetError};
use crate::services::ADVERT_INTERVAL;

/// How a guest's VMM reaches its port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Virtqueues in the guest's memory: QEMU, User-Mode Linux.
    Vhost,
    /// Frames in a stream: QEMU.
    Stream,
    /// Frames as messages: User-Mode Linux.
    Bess,
}

impl Transport {
    /// Every transport; a port serves all, and one VMM at a time.
    pub const ALL: [Self; 3] = [Self::Vhost, Self::Stream, Self::Bess];

    /// Its name, as commands have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vhost => "vhost",
            Self::Stream => "stream",
            Self::Bess => "bess",
        }
    }

    /// The socket of this transport, given that of any other of the same port.
    #[must_use]
    pub fn socket(self, beside: &Path) -> PathBuf {
        beside.with_extension(self.as_str())
    }

    /// Connects to a socket of this transport, as a VMM does.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn connect(self, path: &Path) -> io::Result<OwnedFd> {
        let socket = self.open()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    }

    fn open(self) -> io::Result<OwnedFd> {
        let kind = match self {
            Self::Bess => SocketType::SEQPACKET,
            Self::Vhost | Self::Stream => SocketType::STREAM,
        };
        Ok(socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?)
    }

    /// Binds a socket of this transport, for the owner alone. It touches the process's
    /// umask, so nobody else is to make files meanwhile.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn bind(self, path: &Path) -> io::Result<UnixListener> {
        let socket = self.open()?;
        let address = SocketAddrUnix::new(path)?;
        let before = umask(Mode::from_raw_mode(0o077));
        let bound = bind(&socket, &address);
        umask(before);
        bound?;
        listen(&socket, 1)?;
        Ok(socket.into())
    }
}

/// Bytes before a frame of a stream.
const LENGTH: usize = 4;
/// Of one turn of one direction.
const TURN: usize = 64;
/// Room for the longest frame, and enough beside it for a turn's worth of usual ones.
const ROOM: usize = 2 * (LENGTH + LONGEST_FRAME);

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum FramesError {
    /// The VMM said a length that no frame has.
    #[error("the guest's VMM announced a frame of {0} bytes")]
    Length(u32),
    /// It is gone, or its socket failed.
    #[error("the guest's VMM: {0}")]
    Socket(#[source] io::Error),
    /// The host's end failed.
    #[error(transparent)]
    Card(#[from] NetError),
}

impl From<Errno> for FramesError {
    fn from(error: Errno) -> Self {
        Self::Socket(error.into())
    }
}

/// One VMM.
struct Peer<'a> {
    socket: &'a OwnedFd,
    is_stream: bool,
    input: Box<[u8]>,
    /// Bytes of the input that are not a whole frame yet.
    filled: usize,
    output: Vec<u8>,
    /// Bytes of the output that are sent.
    sent: usize,
}

/// Serves one VMM until it goes; `again` is readable when the card has been told something.
///
/// # Errors
/// [`FramesError`]: it said what it should not, or the host's device is gone.
pub(super) fn serve(
    socket: &OwnedFd,
    transport: Transport,
    card: &mut Card,
    device: &File,
    again: &OwnedFd,
) -> Result<(), FramesError> {
    let mut advert = Instant::now() + ADVERT_INTERVAL;
    let mut peer = Peer {
        socket,
        is_stream: transport == Transport::Stream,
        input: vec![0; ROOM].into_boxed_slice(),
        filled: 0,
        output: Vec::with_capacity(ROOM),
        sent: 0,
    };
    // Of a hold that began before, and of what was kept meanwhile.
    card.attend();
    let mut is_told = true;
    loop {
        let now = Instant::now();
        if advert <= now {
            advert = now + ADVERT_INTERVAL;
            card.advertise();
        }
        let (mut of_socket, mut of_device) = (PollFlags::IN, PollFlags::IN);
        if !peer.is_flushed() {
            of_socket |= PollFlags::OUT;
            of_device = PollFlags::empty();
        } else if card.is_held() {
            // Whoever holds it empties the device.
            of_device = PollFlags::empty();
        }
        let mut fds = [
            PollFd::new(socket, of_socket),
            PollFd::new(device, of_device),
            PollFd::new(again, PollFlags::IN),
        ];
        // Who does not read is waited for, whatever there is to say.
        let is_due = peer.is_flushed() && (is_told || card.has_answer());
        let wait = if is_due { Duration::ZERO } else { advert - now };
        match poll(&mut fds, Timespec::try_from(wait).ok().as_ref()) {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        let [of_socket, of_device, told] = fds.map(|fd| fd.revents());
        if !told.is_empty() {
            // Its count; there is nothing else to read.
            rustix::io::read(again, &mut [0; 8]).ok();
            card.attend();
            is_told = true;
        }
        if of_socket.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
            && !peer.take(card)?
        {
            return Ok(());
        }
        let is_due = !of_device.is_empty() || of_socket.contains(PollFlags::OUT);
        if is_due || card.has_answer() || is_told {
            peer.give(card)?;
            is_told = false;
        }
    }
}

impl Peer<'_> {
    /// Takes what the guest sends; false when the VMM has gone.
    fn take(&mut self, card: &mut Card) -> Result<bool, FramesError> {
        if self.is_stream {
            let Some(got) = self.receive(self.filled)? else { return Ok(true) };
            self.filled += got;
            return Ok(got > 0 && self.take_stream(card).map(|()| true)?);
        }
        for _ in 0..TURN {
            let Some(len) = self.receive(0)? else { return Ok(true) };
            if len == 0 {
                return Ok(false);
            }
            // Longer than the room is cut off by the socket, and too long still.
            card.take_frame(self.input.get(..len).unwrap_or_default())?;
        }
        Ok(true)
    }

    /// Reads behind what is there; none where there is nothing now, zero at the end.
    fn receive(&mut self, from: usize) -> Result<Option<usize>, FramesError> {
        let room = self.input.get_mut(from..).unwrap_or_default();
        loop {
            return match recv(self.socket, &mut *room, RecvFlags::DONTWAIT) {
                Ok((got, _)) => Ok(Some(got)),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Ok(None),
                // It ended without reading what it was given.
                Err(Errno::CONNRESET) => Ok(Some(0)),
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Every whole frame of the input.
    fn take_stream(&mut self, card: &mut Card) -> Result<(), FramesError> {
        let mut at = 0;
        while let Some(head) = self.input.get(at..self.filled).and_then(<[u8]>::first_chunk) {
            let announced = u32::from_be_bytes(*head);
            let len = usize::try_from(announced).unwrap_or(usize::MAX);
            if !(1..=LONGEST_FRAME).contains(&len) {
                return Err(FramesError::Length(announced));
            }
            let begin = at + LENGTH;
            let Some(frame) =
                self.input.get(begin..begin + len).filter(|_| begin + len <= self.filled)
            else {
                break;
            };
            card.take_frame(frame)?;
            at = begin + len;
        }
        // The rest is shorter than the longest frame, so there is always room behind it.
        self.input.copy_within(at..self.filled, 0);
        self.filled -= at;
        Ok(())
    }

    fn is_flushed(&self) -> bool {
        self.sent == self.output.len()
    }

    /// Gives the guest what is for it, as far as its VMM takes it.
    fn give(&mut self, card: &mut Card) -> Result<(), FramesError> {
        for _ in 0..TURN {
            if !self.flush()? {
                return Ok(());
            }
            self.output.clear();
            self.sent = 0;
            while self.output.len() < ROOM / 2 {
                let Some(frame) = card.next_frame()? else { break };
                if self.is_stream {
                    let len = u32::try_from(frame.len()).unwrap_or(0);
                    self.output.extend(len.to_be_bytes());
                }
                self.output.extend(frame);
                if !self.is_stream {
                    break;
                }
            }
            if self.output.is_empty() {
                return Ok(());
            }
        }
        self.flush().map(drop)
    }

    /// Sends what is left of the output; whether all of it went.
    fn flush(&mut self) -> Result<bool, FramesError> {
        while let Some(rest @ [_, ..]) = self.output.get(self.sent..) {
            match send(self.socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => self.sent += sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => return Ok(false),
                // Its end is read next.
                Err(Errno::PIPE | Errno::CONNRESET) => self.sent = self.output.len(),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}
