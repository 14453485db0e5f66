//! All peers of one node behind one address: the sans-IO core that a driver drives.
//!
//! ```text
//! handle_datagram ─┐                        ┌─► poll_transmit  (datagram, address)
//! call, reply ─────┼─► Hub ─► one Peer each ┼─► poll_event
//! handle_timeout ──┘                        └─► poll_timeout
//! ```
//!
//! After every input the driver sends all that [`Hub::poll_transmit`] gives, takes
//! all that [`Hub::poll_event`] gives, and sleeps until [`Hub::poll_timeout`].
//!
//! A datagram finds its peer by the index in its header, an initiation by the key
//! that it proves. Only peers that were added exist; whatever comes from others is
//! counted and forgotten, and leaves no state behind.
//!
//! Payloads are buffers that change hands. Who takes them by [`Hub::buffer`] and gives
//! them back by [`Hub::recycle`] makes calls that allocate nothing.
//!
//! Invariants: no datagram panics; memory is bounded by peers × [`Limits`] and, where calls and
//! replies are longer than a packet, by [`Limits::unanswered_by_all`]; nothing
//! is sent to an address but to a configured one or one that an authenticated
//! packet came from, and cookies to those that initiations came from.

use super::budget::Total;
use super::bulk::BulkPort;
use super::client::{CallError, CallId, NotTaken};
use super::gate::Gate;
use super::handshake::{Entropy, HandshakeError, PrivateKey, PublicKey};
use super::limits::Limits;
use super::path::Tokens;
use super::peer::{DownReason, Peer, PeerStatus};
use super::server::{IncomingId, ReplyError};
use super::timers::Timers;
use crate::time::Instant;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use conet_wire::session::frame::{Lane, Status};
use core::fmt;
use core::net::SocketAddr;
use core::time::Duration;
pub(crate) use find::Find;
use moves::Tomb;
use table::Table;

mod due;
mod find;
mod input;
mod moves;
mod output;
mod places;
mod table;
mod ways;

pub use moves::{FreezeError, Frozen, Thawed};
pub use output::{BATCH_BUFFER, MOST_PARTS, Transmit};
pub use places::{MOST_AROUND, Place, Scattered};

/// What a hub starts with.
pub struct HubConfig {
    /// Our identity.
    pub private_key: PrivateKey,
    /// Bounds, the same for every peer.
    pub limits: Limits,
    /// Wall-clock time of [`Instant::START`], since the UNIX epoch. Peers refuse
    /// initiations that are not newer than the last: where it has gone back between two
    /// starts, a session begins only when the peer begins it, which it does once it has missed
    /// this end for [`Limits::dead_after`] and knows an address. Sessions that are thawed go
    /// on from their image's time.
    pub started: Duration,
    /// Features to offer; [`local_features`](super::handshake::local_features) unless a
    /// test wants less, or both owners want packets in clear.
    pub features: u32,
    /// Where randomness comes from.
    pub entropy: Box<dyn Entropy>,
}

impl fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubConfig").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// What happened.
#[derive(Debug, Eq, PartialEq)]
pub enum Event {
    /// A session with the peer stands.
    Up(PublicKey),
    /// It stands no more. Calls that were on their way have ended.
    Down(PublicKey, DownReason),
    /// The peer calls: answer with [`Hub::reply`] or [`Hub::refuse`].
    Call {
        /// Who calls.
        peer: PublicKey,
        /// To answer with.
        id: IncomingId,
        /// How urgent it is; its reply is as urgent.
        lane: Lane,
        /// What it says.
        payload: Vec<u8>,
        /// In a row: the result of the call before it.
        argument: Option<Vec<u8>>,
    },
    /// The peer no longer waits for this call, which must still be answered.
    Cancelled {
        /// Who called.
        peer: PublicKey,
        /// Which call.
        id: IncomingId,
    },
    /// A call of ours has ended; comes exactly once per call.
    Ended {
        /// Who was called.
        peer: PublicKey,
        /// Which call.
        call: CallId,
        /// The reply, or why there is none.
        result: Result<Vec<u8>, CallError>,
    },
}

