//! One peer: its keys, its address, its calls in both directions.
//!
//! ```text
//!            initiate            finish (initiator)
//! no keys ───────────► asking ──────────────────────► current ──silence, CLOSE──► no keys
//!     │ initiation arrives         data opens (responder) ▲
//!     └──────────► next, unconfirmed ─────────────────────┘   the old ones: previous
//! ```
//!
//! Keys come and go; slots belong to the pair of incarnations and outlive them. A
//! responder sends nothing under keys that no packet of the initiator has
//! confirmed, since an initiation may be a recorded one. Where both sides begin at
//! once, the initiation of the larger public key is answered and the other dropped;
//! its sender's address is learned all the same.
//!
//! Either end may be frozen and thawed elsewhere. Each thaw raises that end's *epoch*
//! and draws a number for its *life*; the other end follows the highest epoch, and of
//! one epoch the life that came first. Earlier ones are told that they are superseded.
//!
//! The address is a hint, and a new one is proved before it counts (see
//! [`super::path`]). Round-trip time and window are forgotten when it changes.
//!
//! Not here: which peers exist, indices, the private key (see [`super::hub`]).

use super::budget::Total;
use super::bulk::{Bulk, BulkPort};
use super::client::{CallId, Client, NotTaken};
use super::flow::{Arrivals, Fates, Flow, Tracked};
use super::handshake::{Established, Initiator, PublicKey};
use super::hub::{Event, Find};
use super::key::Root;
use super::limits::Limits;
use super::outbox::Lanes;
use super::path::{Candidate, Tokens};
use super::protect::{Opener, Replay, Sealer};
use super::rtt::Rtt;
use super::server::{IncomingId, ReplyError, Server};
use super::timers::Earliest;
use super::ways::stream_number;
use crate::time::Instant;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use conet_wire::session::frame::{Frame, Frames, Lane, Status};
use conet_wire::session::handshake::{FEATURE_BULK, FEATURE_LANES};
use conet_wire::session::{FLAG_BULK, FLAG_TRACKED, Header};
use core::net::SocketAddr;
use core::ops::Range;
use core::time::Duration;
use places::Places;

mod calls;
mod find;
mod frames;
mod freeze;
mod keys;
mod output;
mod places;
mod status;
mod ways;

pub(crate) use keys::Admission;
pub(crate) use output::MOST_PIECES;
pub use places::MOST_AROUND;
pub(crate) use places::{FRONT, Plan};
pub use status::{Counters, DownReason, PeerStatus};

#[derive(Debug)]
struct Keys {
    local_index: u32,
    remote_index: u32,
    remote_incarnation: u64,
    sealer: Sealer,
    opener: Opener,
    since: Instant,
    began_here: bool,
    features: u32,
    /// Where the handshake has shown the peer to be.
    proved: Option<SocketAddr>,
    /// The peer's epoch and life, where the handshake told them.
    remote_life: Option<Life>,
    /// The handshake told the peer our epoch and life.
    announces: bool,
    /// Slots of before do not count, though the incarnation is the same.
    anew: bool,
    root: u64,
}

impl Keys {
    fn new(now: Instant, local_index: u32, began_here: bool, from: &Established) -> Self {
        Self {
            local_index,
            remote_index: from.remote_session,
            remote_incarnation: from.remote_incarnation,
            sealer: Sealer::new(from.cipher, &from.sealing, 0),
            opener: Opener::new(from.cipher, &from.opening, Replay::window()),
            since: now,
            began_here,
            features: usable(from.features),
            proved: None,
            remote_life: None,
            announces: false,
            anew: false,
            root: from.root.id,
        }
    }

    const fn has(&self, feature: u32) -> bool {
        self.features & feature != 0
    }
}

/// The chosen features without those that want another one: the way for bulk is proved by a
/// challenge, which a peer without lanes would have to refuse.
const fn usable(chosen: u32) -> u32 {
    if chosen & FEATURE_LANES != 0 { chosen } else { chosen & !FEATURE_BULK }
}

