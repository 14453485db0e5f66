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
//! Invariants: no datagram panics; memory is bounded by peers × [`Limits`]; nothing
//! is sent to an address but to a configured one or one that an authenticated
//! packet came from.

use super::client::{CallError, CallId, NotTaken};
use super::handshake::{
    Entropy, HandshakeError, Initiator, PrivateKey, PublicKey, Received, local_features,
};
use super::limits::Limits;
use super::peer::{DownReason, Peer, PeerEvent, PeerStatus};
use super::server::{IncomingId, ReplyError};
use crate::time::Instant;
use conet_wire::session::frame::Status;
use conet_wire::session::handshake::{Initiation, InitiationSecret, Response};
use conet_wire::session::{Header, PacketKind};
use core::fmt;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::SystemTime;

/// What a hub starts with.
pub struct HubConfig {
    /// Our identity.
    pub private_key: PrivateKey,
    /// Bounds, the same for every peer.
    pub limits: Limits,
    /// Wall-clock time of [`Instant::START`]. Peers refuse initiations that are not
    /// newer than the last, so it must not go back between two starts.
    pub started: SystemTime,
    /// Features to offer; [`local_features`] unless a test wants less.
    pub features: u32,
    /// Where randomness comes from.
    pub entropy: Box<dyn Entropy>,
}

