//! The byte-stream carrier: connections over TCP and unix sockets, any number of them.
//!
//! ```text
//! dial ──► connecting ──► standing ◄── accepted, attached
//!              │             │  end, error, bad length, unused
//!              └──► closed ◄─┘
//! ```
//!
//! A connection has an address as [`crate::session::ways`] makes them, the same until it
//! ends; to the session it is a place where a peer may be. What is on a stream needs no
//! repeats, so the session waits longer before it repeats anything; when a stream ends,
//! what was on it is lost as any datagram.
//!
//! *Who may connect.* Anyone: the session finds out who it is. Until a peer is there a
//! connection is a stranger; there are [`MOST_STRANGERS`] of them, the oldest goes first,
//! and each goes after [`UNUSED`].
//!
//! Not here: which peer has which stream, when to dial ([`Fallback`](super::Fallback)).
//!
//! Invariants: nothing sleeps but [`Carrier::wait`]; memory per connection is bounded
//! (`framing`); one connection cannot keep others from being read; no file descriptor
//! outlives its connection.

use super::{Carrier, Guarantees, Incoming};
use crate::session::Hub;
use crate::session::ways::{stream_address, stream_number};
use crate::time::Instant;
pub(crate) use framing::LONGEST;
use framing::{Inbox, Outbox};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

mod framing;

/// Connections of nobody that are kept at once.
pub const MOST_STRANGERS: usize = 64;
/// How long an accepted connection is kept that no peer uses.
pub const UNUSED: Duration = Duration::from_secs(10);
/// Connections that are read without asking first which are ready.
const FEW: usize = 2;
/// Turns between two looks for new connections while the few are read.
const LOOK_EVERY: u32 = 64;
/// Connections accepted at a time, and events taken at a time.
const BATCH: usize = 64;
/// Bytes that wait before they are written without being asked.
const WRITE_AT: usize = 64 * 1024;
/// Numbers from here on are listeners'.
const LISTENERS: u64 = u64::MAX - 255;

/// Where a stream leads.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum StreamTarget {
    /// TCP, to this address and port.
    Tcp(SocketAddr),
    /// A unix socket at this path.
    Unix(PathBuf),
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StreamEvent {
    /// One that was dialled stands.
    Connected(SocketAddr),
    /// One that was dialled was refused, or timed out.
    Refused(SocketAddr),
    /// One that stood does so no more.
    Closed(SocketAddr),
}

#[derive(Debug)]
struct Connection {
    socket: Socket,
    inbox: Inbox,
    outbox: Outbox,
    is_connecting: bool,
    /// `epoll(7)` says that there is something to read.
    is_readable: bool,
    /// `epoll(7)` is asked to say when there is room to write.
    waits_to_write: bool,
    /// Accepted, and since when no peer has used it.
    unused_since: Option<Instant>,
    /// No peer uses it, as far as was seen last.
    is_stranger: bool,
}

/// A socket that takes connections.
#[derive(Debug)]
struct Listener {
    socket: Socket,
    /// Out of file descriptors: it is not listened to until some are free.
    is_paused: bool,
}

/// Connections, and sockets that take more of them.
#[derive(Debug)]
pub struct Streams {
    epoll: OwnedFd,
    connections: BTreeMap<u64, Connection>,
    listeners: Vec<Listener>,
    happened: VecDeque<StreamEvent>,
    newest: u64,
    /// The connection that was read last: the next one goes first.
    turn: u64,
    looks: u32,
    /// The epoll has something to say.
    is_woken: bool,
    /// Datagrams have come that nobody has taken.
    is_left_over: bool,
    /// Connections with something to write.
    to_flush: Vec<u64>,
    now: Instant,
}