/// No peer with this key was added; the caller's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("no such peer")]
pub struct UnknownPeer;

/// Datagrams that belong to no peer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Strays {
    /// No packet of this protocol.
    pub malformed: u64,
    /// Initiations of another version of this protocol.
    pub other_version: u64,
    /// An index that nobody has.
    pub unknown_index: u64,
    /// Initiations that were not made for us.
    pub forged: u64,
    /// Initiations by keys that were not added.
    pub unknown_key: u64,
    /// Initiations that were asked for a cookie, or dropped, in a time of many.
    pub turned_away: u64,
}

/// All peers of one node.
pub struct Hub {
    private_key: PrivateKey,
    public_key: PublicKey,
    limits: Limits,
    features: u32,
    incarnation: u64,
    newest_counter: u64,
    entropy: Box<dyn Entropy>,
    tokens: Tokens,
    gate: Gate,
    peers: Vec<Option<Peer>>,
    keys: BTreeMap<PublicKey, usize>,
    /// Who was named last, and most often is again.
    last: usize,
    indices: Table,
    tombs: Vec<Tomb>,
    /// Whose initiation has which digest; some of earlier ones as well. Anybody can send a
    /// cookie, which names one.
    asked: BTreeMap<u64, usize>,
    /// Cookies and MOVED packets.
    asides: VecDeque<(SocketAddr, Vec<u8>)>,
    ready: VecDeque<usize>,
    /// Peers that are asked for their deadlines, and the deadlines of the others.
    awake: Vec<usize>,
    due: Timers<usize>,
    /// Peers with pieces that were to wait for the next batch.
    held: VecDeque<usize>,
    /// Peers to which something has happened: their events stay with them until they are
    /// polled.
    eventful: VecDeque<usize>,
    /// Of peers that are here no more.
    events: VecDeque<Event>,
    /// Questions about peers, and answers, with who said them.
    finds: VecDeque<(usize, Find)>,
    /// The peer that was asked last where another is.
    last_asked: usize,
    strays: Strays,
    bulk: Option<BulkPort>,
    bulk_expected: Instant,
    /// What all peers make us keep.
    total: Arc<Total>,
    /// The peer that was sent something last.
    in_parts: usize,
    places: places::Places,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("public_key", &self.public_key)
            .field("peers", &self.keys.len())
            .field("strays", &self.strays)
            .finish_non_exhaustive()
    }
}

impl Hub {
    /// A hub without peers.
    ///
    /// # Errors
    ///
    /// [`HandshakeError::Entropy`] if there is no randomness for an incarnation.
    pub fn new(config: HubConfig) -> Result<Self, HandshakeError> {
        let HubConfig { private_key, limits, started, features, mut entropy } = config;
        let mut incarnation = [0; 8];
        entropy.fill(&mut incarnation)?;
        let mut secret = [0; 32];
        entropy.fill(&mut secret)?;
        Ok(Self {
            public_key: private_key.public(),
            private_key,
            limits: limits.clamped(),
            features,
            incarnation: u64::from_le_bytes(incarnation),
            newest_counter: u64::try_from(started.as_nanos()).unwrap_or(u64::MAX / 2),
            tokens: Tokens::new(&secret),
            gate: Gate::new(&mut *entropy)?,
            entropy,
            peers: Vec::new(),
            keys: BTreeMap::new(),
            last: 0,
            indices: Table::default(),
            tombs: Vec::new(),
            asked: BTreeMap::new(),
            asides: VecDeque::new(),
            ready: VecDeque::new(),
            awake: Vec::new(),
            due: Timers::new(),
            held: VecDeque::new(),
            eventful: VecDeque::new(),
            events: VecDeque::new(),
            finds: VecDeque::new(),
            last_asked: 0,
            strays: Strays::default(),
            bulk: None,
            bulk_expected: Instant::START,
            total: Total::new(limits.unanswered_by_all),
            in_parts: 0,
            places: places::Places::default(),
        })
    }