#[derive(Debug)]
struct Asking {
    initiator: Initiator,
    index: u32,
    since: Instant,
    to: SocketAddr,
    packet: Vec<u8>,
    digest: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Which {
    Current,
    Previous,
}

/// One end's place in the row of its moves.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Life {
    pub(crate) epoch: u64,
    pub(crate) life: u64,
}

/// Calls come and go until so long after the last one.
const BESIDE_CALLS: Duration = Duration::from_micros(500);

/// Secrets of handshakes that are kept for moves.
const MOST_ROOTS: usize = 8;

/// Ended incarnations that are remembered.
const MOST_ENDED: usize = 32;

/// A secret of a handshake.
#[derive(Debug)]
struct KeptRoot {
    root: Root,
    /// Of keys that were in use, or named by the peer: others go first.
    pinned: bool,
}

/// The state of one peer.
#[derive(Debug)]
pub(crate) struct Peer {
    key: PublicKey,
    limits: Limits,
    address: Option<SocketAddr>,
    /// Where it was before it went over to a stream.
    beside: Option<SocketAddr>,
    /// We have sent ourselves another way, and the peer has not come along yet.
    is_ahead: bool,
    candidate: Option<Candidate>,
    /// Where the peer may be found, by what its old node says, or others.
    hint: Option<SocketAddr>,
    /// Others were asked where it is.
    is_sought: bool,
    current: Option<Keys>,
    next: Option<Keys>,
    previous: Option<Keys>,
    asking: Option<Asking>,
    ask_at: Option<Instant>,
    ask_pause: Duration,
    /// Initiations of the peer's that gave way to ours.
    crossed: u32,
    /// Packets that are not made as they go: handshakes, and what is said about others.
    prepared: VecDeque<(SocketAddr, Vec<u8>)>,
    newest_counter: Option<u64>,
    /// The next initiation of ours has a higher number: where a session was frozen, the clock
    /// may have been ahead of this one.
    least_counter: u64,
    /// Ours in this session; a moved one brings its own.
    pub(crate) incarnation: u64,
    remote_incarnation: Option<u64>,
    /// Incarnations that another one has followed.
    ended: VecDeque<u64>,
    ours: Life,
    theirs: Life,
    /// Thawed, and the peer does not know yet.
    unannounced: bool,
    superseded: bool,
    roots: VecDeque<KeptRoot>,
    /// The one of the keys in use, or last in use.
    root: Option<u64>,
    heard: Instant,
    /// Since when something is under way that is answered at once.
    unanswered: Option<Instant>,
    pinged: Option<(u64, Instant)>,
    pings: u64,
    ping_due: bool,
    pong_due: Option<u64>,
    proof_due: Option<u64>,
    /// Since when calls of the peer's wait for room, and how many had been answered then.
    starved: Option<(Instant, u64)>,
    client: Client,
    server: Server,
    flow: Flow,
    bulk: Bulk,
    /// A call or an answer went last that is no bulk's.
    small: Instant,
    arrivals: Arrivals,
    rtt: Rtt,
    /// One piece in so many is of the oldest payload.
    turn: u32,
    /// The pieces that went last and whose payload is left where it is.
    parts: Vec<Tracked>,
    /// Where the next pieces of a payload belong, if they follow one another.
    places: Places,
    fates: Fates,
    /// That it is up or down.
    events: VecDeque<Event>,
    /// What it asks and says about others.
    pub(crate) finds: Vec<Find>,
    /// Indices that the hub may give to others.
    pub(crate) retired: Vec<u32>,
    /// Stands in the hub's row of peers to ask for packets.
    pub(crate) is_ready: bool,
    /// Among those that are asked for their deadlines.
    pub(crate) is_awake: bool,
    /// When it is looked at though nothing happens.
    pub(crate) due_at: Option<Instant>,
    /// Stands in the hub's row of peers with events.
    pub(crate) is_eventful: bool,
    counters: Counters,
}

