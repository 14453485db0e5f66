//! Datagrams, and a stream where they are blocked.
//!
//! ```text
//! Hub ──► Fallback ─┬─ Udp ───────► the peer's address
//!           │       └─ Streams ───► the same peer, when nothing comes back by UDP
//!           └─ Ways: which
//! ```
//!
//! The session is one and the same: going over is a move of its, with all slots and
//! replies, and packets under way elsewhere still count. [`Ways`] decides, here it is done.
//!
//! Not here: what "blocked" means, framing.

use super::streams::StreamEvent;
use super::{Carrier, Guarantees, Incoming, StreamTarget, Streams, Udp};
use crate::session::handshake::PublicKey;
use crate::session::ways::{Want, Ways, stream_number};
use crate::session::{BulkPort, Hub, Scattered};
use crate::time::Instant;
use rustix::event::{PollFd, PollFlags};
use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::time::Duration;

/// Least time between two looks at all peers, unless a connection has changed.
const LOOK: Duration = Duration::from_millis(5);
/// Turns between two looks at the streams while there are datagrams.
const TURN: u32 = 8;
/// Turns between two looks for new connections while there are none.
const LOOK_EVERY: u32 = 64;

/// A UDP socket, and connections for those who cannot be reached by it.
#[derive(Debug)]
pub struct Fallback {
    udp: Udp,
    detour: Detour,
    turns: u32,
}

/// The streams of those who cannot be reached by datagrams; whoever drives a UDP socket
/// has it beside.
#[derive(Debug)]
pub(crate) struct Detour {
    pub(crate) streams: Streams,
    ways: Ways,
    targets: BTreeMap<PublicKey, StreamTarget>,
    /// Connections that were dialled, and for whom.
    dialled: BTreeMap<SocketAddr, PublicKey>,
    looked: Option<Instant>,
}

impl Fallback {
    /// Over `udp`; `streams` may listen.
    #[must_use]
    pub fn new(udp: Udp, streams: Streams) -> Self {
        Self { udp, detour: Detour::new(streams), turns: 0 }
    }

    /// A peer at `datagrams` takes streams at `target`. Whoever has no target waits for
    /// its peer to connect.
    pub fn add_peer(
        &mut self,
        now: Instant,
        key: PublicKey,
        datagrams: SocketAddr,
        target: StreamTarget,
    ) {
        self.detour.add_peer(now, key, datagrams, target);
    }

    /// The peer is not dialled any more.
    pub fn remove_peer(&mut self, key: &PublicKey) {
        self.detour.remove_peer(key);
    }

    /// The UDP socket.
    #[must_use]
    pub const fn udp(&self) -> &Udp {
        &self.udp
    }

    /// The connections.
    #[must_use]
    pub const fn streams(&self) -> &Streams {
        &self.detour.streams
    }

    /// Sleeps until a socket has something, that for bulk only if it is asked for.
    fn sleep(&mut self, most: Duration, with_bulk: bool) -> io::Result<bool> {
        if self.detour.streams.has_more() {
            return Ok(true);
        }
        let calls = PollFd::new(self.udp.socket(), PollFlags::IN);
        let streams = PollFd::new(&self.detour.streams, PollFlags::IN);
        let bulk = self.udp.bulk_socket().filter(|_| with_bulk);
        let (ready, is_stream) = match bulk {
            Some(bulk) => {
                let mut fds = [streams, calls, PollFd::new(bulk.socket(), PollFlags::IN)];
                (super::udp::wait_for(&mut fds, most)?, !fds[0].revents().is_empty())
            }
            None => {
                let mut fds = [streams, calls];
                (super::udp::wait_for(&mut fds, most)?, !fds[0].revents().is_empty())
            }
        };
        if is_stream {
            self.detour.streams.on_woken();
        }
        Ok(ready)
    }
}

impl Detour {
    pub(crate) fn new(streams: Streams) -> Self {
        Self {
            streams,
            ways: Ways::default(),
            targets: BTreeMap::new(),
            dialled: BTreeMap::new(),
            looked: None,
        }
    }

    /// A peer at `datagrams` takes streams at `target`. Whoever has no target waits for
    /// its peer to connect.
    pub(crate) fn add_peer(
        &mut self,
        now: Instant,
        key: PublicKey,
        datagrams: SocketAddr,
        target: StreamTarget,
    ) {
        self.ways.add(now, key, datagrams);
        self.targets.insert(key, target);
        self.looked = None;
    }

    /// The peer is not dialled any more.
    pub(crate) fn remove_peer(&mut self, key: &PublicKey) {
        self.ways.remove(key);
        self.targets.remove(key);
        self.hang_up(key);
    }