impl Streams {
    /// Without connections.
    ///
    /// # Errors
    ///
    /// `epoll_create1(2)`.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            connections: BTreeMap::new(),
            listeners: Vec::new(),
            happened: VecDeque::new(),
            newest: 0,
            turn: 0,
            looks: 0,
            is_woken: true,
            is_left_over: false,
            to_flush: Vec::new(),
            now: Instant::START,
        })
    }

    /// Takes connections of a TCP socket.
    ///
    /// # Errors
    ///
    /// `fcntl(2)`, `epoll_ctl(2)`.
    pub fn listen_tcp(&mut self, listener: TcpListener) -> io::Result<()> {
        self.listen(Socket::from(listener))
    }

    /// Takes connections of a unix socket.
    ///
    /// # Errors
    ///
    /// As [`listen_tcp`](Self::listen_tcp).
    pub fn listen_unix(&mut self, listener: UnixListener) -> io::Result<()> {
        self.listen(Socket::from(listener))
    }

    fn listen(&mut self, socket: Socket) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let data = EventData::new_u64(LISTENERS + self.listeners.len() as u64);
        epoll::add(&self.epoll, &socket, data, EventFlags::IN)?;
        self.listeners.push(Listener { socket, is_paused: false });
        Ok(())
    }

    /// Takes over a TCP connection that stands; gives its address.
    ///
    /// # Errors
    ///
    /// As [`listen_tcp`](Self::listen_tcp).
    pub fn attach_tcp(&mut self, stream: TcpStream) -> io::Result<SocketAddr> {
        self.insert(Socket::from(stream), false, None)
    }

    /// Takes over a TCP connection that somebody made to us, as if it had come to a
    /// listener of ours.
    ///
    /// # Errors
    ///
    /// As [`listen_tcp`](Self::listen_tcp).
    pub fn accept_tcp(&mut self, stream: TcpStream) -> io::Result<()> {
        self.take_stranger(Socket::from(stream))
    }

    /// Takes over a unix connection that stands; gives its address.
    ///
    /// # Errors
    ///
    /// As [`listen_tcp`](Self::listen_tcp).
    pub fn attach_unix(&mut self, stream: UnixStream) -> io::Result<SocketAddr> {
        self.insert(Socket::from(stream), false, None)
    }

    /// Begins to connect; gives the connection's address, and its
    /// [`event`](Self::poll_event) later.
    ///
    /// # Errors
    ///
    /// `socket(2)`, `connect(2)` where it fails at once.
    pub fn dial(&mut self, target: &StreamTarget) -> io::Result<SocketAddr> {
        let (socket, address) = match target {
            StreamTarget::Tcp(address) => {
                let domain = Domain::for_address(*address);
                let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
                (socket, SockAddr::from(*address))
            }
            StreamTarget::Unix(path) => {
                (Socket::new(Domain::UNIX, Type::STREAM, None)?, unix(path)?)
            }
        };
        socket.set_nonblocking(true)?;
        let is_connecting = match socket.connect(&address) {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => true,
            Err(error) => return Err(error),
        };
        let stream = self.insert(socket, is_connecting, None)?;
        if !is_connecting {
            self.happened.push_back(StreamEvent::Connected(stream));
        }
        Ok(stream)
    }

    fn insert(
        &mut self,
        socket: Socket,
        is_connecting: bool,
        unused_since: Option<Instant>,
    ) -> io::Result<SocketAddr> {
        socket.set_nonblocking(true)?;
        // No unix socket has it, and slow is not broken.
        socket.set_tcp_nodelay(true).ok();
        self.newest += 1;
        let flags = if is_connecting { EventFlags::OUT } else { EventFlags::IN };
        epoll::add(&self.epoll, &socket, EventData::new_u64(self.newest), flags)?;
        let connection = Connection {
            socket,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            is_connecting,
            is_readable: false,
            waits_to_write: is_connecting,
            unused_since,
            is_stranger: unused_since.is_some(),
        };
        self.connections.insert(self.newest, connection);
        Ok(stream_address(self.newest))
    }

    /// Ends a connection, without an event.
    pub fn hang_up(&mut self, stream: SocketAddr) {
        if let Some(number) = stream_number(stream) {
            self.connections.remove(&number);
        }
    }

    /// How many connections there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Whether there is no connection.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Whether a turn without sleep would find anything but new connections.
    pub(super) fn is_quiet(&self) -> bool {
        self.connections.is_empty() && !self.is_woken
    }

    /// Whether there is more to take without sleeping.
    pub(super) const fn has_more(&self) -> bool {
        self.is_left_over || self.is_woken
    }

    /// Somebody has polled the descriptor, and it is readable.
    pub(crate) const fn on_woken(&mut self) {
        self.is_woken = true;
    }

    /// What became of a connection.
    pub fn poll_event(&mut self) -> Option<StreamEvent> {
        self.happened.pop_front()
    }

    /// Ends accepted connections that no peer uses; gives when to look again.
    pub(super) fn tidy(&mut self, now: Instant, hub: &Hub) -> Option<Instant> {
        self.now = now;
        let (mut next, mut gone) = (None::<Instant>, Vec::new());
        let are_accepted = self.connections.values().any(|one| one.unused_since.is_some());
        let used: BTreeSet<u64> =
            if are_accepted { hub.streams().collect() } else { BTreeSet::new() };
        for (&number, connection) in &mut self.connections {
            let Some(since) = &mut connection.unused_since else { continue };
            // Whose peer has gone elsewhere is one again.
            connection.is_stranger = !used.contains(&number);
            if !connection.is_stranger {
                *since = now;
            }
            let end = *since + UNUSED;
            if end <= now {
                gone.push(number);
            } else {
                next = Some(next.map_or(end, |next| next.min(end)));
            }
        }
        for number in gone {
            self.close(number);
        }
        for (n, listener) in self.listeners.iter_mut().enumerate().filter(|(_, l)| l.is_paused) {
            let data = EventData::new_u64(LISTENERS + n as u64);
            listener.is_paused =
                epoll::add(&self.epoll, &listener.socket, data, EventFlags::IN).is_err();
        }
        next
    }

    fn close(&mut self, number: u64) {
        if let Some(connection) = self.connections.remove(&number) {
            let address = stream_address(number);
            self.happened.push_back(if connection.is_connecting {
                StreamEvent::Refused(address)
            } else {
                StreamEvent::Closed(address)
            });
        }
    }

    /// Asks which sockets have something; takes new connections.
    fn look(&mut self) -> io::Result<()> {
        let mut events =
            [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; BATCH];
        let no_time = Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = match epoll::wait(&self.epoll, &mut events[..], Some(&no_time)) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        self.is_woken = count == BATCH;
        for event in events.iter().take(count) {
            let (number, flags) = (event.data.u64(), event.flags);
            if number >= LISTENERS {
                self.accept(usize::try_from(number - LISTENERS).unwrap_or(usize::MAX));
                continue;
            }
            let Some(connection) = self.connections.get_mut(&number) else { continue };
            if connection.is_connecting {
                self.on_connected(number);
                continue;
            }
            let ends = EventFlags::IN | EventFlags::HUP | EventFlags::ERR;
            connection.is_readable |= flags.intersects(ends);
            if flags.contains(EventFlags::OUT) {
                self.write(number);
            }
        }
        Ok(())
    }

    fn on_connected(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        if !matches!(connection.socket.take_error(), Ok(None)) {
            self.close(number);
            return;
        }
        connection.is_connecting = false;
        self.happened.push_back(StreamEvent::Connected(stream_address(number)));
        self.write(number);
    }

    fn accept(&mut self, at: usize) {
        for _ in 0..BATCH {
            let Some(listener) = self.listeners.get_mut(at) else { return };
            match listener.socket.accept() {
                Ok((socket, _)) => {
                    // Out of memory or watches: the connection is dropped.
                    self.take_stranger(socket).ok();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if is_exhaustion(&error) => {
                    // It would be ready for ever, and nothing could be done about it.
                    listener.is_paused = epoll::delete(&self.epoll, &listener.socket).is_ok();
                    return;
                }
                // It went before it was taken.
                Err(_) => {}
            }
        }
    }

    fn take_stranger(&mut self, socket: Socket) -> io::Result<()> {
        self.make_room();
        self.insert(socket, false, Some(self.now)).map(drop)
    }

    /// Before one more stranger comes, the oldest one too many goes.
    fn make_room(&mut self) {
        let strangers = || self.connections.iter().filter(|(_, connection)| connection.is_stranger);
        if strangers().count() >= MOST_STRANGERS
            && let Some((&oldest, _)) = strangers().next()
        {
            self.close(oldest);
        }
    }

    /// Writes what waits, as much as there is room for.
    fn write(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        if !connection.write() {
            self.close(number);
            return;
        }
        let waits = !connection.outbox.waiting().is_empty();
        if waits != connection.waits_to_write {
            let flags = if waits { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            let data = EventData::new_u64(number);
            if epoll::modify(&self.epoll, &connection.socket, data, flags).is_err() {
                self.close(number);
                return;
            }
            connection.waits_to_write = waits;
        }
    }

    /// Numbers of all connections, the one after the last served first.
    fn row(&self) -> impl Iterator<Item = u64> + use<> {
        let after = self.connections.range(self.turn + 1..).map(|(&number, _)| number);
        let upto = self.connections.range(..=self.turn).map(|(&number, _)| number);
        let few = self.connections.len() <= FEW;
        let (mut row, mut length) = ([0; BATCH], 0);
        let asks = |number: &u64| few || self.connections.get(number).is_some_and(Connection::asks);
        for (place, number) in row.iter_mut().zip(after.chain(upto).filter(asks)) {
            *place = number;
            length += 1;
        }
        row.into_iter().take(length)
    }
}

/// Out of file descriptors or memory (`man 2 accept`).
fn is_exhaustion(error: &io::Error) -> bool {
    let errors = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    error.raw_os_error().is_some_and(|raw| errors.iter().any(|one| one.raw_os_error() == raw))
}

fn unix(path: &Path) -> io::Result<SockAddr> {
    SockAddr::unix(path)
}

impl Connection {
    fn asks(&self) -> bool {
        self.is_readable || self.inbox.has_next()
    }

    /// Reads once; says whether the connection still stands.
    fn read(&mut self) -> bool {
        match rustix::net::recv(&self.socket, self.inbox.room(), RecvFlags::DONTWAIT) {
            Ok((_, 0)) => false,
            Ok((_, length)) => {
                self.inbox.on_filled(length);
                true
            }
            Err(Errno::AGAIN) => {
                self.is_readable = false;
                true
            }
            Err(Errno::INTR) => true,
            Err(_) => false,
        }
    }

    /// Writes until nothing waits or there is no room; says whether the connection still
    /// stands.
    fn write(&mut self) -> bool {
        if self.is_connecting {
            return true;
        }
        while !self.outbox.waiting().is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, self.outbox.waiting(), flags) {
                Ok(written) => self.outbox.on_written(written),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        true
    }
}

impl AsFd for Streams {
    /// Readable when [`receive`](Carrier::receive) may find something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Carrier for Streams {
    fn guarantees(&self) -> Guarantees {
        Guarantees { datagram: LONGEST, reliable: true }
    }

    fn send(&mut self, to: SocketAddr, datagrams: &[u8], segment: usize) -> io::Result<()> {
        let Some(number) = stream_number(to) else { return Ok(()) };
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        for datagram in datagrams.chunks(segment.max(1)) {
            // Without room it is lost, as everywhere.
            connection.outbox.push(datagram);
        }
        if connection.outbox.waiting().len() >= WRITE_AT {
            self.write(number);
        } else if !self.to_flush.contains(&number) {
            self.to_flush.push(number);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while let Some(number) = self.to_flush.pop() {
            self.write(number);
        }
        Ok(())
    }

    fn receive(&mut self, mut take: impl FnMut(Incoming<'_>) -> bool) -> io::Result<usize> {
        self.looks = self.looks.wrapping_add(1);
        let few = self.connections.len() <= FEW;
        if !few || self.is_woken || self.looks.is_multiple_of(LOOK_EVERY) {
            self.look()?;
        }
        let mut taken = 0;
        self.is_left_over = false;
        for number in self.row() {
            let Some(connection) = self.connections.get_mut(&number) else { continue };
            if connection.is_connecting {
                continue;
            }
            self.turn = number;
            // What has come before the end is still good.
            let stands = connection.inbox.has_next() || connection.read();
            let from = stream_address(number);
            let ended = loop {
                match connection.inbox.next() {
                    Ok(Some(bytes)) => {
                        taken += 1;
                        if !take(Incoming { from, bytes, marked: false }) {
                            self.is_left_over |= connection.inbox.has_next();
                            return Ok(taken);
                        }
                    }
                    Ok(None) => break !stands,
                    Err(_) => break true,
                }
            };
            if ended {
                self.close(number);
            }
        }
        Ok(taken)
    }

    fn wait(&mut self, most: Duration) -> io::Result<bool> {
        let most = if self.is_left_over { Duration::ZERO } else { most };
        let ready = super::udp::wait_for(&mut [PollFd::new(&self.epoll, PollFlags::IN)], most)?;
        self.is_woken |= ready;
        Ok(ready || self.is_left_over)
    }

    fn steer(&mut self, now: Instant, hub: &mut Hub) -> Option<Instant> {
        // Whoever owns the streams alone sees by itself that they end.
        self.happened.clear();
        self.tidy(now, hub)
    }
}

#[cfg(test)]
mod tests;