impl Peer {
    pub(crate) fn new(
        now: Instant,
        key: PublicKey,
        address: Option<SocketAddr>,
        limits: Limits,
        incarnation: u64,
    ) -> Self {
        Self {
            key,
            limits,
            address,
            beside: None,
            is_ahead: false,
            candidate: None,
            hint: None,
            is_sought: false,
            current: None,
            next: None,
            previous: None,
            asking: None,
            ask_at: address.map(|_| now),
            ask_pause: limits.handshake_retry,
            crossed: 0,
            prepared: VecDeque::new(),
            newest_counter: None,
            least_counter: 0,
            incarnation,
            remote_incarnation: None,
            ended: VecDeque::new(),
            ours: Life::default(),
            theirs: Life::default(),
            unannounced: false,
            superseded: false,
            roots: VecDeque::new(),
            root: None,
            heard: now,
            unanswered: None,
            pinged: None,
            pings: 0,
            ping_due: false,
            pong_due: None,
            proof_due: None,
            starved: None,
            client: Client::new(limits),
            server: Server::new(limits.of_server()),
            flow: Flow::new(limits.datagram),
            bulk: Bulk::default(),
            small: Instant::START,
            arrivals: Arrivals::default(),
            rtt: Rtt::default(),
            turn: 0,
            parts: Vec::new(),
            places: Places::default(),
            fates: Fates::new(),
            events: VecDeque::new(),
            finds: Vec::new(),
            retired: Vec::new(),
            is_ready: false,
            is_awake: false,
            due_at: None,
            is_eventful: false,
            counters: Counters::default(),
        }
    }

    pub(crate) const fn key(&self) -> PublicKey {
        self.key
    }

    #[inline]
    pub(crate) fn has_key(&self, key: &PublicKey) -> bool {
        self.key == *key
    }

    pub(crate) fn set_address(&mut self, now: Instant, address: SocketAddr) {
        self.place(address);
        if self.current.is_none() && !self.superseded {
            self.ask_at = Some(now);
            self.ask_pause = self.limits.handshake_retry;
        }
    }

    pub(crate) const fn is_up(&self) -> bool {
        self.current.is_some()
    }

    /// Whether something has happened that was not polled.
    #[inline]
    pub(crate) fn has_event(&self) -> bool {
        !self.server.asked.is_empty() || !self.client.ended.is_empty() || !self.events.is_empty()
    }

    /// What happened next.
    #[inline]
    pub(crate) fn poll_event(&mut self) -> Option<Event> {
        if !self.events.is_empty() {
            self.events.pop_front()
        } else if !self.server.asked.is_empty() {
            self.server.poll_event(self.key)
        } else {
            self.client.poll_event(self.key)
        }
    }

    // Data.

    /// Takes a packet; says whether it opened.
    pub(crate) fn on_data(
        &mut self,
        now: Instant,
        from: SocketAddr,
        index: u32,
        packet: &mut [u8],
        marked: bool,
        tokens: &mut Tokens,
    ) -> bool {
        let Some((header, range, newest)) = self.open(index, packet) else { return false };
        let length = packet.len();
        let which = if self.is_current(index) { Which::Current } else { self.confirm(now, index) };
        self.on_opened(now, length, which);
        let by_bulk = header.flags & FLAG_BULK != 0;
        let payload = packet.get(range).unwrap_or_default();
        if which == Which::Current && newest && !by_bulk {
            self.look_where(now, from, length, payload, tokens);
        }
        let taken = self.on_frames(now, which, payload);
        let taken = taken && which == Which::Current;
        self.on_taken(now, header, taken, marked, stream_number(from).is_some(), tokens);
        true
    }