    /// Our key.
    #[must_use]
    pub const fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// Datagrams that belonged to no peer.
    #[must_use]
    pub const fn strays(&self) -> Strays {
        self.strays
    }

    /// Allows a peer. With an address it is connected to and kept connected; without
    /// one it is waited for. Adding it again changes only its address.
    pub fn add_peer(&mut self, now: Instant, key: PublicKey, address: Option<SocketAddr>) {
        if let Some(&at) = self.keys.get(&key) {
            if let (Some(Some(peer)), Some(address)) = (self.peers.get_mut(at), address) {
                peer.set_address(now, address);
            }
            self.touch(at);
        } else {
            self.bury_none(&key);
            self.insert(Peer::new(now, key, address, self.limits, self.incarnation));
            // Whoever is removed and added again has forgotten what ran: the peer must not go on
            // as if it had not. The first number came by chance; the next ones are as new.
            self.incarnation = self.incarnation.wrapping_add(1);
        }
    }

    fn insert(&mut self, mut peer: Peer) {
        peer.set_bulk(self.bulk);
        peer.share(&self.total);
        let key = peer.key();
        let free = self.peers.iter().position(Option::is_none);
        let at = free.unwrap_or(self.peers.len());
        if at == self.peers.len() {
            self.peers.push(None);
        }
        if let Some(place) = self.peers.get_mut(at) {
            *place = Some(peer);
        }
        self.keys.insert(key, at);
        self.touch(at);
    }

    /// Forgets a peer. Its calls end without an event.
    ///
    /// # Errors
    ///
    /// [`UnknownPeer`].
    pub fn remove_peer(&mut self, key: &PublicKey) -> Result<(), UnknownPeer> {
        self.take_peer(key).map(drop)
    }

    fn take_peer(&mut self, key: &PublicKey) -> Result<Peer, UnknownPeer> {
        let at = self.keys.remove(key).ok_or(UnknownPeer)?;
        let mut peer = self.peers.get_mut(at).and_then(Option::take).ok_or(UnknownPeer)?;
        self.events.extend(core::iter::from_fn(|| peer.poll_event()));
        self.eventful.retain(|&eventful| eventful != at);
        self.ready.retain(|&ready| ready != at);
        self.awake.retain(|&awake| awake != at);
        self.held.retain(|&held| held != at);
        for index in peer.indices().chain(peer.retired.iter().copied()) {
            self.indices.remove(index);
        }
        Ok(peer)
    }

    /// Snapshots of all peers, by key.
    pub fn status(&self, now: Instant) -> impl Iterator<Item = PeerStatus> {
        let peers = self.keys.values().filter_map(|&at| self.peers.get(at)?.as_ref());
        peers.map(move |peer| peer.status(now))
    }

    /// Calls a peer on [`Lane::Calls`]. The outcome comes as [`Event::Ended`], at
    /// `deadline` at the latest; a call to a peer that is not up waits for it.
    ///
    /// # Errors
    ///
    /// [`CallRefused`].
    pub fn call(
        &mut self,
        now: Instant,
        peer: &PublicKey,
        payload: Vec<u8>,
        deadline: Option<Instant>,
    ) -> Result<CallId, CallRefused> {
        self.call_on(now, peer, Lane::Calls, payload, deadline)
    }

    /// As [`call`](Self::call), on a lane.
    ///
    /// # Errors
    ///
    /// [`CallRefused`].
    pub fn call_on(
        &mut self,
        now: Instant,
        peer: &PublicKey,
        lane: Lane,
        payload: Vec<u8>,
        deadline: Option<Instant>,
    ) -> Result<CallId, CallRefused> {
        let (at, peer) = self.peer(peer)?;
        let id = peer.call(now, lane, payload, deadline)?;
        self.queue(at);
        Ok(id)
    }