    fn dial(&mut self, now: Instant, key: PublicKey) {
        let dialled = self.targets.get(&key).map(|target| self.streams.dial(target));
        match dialled {
            Some(Ok(stream)) => drop(self.dialled.insert(stream, key)),
            // Refused at once; it is tried again later.
            Some(Err(_)) | None => self.ways.on_refused(now, &key),
        }
    }

    fn hang_up(&mut self, key: &PublicKey) {
        self.dialled.retain(|stream, whose| {
            if whose == key {
                self.streams.hang_up(*stream);
            }
            whose != key
        });
    }

    fn on_event(&mut self, now: Instant, event: StreamEvent, hub: &mut Hub) {
        match event {
            StreamEvent::Connected(stream) => {
                if let Some(key) = self.dialled.get(&stream) {
                    self.ways.on_connected(key, stream);
                }
            }
            StreamEvent::Refused(stream) => {
                if let Some(key) = self.dialled.remove(&stream) {
                    self.ways.on_refused(now, &key);
                }
            }
            StreamEvent::Closed(stream) => {
                self.dialled.remove(&stream);
                self.ways.on_closed(now, stream, hub);
            }
        }
    }

    /// Sends each peer the way that it can be reached; gives when to look again.
    pub(crate) fn steer(&mut self, now: Instant, hub: &mut Hub) -> Option<Instant> {
        let mut changed = false;
        while let Some(event) = self.streams.poll_event() {
            changed = true;
            self.on_event(now, event, hub);
        }
        if let Some(next) = self.looked.map(|looked| looked + LOOK)
            && !changed
            && now < next
        {
            // What has changed since, the next look finds.
            return Some(next);
        }
        self.looked = Some(now);
        while let Some(want) = self.ways.poll(now, hub) {
            match want {
                Want::Dial(key) => self.dial(now, key),
                Want::HangUp(key) => self.hang_up(&key),
            }
        }
        let tidy = self.streams.tidy(now, hub);
        [self.ways.poll_timeout(now, hub), tidy].into_iter().flatten().min()
    }
}

impl Carrier for Fallback {
    fn guarantees(&self) -> Guarantees {
        self.udp.guarantees()
    }

    #[inline]
    fn send(&mut self, to: SocketAddr, datagrams: &[u8], segment: usize) -> io::Result<()> {
        if stream_number(to).is_some() {
            self.detour.streams.send(to, datagrams, segment)
        } else {
            self.udp.send(to, datagrams, segment)
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.detour.streams.flush()?;
        self.udp.flush()
    }

    #[inline]
    fn receive(&mut self, mut take: impl FnMut(Incoming<'_>) -> bool) -> io::Result<usize> {
        let mut more = true;
        let mut keep = |incoming: Incoming<'_>| {
            more = take(incoming);
            more
        };
        let taken = self.udp.receive(&mut keep)?;
        self.turns = self.turns.wrapping_add(1);
        // Datagrams that never end must not keep streams from being read.
        let is_their_turn = self.turns.is_multiple_of(TURN);
        if (!more && !is_their_turn)
            || (self.detour.streams.is_quiet() && !self.turns.is_multiple_of(LOOK_EVERY))
        {
            return Ok(taken);
        }
        Ok(taken + self.detour.streams.receive(take)?)
    }

    fn wait(&mut self, most: Duration) -> io::Result<bool> {
        self.sleep(most, false)
    }

    fn bulk(&self) -> Option<BulkPort> {
        self.udp.bulk()
    }

    fn bulk_batch(&self) -> usize {
        self.udp.bulk_batch()
    }

    fn send_bulk(&mut self, to: SocketAddr, datagrams: &[u8], segment: usize) -> io::Result<bool> {
        self.udp.send_bulk(to, datagrams, segment)
    }

    fn gathers(&self) -> bool {
        self.udp.gathers()
    }

    fn send_parts(
        &mut self,
        to: SocketAddr,
        parts: &[IoSlice<'_>],
        segment: usize,
    ) -> io::Result<bool> {
        self.udp.send_parts(to, parts, segment)
    }

    fn scatters(&self) -> bool {
        self.udp.scatters()
    }

    fn receive_parts(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<Option<Scattered>> {
        self.udp.receive_parts(parts)
    }

    fn receive_bulk(&mut self, take: impl FnMut(Incoming<'_>)) -> io::Result<usize> {
        self.udp.receive_bulk(take)
    }

    fn wait_for_either(&mut self, most: Duration) -> io::Result<bool> {
        self.sleep(most, true)
    }

    fn steer(&mut self, now: Instant, hub: &mut Hub) -> Option<Instant> {
        self.detour.steer(now, hub)
    }
}