    /// A packet of `length` bytes was the peer's.
    #[inline]
    fn on_opened(&mut self, now: Instant, length: usize, which: Which) {
        self.counters.received_packets += 1;
        self.counters.received_bytes += length as u64;
        self.heard = now;
        self.unanswered = None;
        if self.unannounced && self.current.as_ref().is_some_and(|keys| keys.announces) {
            // It uses keys of a handshake that told our life.
            self.unannounced = which != Which::Current;
        }
    }

    /// What a packet says has been done; whether it counts, `taken` says.
    #[inline]
    fn on_taken(
        &mut self,
        now: Instant,
        header: Header,
        taken: bool,
        marked: bool,
        by_stream: bool,
        tokens: &mut Tokens,
    ) {
        let by_bulk = header.flags & FLAG_BULK != 0;
        if taken && header.flags & FLAG_TRACKED != 0 {
            // What comes by a stream waits for nobody: it is not lost.
            self.arrivals.on_tracked(now, header.number, marked, by_bulk || by_stream);
            if !by_bulk && self.current.as_ref().is_some_and(|keys| keys.has(FEATURE_BULK)) {
                self.bulk.on_piece_aside();
            }
        }
        if self.bulk.wants_token() {
            self.bulk.set_token(tokens.take().max(1));
        }
        self.assign(now);
    }

    #[inline]
    fn is_current(&self, index: u32) -> bool {
        self.current.as_ref().is_some_and(|keys| keys.local_index == index)
    }

    /// A packet has opened under other keys than the current ones: perhaps it confirms the
    /// next.
    #[cold]
    fn confirm(&mut self, now: Instant, index: u32) -> Which {
        if let Some(keys) = self.next.take_if(|keys| keys.local_index == index) {
            self.switch(now, keys);
        }
        if self.is_current(index) { Which::Current } else { Which::Previous }
    }

    /// Opens a packet under the keys with this index: its header, where its payload lies, and
    /// whether no later one has come before it.
    #[inline]
    fn open(&mut self, index: u32, packet: &mut [u8]) -> Option<(Header, Range<usize>, bool)> {
        let keys = match &mut self.current {
            Some(keys) if keys.local_index == index => keys,
            _ => {
                let others = [&mut self.next, &mut self.previous];
                others.into_iter().flatten().find(|keys| keys.local_index == index)?
            }
        };
        match keys.opener.open_in_place(packet) {
            Ok((header, range)) => {
                let newest = header.number + 1 == keys.opener.next_number();
                Some((header, range, newest))
            }
            Err(error) => {
                self.on_closed(error);
                None
            }
        }
    }

    /// Where the peer's newest packet came from: it may have moved.
    #[inline]
    fn look_where(
        &mut self,
        now: Instant,
        from: SocketAddr,
        length: usize,
        payload: &[u8],
        tokens: &mut Tokens,
    ) {
        if self.address != Some(from) {
            self.on_elsewhere(now, from, length, tokens);
        } else if self.candidate.as_ref().is_some_and(|candidate| !candidate.is_named())
            && !matches!(Frames::new(payload).next(), Some(Ok(Frame::Challenge { .. })))
        {
            // What came from elsewhere meanwhile was late, or went round. A challenge says
            // nothing: it goes where we may be.
            self.candidate = None;
        }
    }

    pub(crate) const fn set_bulk(&mut self, port: Option<BulkPort>) {
        self.bulk.ours = port;
    }

    /// Whether datagrams to `address` are for this peer.
    pub(crate) fn takes_bulk_at(&self, address: SocketAddr) -> bool {
        self.address.is_some_and(|at| at.ip() == address.ip()) && self.bulk.is_at(address.port())
    }

    pub(crate) fn on_too_long(&mut self, length: usize) {
        self.bulk.on_too_long(length, self.limits.datagram);
    }

