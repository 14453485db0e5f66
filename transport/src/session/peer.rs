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
//! The address is a hint: the authenticated packet with the highest number says
//! where the peer is (WireGuard §2.1). Round-trip time and window are forgotten
//! when it changes.
//!
//! Not here: which peers exist, indices, the private key (see [`super::hub`]).

use super::client::{CallError, CallId, Client, NotTaken};
use super::flow::{Arrivals, Flow, Outcome};
use super::handshake::{Established, Initiator, PublicKey};
use super::limits::Limits;
use super::protect::{OpenError, Opener, Replay, Sealer};
use super::rtt::Rtt;
use super::server::{Asked, IncomingId, ReplyError, Server};
use crate::time::Instant;
use conet_wire::session::FLAG_TRACKED;
use conet_wire::session::frame::{Direction, Frame, Frames, Status};
use core::time::Duration;
use std::collections::VecDeque;
use std::net::SocketAddr;

mod keys;
mod output;
mod status;

pub use status::{Counters, DownReason, PeerStatus};

/// What happened, apart from [`Counters`]; see [`super::hub::Event`].
#[derive(Debug)]
pub(crate) enum PeerEvent {
    Up,
    Down(DownReason),
    Call(IncomingId, Vec<u8>),
    Cancelled(IncomingId),
    Ended(CallId, Result<Vec<u8>, CallError>),
}

#[derive(Debug)]
struct Keys {
    local_index: u32,
    remote_index: u32,
    remote_incarnation: u64,
    sealer: Sealer,
    opener: Opener,
    since: Instant,
    began_here: bool,
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
        }
    }
}

#[derive(Debug)]
struct Asking {
    initiator: Initiator,
    index: u32,
    since: Instant,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Which {
    Current,
    Previous,
}

/// The state of one peer.
#[derive(Debug)]
pub(crate) struct Peer {
    key: PublicKey,
    limits: Limits,
    address: Option<SocketAddr>,
    current: Option<Keys>,
    next: Option<Keys>,
    previous: Option<Keys>,
    asking: Option<Asking>,
    ask_at: Option<Instant>,
    ask_pause: Duration,
    handshake_out: VecDeque<(SocketAddr, Vec<u8>)>,
    newest_counter: Option<u64>,
    remote_incarnation: Option<u64>,
    heard: Instant,
    pinged: Option<(u64, Instant)>,
    pings: u64,
    ping_due: bool,
    pong_due: Option<u64>,
    client: Client,
    server: Server,
    flow: Flow,
    arrivals: Arrivals,
    rtt: Rtt,
    pub(crate) events: VecDeque<PeerEvent>,
    /// Indices that the hub may give to others.
    pub(crate) retired: Vec<u32>,
    counters: Counters,
}

impl Peer {
    pub(crate) fn new(
        now: Instant,
        key: PublicKey,
        address: Option<SocketAddr>,
        limits: Limits,
    ) -> Self {
        Self {
            key,
            limits,
            address,
            current: None,
            next: None,
            previous: None,
            asking: None,
            ask_at: address.map(|_| now),
            ask_pause: limits.handshake_retry,
            handshake_out: VecDeque::new(),
            newest_counter: None,
            remote_incarnation: None,
            heard: now,
            pinged: None,
            pings: 0,
            ping_due: false,
            pong_due: None,
            client: Client::new(limits),
            server: Server::new(limits),
            flow: Flow::new(limits.datagram),
            arrivals: Arrivals::default(),
            rtt: Rtt::default(),
            events: VecDeque::new(),
            retired: Vec::new(),
            counters: Counters::default(),
        }
    }

    pub(crate) fn set_address(&mut self, now: Instant, address: SocketAddr) {
        self.address = Some(address);
        if self.current.is_none() {
            self.ask_at = Some(now);
            self.ask_pause = self.limits.handshake_retry;
        }
    }

    pub(crate) const fn is_up(&self) -> bool {
        self.current.is_some()
    }