impl fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubConfig").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl HubConfig {
    /// With the default limits and the system's randomness.
    #[must_use]
    pub fn new(private_key: PrivateKey) -> Self {
        Self {
            private_key,
            limits: Limits::default(),
            started: SystemTime::now(),
            features: local_features(),
            entropy: Box::new(super::handshake::SystemEntropy::default()),
        }
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
        /// What it says.
        payload: Vec<u8>,
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
    /// No packet of this protocol, or of another version.
    pub malformed: u64,
    /// An index that nobody has.
    pub unknown_index: u64,
    /// Initiations that were not made for us.
    pub forged: u64,
    /// Initiations by keys that were not added.
    pub unknown_key: u64,
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
    peers: BTreeMap<PublicKey, Peer>,
    indices: HashMap<u32, PublicKey>,
    ready: VecDeque<PublicKey>,
    events: VecDeque<Event>,
    strays: Strays,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("public_key", &self.public_key)
            .field("peers", &self.peers.len())
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
        let since_epoch = started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            public_key: private_key.public(),
            private_key,
            limits: limits.clamped(),
            features,
            incarnation: u64::from_le_bytes(incarnation),
            newest_counter: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX / 2),
            entropy,
            peers: BTreeMap::new(),
            indices: HashMap::new(),
            ready: VecDeque::new(),
            events: VecDeque::new(),
            strays: Strays::default(),
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
        match self.peers.get_mut(&key) {
            Some(peer) => {
                if let Some(address) = address {
                    peer.set_address(now, address);
                }
            }
            None => {
                self.peers.insert(key, Peer::new(now, key, address, self.limits));
            }
        }
        self.touch(key);
    }

    /// Forgets a peer. Its calls end without an event.
    ///
    /// # Errors
    ///
    /// [`UnknownPeer`].
    pub fn remove_peer(&mut self, key: &PublicKey) -> Result<(), UnknownPeer> {
        let peer = self.peers.remove(key).ok_or(UnknownPeer)?;
        for index in peer.indices().chain(peer.retired.iter().copied()) {
            self.indices.remove(&index);
        }
        Ok(())
    }

    /// Snapshots of all peers, by key.
    pub fn status(&self, now: Instant) -> impl Iterator<Item = PeerStatus> {
        self.peers.values().map(move |peer| peer.status(now))
    }

    /// Calls a peer. The outcome comes as [`Event::Ended`], at `deadline` at the
    /// latest; a call to a peer that is not up waits for it.
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
        let id = self.peer(peer)?.call(now, payload, deadline)?;
        self.touch(*peer);
        Ok(id)
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
        self.peer(peer)?.cancel(now, call);
        self.touch(*peer);
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
        self.peer(peer)?.reply(id, Status::Done, payload)?;
        self.touch(*peer);
        Ok(())
    }

    /// Answers a call that was not run and will not be.
    ///
    /// # Errors
    ///
    /// [`ReplyFailed`].
    pub fn refuse(&mut self, peer: &PublicKey, id: IncomingId) -> Result<(), ReplyFailed> {
        self.peer(peer)?.reply(id, Status::Refused, Vec::new())?;
        self.touch(*peer);
        Ok(())
    }

    fn peer(&mut self, key: &PublicKey) -> Result<&mut Peer, UnknownPeer> {
        self.peers.get_mut(key).ok_or(UnknownPeer)
    }

    /// Takes a datagram that came from `from`; overwrites it.
    pub fn handle_datagram(&mut self, now: Instant, from: SocketAddr, datagram: &mut [u8]) {
        let Ok(header) = Header::parse(datagram) else {
            self.strays.malformed += 1;
            return;
        };
        if header.kind == PacketKind::Initiation {
            self.on_initiation(now, from, datagram);
            return;
        }
        let Some(key) = self.indices.get(&header.session).copied() else {
            self.strays.unknown_index += 1;
            return;
        };
        let Some(peer) = self.peers.get_mut(&key) else { return };
        if header.kind == PacketKind::Data {
            peer.on_data(now, from, header.session, datagram);
        } else if let Ok(response) = Response::parse(datagram) {
            peer.on_response(now, from, &response);
        } else {
            self.strays.malformed += 1;
            return;
        }
        self.touch(key);
    }

    fn on_initiation(&mut self, now: Instant, from: SocketAddr, datagram: &[u8]) {
        let Ok(initiation) = Initiation::parse(datagram) else {
            self.strays.malformed += 1;
            return;
        };
        let Ok(received) = Received::open(&self.private_key, &initiation, &mut *self.entropy)
        else {
            self.strays.forged += 1;
            return;
        };
        let key = received.remote();
        let smaller = self.public_key < key;
        let counter = received.secret().counter;
        let Some(peer) = self.peers.get_mut(&key) else {
            self.strays.unknown_key += 1;
            return;
        };
        if peer.admits(now, from, counter, smaller)
            && let Some(index) = fresh_index(&self.indices, &mut *self.entropy)
            && let Ok((established, packet)) =
                received.accept(index, self.incarnation, self.features)
        {
            self.indices.insert(index, key);
            peer.on_answered(now, from, index, &established, &packet);
        }
        self.touch(key);
    }

    /// Does what time has made due.
    pub fn handle_timeout(&mut self, now: Instant) {
        let due = |(key, peer): (&PublicKey, &Peer)| {
            peer.deadline(now).is_some_and(|deadline| deadline <= now).then_some(*key)
        };
        let due: Vec<PublicKey> = self.peers.iter().filter_map(due).collect();
        for key in due {
            if let Some(peer) = self.peers.get_mut(&key) {
                peer.handle_timeout(now);
                if peer.wants_to_ask(now) {
                    self.ask(now, key);
                }
            }
            self.touch(key);
        }
    }

    fn ask(&mut self, now: Instant, key: PublicKey) {
        let Some(peer) = self.peers.get_mut(&key) else { return };
        self.newest_counter += 1;
        let Some(index) = fresh_index(&self.indices, &mut *self.entropy) else {
            peer.put_off_asking(now);
            return;
        };
        let counter = self
            .newest_counter
            .saturating_add(u64::try_from(now.since_start().as_nanos()).unwrap_or(u64::MAX / 2));
        let secret = InitiationSecret { counter, incarnation: self.incarnation, session: index };
        let started =
            Initiator::start(&self.private_key, &key, self.features, secret, &mut *self.entropy);
        match started {
            Ok((initiator, packet)) => {
                self.indices.insert(index, key);
                peer.on_asked(now, index, initiator, &packet);
            }
            Err(_) => peer.put_off_asking(now),
        }
    }

    /// Gathers what an input changed at one peer.
    fn touch(&mut self, key: PublicKey) {
        let Some(peer) = self.peers.get_mut(&key) else { return };
        for index in peer.retired.drain(..) {
            self.indices.remove(&index);
        }
        let events = peer.events.drain(..).map(|event| match event {
            PeerEvent::Up => Event::Up(key),
            PeerEvent::Down(reason) => Event::Down(key, reason),
            PeerEvent::Call(id, payload) => Event::Call { peer: key, id, payload },
            PeerEvent::Cancelled(id) => Event::Cancelled { peer: key, id },
            PeerEvent::Ended(call, result) => Event::Ended { peer: key, call, result },
        });
        self.events.extend(events);
        if !self.ready.contains(&key) {
            self.ready.push_back(key);
        }
    }

    /// Writes the next datagram to send into `buf`, and says where it goes.
    pub fn poll_transmit(&mut self, now: Instant, buf: &mut Vec<u8>) -> Option<SocketAddr> {
        while let Some(key) = self.ready.front().copied() {
            let to = self.peers.get_mut(&key).and_then(|peer| peer.poll_transmit(now, buf));
            if to.is_some() {
                return to;
            }
            self.ready.pop_front();
        }
        None
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        self.peers.values().filter_map(|peer| peer.deadline(now)).min()
    }

    /// Writes the farewell of the next peer that is up into `buf`; the session is
    /// forgotten there at once instead of after [`Limits::dead_after`]. Call until
    /// `None`, then drop the hub.
    pub fn poll_farewell(&mut self, now: Instant, buf: &mut Vec<u8>) -> Option<SocketAddr> {
        while let Some((_, mut peer)) = self.peers.pop_first() {
            let to = peer.close(now, buf);
            if to.is_some() {
                return to;
            }
        }
        None
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

/// An index that no session has, hard to guess.
fn fresh_index(taken: &HashMap<u32, PublicKey>, entropy: &mut dyn Entropy) -> Option<u32> {
    let mut bytes = [0; 4];
    for _ in 0..16 {
        entropy.fill(&mut bytes).ok()?;
        let index = u32::from_le_bytes(bytes);
        if index != 0 && !taken.contains_key(&index) {
            return Some(index);
        }
    }
    None
}