    /// Calls a peer in a row: each call has the result of the one before as an argument,
    /// and all go at once. With `true` a call runs also when the one before it was
    /// answered by [`Hub::reply_and_stop`]; otherwise it and those behind it end as
    /// [`CallError::Aborted`]. A result is an argument only while it fits a packet.
    ///
    /// # Errors
    ///
    /// [`CallRefused`]; then none of the row was taken.
    pub fn call_row(
        &mut self,
        now: Instant,
        peer: &PublicKey,
        lane: Lane,
        row: impl ExactSizeIterator<Item = (Vec<u8>, bool)>,
        deadline: Option<Instant>,
        ids: &mut Vec<CallId>,
    ) -> Result<(), CallRefused> {
        let (at, peer) = self.peer(peer)?;
        peer.call_row(now, lane, row, deadline, ids)?;
        self.queue(at);
        Ok(())
    }

    /// Gives a call up; it ends at once, and the peer is told.
    ///
    /// # Errors
    ///
    /// [`UnknownPeer`].
    pub fn cancel(
        &mut self,
        now: Instant,
        peer: &PublicKey,
        call: CallId,
    ) -> Result<(), UnknownPeer> {
        let (at, peer) = self.peer(peer)?;
        peer.cancel(now, call);
        self.queue(at);
        Ok(())
    }

    /// Answers a call.
    ///
    /// # Errors
    ///
    /// [`ReplyFailed`]; after [`ReplyError::TooLong`] the call still waits.
    pub fn reply(
        &mut self,
        peer: &PublicKey,
        id: IncomingId,
        payload: Vec<u8>,
    ) -> Result<(), ReplyFailed> {
        self.answer(peer, id, Status::Done, payload)
    }

    /// Answers a call that did not go well: to its caller this is a reply as any other,
    /// but calls of its row that want a good one do not run.
    ///
    /// # Errors
    ///
    /// As [`reply`](Self::reply).
    pub fn reply_and_stop(
        &mut self,
        peer: &PublicKey,
        id: IncomingId,
        payload: Vec<u8>,
    ) -> Result<(), ReplyFailed> {
        self.answer(peer, id, Status::Stopped, payload)
    }

    /// Answers a call that was not run and will not be.
    ///
    /// # Errors
    ///
    /// [`ReplyFailed`].
    pub fn refuse(&mut self, peer: &PublicKey, id: IncomingId) -> Result<(), ReplyFailed> {
        self.answer(peer, id, Status::Refused, Vec::new())
    }

    /// Answers a call of which nobody knows any more whether it ran: after a thaw whose
    /// image was older than the process. It ends as [`CallError::Unknown`].
    ///
    /// # Errors
    ///
    /// [`ReplyFailed`].
    pub fn disown(&mut self, peer: &PublicKey, id: IncomingId) -> Result<(), ReplyFailed> {
        self.answer(peer, id, Status::Lost, Vec::new())
    }

    fn answer(
        &mut self,
        peer: &PublicKey,
        id: IncomingId,
        status: Status,
        payload: Vec<u8>,
    ) -> Result<(), ReplyFailed> {
        let (at, peer) = self.peer(peer)?;
        peer.reply(id, status, payload)?;
        self.queue(at);
        Ok(())
    }

    /// An empty buffer with room for `length` bytes, one that was used before if there
    /// is one.
    pub fn buffer(&mut self, peer: &PublicKey, length: usize) -> Vec<u8> {
        match self.peer(peer) {
            Ok((_, peer)) => peer.buffer(length),
            Err(UnknownPeer) => Vec::with_capacity(length),
        }
    }

    /// A buffer of `length` bytes for who overwrites all of it: what an earlier payload to
    /// or from this peer has left in it is still there.
    #[inline]
    pub fn used_buffer(&mut self, peer: &PublicKey, length: usize) -> Vec<u8> {
        match self.peer(peer) {
            Ok((_, peer)) => peer.used_buffer(length),
            Err(UnknownPeer) => vec![0; length],
        }
    }