    pub(crate) fn status(&self, now: Instant) -> PeerStatus {
        let counters = Counters {
            repeats: self.client.repeats,
            stale_replies: self.client.stale_replies,
            executions: self.server.executions,
            duplicates: self.server.duplicates,
            refused_pieces: self.server.refused_pieces,
            ..self.counters
        };
        PeerStatus {
            key: self.key,
            address: self.address,
            up: self.is_up(),
            rtt: self.rtt.smoothed(),
            last_handshake: self.current.as_ref().map(|keys| now.since(keys.since)),
            calls_in_flight: self.client.in_flight(),
            counters,
        }
    }

    // Calls.

    pub(crate) fn call(
        &mut self,
        now: Instant,
        payload: Vec<u8>,
        deadline: Option<Instant>,
    ) -> Result<CallId, NotTaken> {
        let id = self.client.call(payload, deadline)?;
        self.assign(now);
        Ok(id)
    }

    pub(crate) fn cancel(&mut self, now: Instant, id: CallId) {
        self.client.cancel(now, id);
        self.assign(now);
        self.collect_ended();
    }

    pub(crate) fn reply(
        &mut self,
        id: IncomingId,
        status: Status,
        payload: Vec<u8>,
    ) -> Result<(), ReplyError> {
        self.server.reply(id, status, payload)
    }

    fn assign(&mut self, now: Instant) {
        if self.current.is_some() {
            self.client.assign(now, &self.rtt);
        }
    }

    fn collect_ended(&mut self) {
        let ended = self.client.ended.drain(..);
        self.events.extend(ended.map(|(id, result)| PeerEvent::Ended(id, result)));
    }

    // Data.

    pub(crate) fn on_data(
        &mut self,
        now: Instant,
        from: SocketAddr,
        index: u32,
        packet: &mut [u8],
    ) {
        let is = |keys: &Option<Keys>| keys.as_ref().is_some_and(|keys| keys.local_index == index);
        let opened = if is(&self.current) {
            self.current.as_mut()
        } else if is(&self.next) {
            self.next.as_mut()
        } else if is(&self.previous) {
            self.previous.as_mut()
        } else {
            None
        };
        let Some(keys) = opened else { return };
        let (header, range) = match keys.opener.open_in_place(packet) {
            Ok(opened) => opened,
            Err(OpenError::Replayed) => {
                self.counters.replayed += 1;
                return;
            }
            Err(_) => {
                self.counters.forged += 1;
                return;
            }
        };
        let newest = header.number + 1 == keys.opener.next_number();
        self.counters.received_packets += 1;
        self.counters.received_bytes += packet.len() as u64;
        if is(&self.next)
            && let Some(keys) = self.next.take()
        {
            self.switch(now, keys);
        }
        let which = if is(&self.current) { Which::Current } else { Which::Previous };
        self.heard = now;
        if which == Which::Current && newest && self.address != Some(from) {
            let moved = self.address.replace(from).is_some();
            if moved && !self.rtt.smoothed().is_none() {
                self.rtt = Rtt::default();
                self.restart_flow(now);
            }
        }
        let payload = packet.get(range).unwrap_or_default();
        let taken = self.on_frames(now, which, payload);
        if taken && which == Which::Current && header.flags & FLAG_TRACKED != 0 {
            self.arrivals.on_tracked(now, header.number);
        }
        self.assign(now);
        self.collect_ended();
    }

    /// Handles every frame; says whether all that was tracked was taken.
    fn on_frames(&mut self, now: Instant, which: Which, payload: &[u8]) -> bool {
        let mut taken = true;
        for frame in Frames::new(payload) {
            let Ok(frame) = frame else {
                self.counters.malformed += 1;
                return false;
            };
            taken &= self.on_frame(now, which, frame);
            if !self.is_up() {
                return false;
            }
        }
        taken
    }