    /// The newest packet of the peer's came from another address than it is at.
    fn on_elsewhere(&mut self, now: Instant, from: SocketAddr, bytes: usize, tokens: &mut Tokens) {
        if self.address.is_none() {
            self.move_to(now, from);
            return;
        }
        let candidate = match self.candidate.take_if(|candidate| candidate.address == from) {
            Some(candidate) => candidate,
            // One that our owner has named is asked first; this one comes again.
            None if self.candidate.as_ref().is_some_and(Candidate::is_named) => return,
            None => Candidate::new(now, from, tokens.take()),
        };
        self.candidate.insert(candidate).on_received(now, bytes);
    }

    // Time.

    /// The earliest moment at which time alone changes something.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        if !self.prepared.is_empty() || self.has_something_to_say(now) {
            return Some(now);
        }
        // One after the other: a driver asks at each of its turns.
        let mut first = Earliest::default();
        first.or(self.ask_at.filter(|_| self.address.is_some() || self.hint.is_some()));
        first.or(self.client.deadline());
        let Some(current) = &self.current else { return first.0 };
        first.at(self.heard + self.limits.dead_after);
        first.at(self.pinged_or_heard() + self.limits.keepalive);
        if current.began_here && self.asking.is_none() && self.ask_at.is_none() {
            first.at(current.since + self.limits.rekey_after);
        }
        first.or(self.client.due());
        first.or(self.starved.map(|(since, _)| since + self.limits.dead_after));
        first.or(self.flow.deadline(&self.rtt));
        first.or(self.candidate.as_ref().and_then(Candidate::due));
        if self.arrivals.is_due() {
            first.at(self.acknowledges_at(now));
        }
        first.0
    }

    fn pinged_or_heard(&self) -> Instant {
        self.pinged.map_or(self.heard, |(_, at)| at.max(self.heard))
    }

    fn has_something_to_say(&self, now: Instant) -> bool {
        self.current.is_some() && (self.has_frame(now) || self.has_piece())
    }

    /// Whether there is a frame to send that is no piece.
    fn has_frame(&self, now: Instant) -> bool {
        !self.lanes().is_empty() || self.has_rare_frame(now)
    }

    /// Lanes in which calls or answers wait.
    #[inline]
    fn lanes(&self) -> Lanes {
        self.server.outbox.lanes().and(self.client.outbox.lanes())
    }

    /// Whether there is a frame to send that is no call's.
    #[inline]
    fn has_rare_frame(&self, now: Instant) -> bool {
        (self.arrivals.is_due() && self.acknowledges_at(now) <= now)
            || self.server.has_slots_to_say()
            || self.client.has_release_to_say()
            || self.ping_due
            || self.pong_due.is_some()
            || self.proof_due.is_some()
    }

    /// When an acknowledgement goes that nothing else takes along: a packet of its own costs
    /// both ends two system calls, and beside calls these have to wait for them.
    fn acknowledges_at(&self, now: Instant) -> Instant {
        self.arrivals.alone_at(self.is_beside_calls(now))
    }

    /// Whether calls come and go.
    #[inline]
    fn is_beside_calls(&self, now: Instant) -> bool {
        now.since(self.small) < BESIDE_CALLS
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.client.expire(now);
        if let Some(current) = &self.current {
            let (began_here, since) = (current.began_here, current.since);
            if now.since(self.heard) >= self.limits.dead_after {
                self.go_down(now, DownReason::Silent);
            } else {
                if now.since(self.pinged_or_heard()) >= self.limits.keepalive {
                    self.ping_due = true;
                    self.server.remind();
                    self.client.pool.trim();
                    self.server.pool.trim();
                }
                let old = now.since(since) >= self.limits.rekey_after;
                if old && began_here && self.asking.is_none() && self.ask_at.is_none() {
                    self.ask_at = Some(now);
                }
                let mut fates = core::mem::take(&mut self.fates);
                self.flow.handle_timeout(now, &self.rtt, &mut fates);
                if !self.flow.is_quiet() {
                    self.bulk.on_silence(self.limits.datagram);
                }
                self.on_fates(now, fates);
                self.client.wake(now);
                self.on_short(now);
            }
        }
        self.assign(now);
    }
}