    /// Takes a payload back that nobody needs.
    #[inline]
    pub fn recycle(&mut self, peer: &PublicKey, buffer: Vec<u8>) {
        if let Ok((_, peer)) = self.peer(peer) {
            peer.recycle(buffer);
        }
    }

    #[inline]
    fn peer(&mut self, key: &PublicKey) -> Result<(usize, &mut Peer), UnknownPeer> {
        let is_same = |peer: &Option<Peer>| peer.as_ref().is_some_and(|peer| peer.has_key(key));
        if !self.peers.get(self.last).is_some_and(is_same) {
            self.last = self.find(key)?;
        }
        let peer = self.peers.get_mut(self.last).and_then(Option::as_mut).ok_or(UnknownPeer)?;
        Ok((self.last, peer))
    }

    // Apart, as all that a call seldom needs: what calls nothing saves no registers.
    #[cold]
    #[inline(never)]
    fn find(&self, key: &PublicKey) -> Result<usize, UnknownPeer> {
        self.keys.get(key).copied().ok_or(UnknownPeer)
    }

    /// Gathers what an input changed at one peer.
    fn touch(&mut self, at: usize) {
        let Some(Some(peer)) = self.peers.get_mut(at) else { return };
        while let Some(index) = peer.retired.pop() {
            self.indices.remove(index);
        }
        if !peer.finds.is_empty() {
            self.finds.extend(peer.finds.drain(..).map(|find| (at, find)));
        }
        self.queue(at);
    }

    /// Puts a peer among those that have something to send, and events: all that a call or an
    /// answer changes.
    #[inline]
    fn queue(&mut self, at: usize) {
        let Some(Some(peer)) = self.peers.get_mut(at) else { return };
        if !peer.is_eventful && peer.has_event() {
            peer.is_eventful = true;
            self.eventful.push_back(at);
        }
        let is_awake = peer.is_awake;
        if !peer.is_ready {
            peer.is_ready = true;
            self.ready.push_back(at);
        }
        if !is_awake {
            self.wake(at);
        }
    }

    /// Whether [`poll_event`](Self::poll_event) has something.
    #[must_use]
    pub fn has_event(&self) -> bool {
        let has_some = |at: &usize| {
            let peer = self.peers.get(*at).and_then(Option::as_ref);
            peer.is_some_and(|peer| peer.has_event())
        };
        // Whose last one was polled is the first, and leaves with the next poll.
        self.eventful.iter().any(has_some) || !self.events.is_empty()
    }

    /// The next event. Those of one peer come in their order, but that it is up or down comes
    /// before what has ended by that.
    #[inline]
    pub fn poll_event(&mut self) -> Option<Event> {
        if !self.events.is_empty() {
            return self.events.pop_front();
        }
        while let Some(&at) = self.eventful.front() {
            let peer = self.peers.get_mut(at).and_then(Option::as_mut)?;
            if peer.has_event() {
                // It stays where it is: an answer may bring its next one.
                return peer.poll_event();
            }
            self.forget_eventful(at);
        }
        None
    }

    /// The first peer has no event left.
    #[inline(never)]
    fn forget_eventful(&mut self, at: usize) {
        if let Some(Some(peer)) = self.peers.get_mut(at) {
            peer.is_eventful = false;
        }
        self.eventful.pop_front();
    }
}

/// Why [`Hub::call`] took no call; the caller's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CallRefused {
    /// No peer with this key was added.
    #[error(transparent)]
    Peer(#[from] UnknownPeer),
    /// The call is too long, or too many wait.
    #[error(transparent)]
    NotTaken(#[from] NotTaken),
}

/// Why an answer was not taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ReplyFailed {
    /// No peer with this key was added.
    #[error(transparent)]
    Peer(#[from] UnknownPeer),
    /// The answer is too long, or nobody waits.
    #[error(transparent)]
    Reply(#[from] ReplyError),
}