    fn on_frame(&mut self, now: Instant, which: Which, frame: Frame<'_>) -> bool {
        match frame {
            Frame::Call { head, data } => {
                let asked = self.server.on_call(head, data);
                self.on_asked_by_peer(asked);
            }
            Frame::Reply { head, status, data } => {
                self.client.on_reply(now, head, status, data, &mut self.rtt);
            }
            Frame::Working { slot, sequence } => self.client.on_working(now, slot, sequence),
            Frame::Cancel { slot, sequence } => {
                let asked = self.server.on_cancel(slot, sequence);
                self.on_asked_by_peer(asked);
            }
            Frame::Chunk { head, direction: Direction::Call, offset, data } => {
                let (taken, asked) = self.server.on_piece(head, offset as usize, data);
                self.on_asked_by_peer(asked);
                return taken;
            }
            Frame::Chunk { head, direction: Direction::Reply, offset, data } => {
                return self.client.on_piece(now, head, offset as usize, data);
            }
            Frame::Ack(ack) if which == Which::Current => {
                let outcome = self.flow.on_ack(now, &ack, &mut self.rtt);
                self.on_outcome(now, outcome);
            }
            Frame::Ack(_) => {}
            Frame::Ping { token } => self.pong_due = Some(token),
            Frame::Pong { token } => {
                if let Some((_, at)) = self.pinged.take_if(|(asked, _)| *asked == token) {
                    self.rtt.on_sample(now.since(at));
                }
            }
            Frame::Close { .. } => {
                if which == Which::Current {
                    self.go_down(now, DownReason::Closed);
                }
            }
        }
        true
    }

    fn on_asked_by_peer(&mut self, asked: Option<Asked>) {
        self.events.extend(asked.map(|asked| match asked {
            Asked::Run(id, payload) => PeerEvent::Call(id, payload),
            Asked::Cancel(id) => PeerEvent::Cancelled(id),
        }));
    }

    // Time.

    /// The earliest moment at which time alone changes something.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        if !self.handshake_out.is_empty() || self.has_something_to_say() {
            return Some(now);
        }
        let ask = self.ask_at.filter(|_| self.address.is_some());
        let calls = self.client.deadline();
        let Some(current) = &self.current else {
            return [ask, calls].into_iter().flatten().min();
        };
        let dead = self.heard + self.limits.dead_after;
        let pinged = self.pinged.map_or(self.heard, |(_, at)| at.max(self.heard));
        let keepalive = pinged + self.limits.keepalive;
        let rekey = current.began_here.then(|| current.since + self.limits.rekey_after);
        let rekey = rekey.filter(|_| self.asking.is_none() && self.ask_at.is_none());
        let flow = self.flow.deadline(&self.rtt);
        let due = self.client.due();
        [ask, calls, Some(dead), Some(keepalive), rekey, flow, due].into_iter().flatten().min()
    }

    fn has_something_to_say(&self) -> bool {
        self.current.is_some()
            && (self.ping_due
                || self.pong_due.is_some()
                || self.arrivals.is_due()
                || self.server.has_something_to_say()
                || (self.flow.may_send() && (self.client.has_piece() || self.server.has_piece())))
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.client.expire(now);
        if let Some(current) = &self.current {
            let (began_here, since) = (current.began_here, current.since);
            if now.since(self.heard) >= self.limits.dead_after {
                self.go_down(now, DownReason::Silent);
            } else {
                let pinged = self.pinged.map_or(self.heard, |(_, at)| at.max(self.heard));
                if now.since(pinged) >= self.limits.keepalive {
                    self.ping_due = true;
                }
                let old = now.since(since) >= self.limits.rekey_after;
                if old && began_here && self.asking.is_none() && self.ask_at.is_none() {
                    self.ask_at = Some(now);
                }
                let lost = self.flow.handle_timeout(now, &self.rtt);
                self.on_outcome(now, Outcome { acked: Vec::new(), lost });
            }
        }
        self.assign(now);
        self.collect_ended();
    }

    /// All indices in use, when the peer is removed.
    pub(crate) fn indices(&self) -> impl Iterator<Item = u32> {
        let keys = [&self.current, &self.next, &self.previous];
        let asking = self.asking.as_ref().map(|asking| asking.index);
        keys.into_iter().flatten().map(|keys| keys.local_index).chain(asking)
    }
}
