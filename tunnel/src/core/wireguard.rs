//! WireGuard between the core's peers and the protocol in [`crate::noise`].
//!
//! What is decided here: whose a datagram is, where a peer is, what goes on to the
//! device, what waits.
//!
//! An endpoint moves only by a datagram that passed its tag: not by a cookie, a replay
//! or a forged one.
//!
//! Source: "WireGuard: Next Generation Kernel Network Tunnel" (whitepaper).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use conet_dataplane::DropReason;
use conet_wire::ip::{Ecn, IpView, packet_length};

use super::outbox::Way;
use super::peer::Peer;
use super::routes::Slot;
use super::{Core, Destination, Outbox};
use crate::noise::{
    Claim, DATA_HEADER, INITIATION, Message, NoiseError, Opened, PADDING, RESPONSE, TAG, Verdict,
};
use crate::{Inner, Mode, Outgoing, PublicKey};

/// How often the timers of all peers are looked at: they are exact to this.
const TICK: Duration = Duration::from_millis(250);

/// When something is due.
#[derive(Debug)]
pub(crate) struct Timers {
    tick: Instant,
}

impl Timers {
    pub(crate) fn new(now: Instant) -> Self {
        Self { tick: now }
    }
}

/// Encrypts each packet in the place of its datagram, or keeps it for the session to
/// come.
pub(crate) fn encapsulate(
    peer: &mut Peer,
    now: Instant,
    packet: &Outgoing<'_>,
    may_fragment: bool,
    out: &mut Outbox,
) -> Result<(), DropReason> {
    let endpoint = peer.endpoint.ok_or(DropReason::NoEndpoint)?;
    let mtu = usize::from(peer.inner_mtu());
    let way = Way { may_fragment, ..Way::new(Destination::Udp(endpoint), packet.view().ecn()) };
    let (mut packets, mut bytes) = (0, 0);
    for index in 0..packet.count() {
        let len = packet.len_of(index);
        (packets, bytes) = (packets + 1, bytes + len);
        if !peer.tunn.is_ready(now) {
            let mut waiting = vec![0; len];
            packet.write(index, &mut waiting);
            peer.tunn.enqueue(now, &waiting);
            continue;
        }
        seal(peer, now, way, [len, mtu], out, |space| packet.write(index, space))?;
    }
    peer.tx.count(packets, bytes);
    count_lost(peer);
    Ok(())
}

/// Seals what `write` writes, `len` bytes, padded as far as `mtu` allows.
fn seal(
    peer: &mut Peer,
    now: Instant,
    way: Way,
    [len, mtu]: [usize; 2],
    out: &mut Outbox,
    write: impl FnOnce(&mut [u8]),
) -> Result<(), DropReason> {
    let padded = len.next_multiple_of(PADDING).min(mtu.max(len));
    let expected = DATA_HEADER + padded + TAG;
    let space = out.reserve(way, expected, expected);
    let (text, padding) = space[DATA_HEADER..DATA_HEADER + padded].split_at_mut(len);
    write(text);
    padding.fill(0);
    let sealed = peer.tunn.seal(now, space, padded).map_err(reason_of)?;
    out.commit(sealed);
    Ok(())
}

fn count_lost(peer: &mut Peer) {
    peer.drops[DropReason::NoSession] += peer.tunn.take_lost();
}

impl Core {
    /// A UDP datagram from the network, marked `ecn` outside; it is opened in place.
    /// Gives where the packet inside is, if it may go to the device.
    pub fn handle_udp(
        &mut self,
        from: SocketAddr,
        ecn: Ecn,
        datagram: &mut [u8],
        out: &mut Outbox,
    ) -> Option<Inner> {
        // The first byte is 1 to 4 for WireGuard, and 0x4_ or 0x6_ for a packet.
        if datagram.first().is_some_and(|first| matches!(first >> 4, 4 | 6)) {
            return self.handle_bare(from, ecn, datagram);
        }
        match Message::parse(datagram) {
            Some(Message::Data { receiver, counter }) => {
                let Some(slot) = self.slot_of(receiver) else {
                    self.drops.count(DropReason::UnknownPeer);
                    return None;
                };
                let result = self.open(slot, from, ecn, (receiver, counter), datagram, out);
                result.unwrap_or_else(|reason| {
                    self.drop_from(slot, reason);
                    None
                })
            }
            Some(message) => {
                if let Err((slot, reason)) = self.handshake(from, message, datagram, out) {
                    match slot {
                        Some(slot) => self.drop_from(slot, reason),
                        None => self.drops.count(reason),
                    }
                }
                None
            }
            None => {
                self.drops.count(DropReason::Malformed);
                None
            }
        }
    }

    /// Whom a session number is for: the slot and eight bits more.
    fn slot_of(&self, receiver: u32) -> Option<Slot> {
        let slot = receiver >> 8;
        matches!(self.peers.get(slot as usize), Some(Some(_))).then_some(slot)
    }

    fn open(
        &mut self,
        slot: Slot,
        from: SocketAddr,
        ecn: Ecn,
        (receiver, counter): (u32, u64),
        datagram: &mut [u8],
        out: &mut Outbox,
    ) -> Result<Option<Inner>, DropReason> {
        let now = self.now;
        let peer = self.peer_mut(slot).ok_or(DropReason::UnknownPeer)?;
        if !peer.hears() {
            return Err(DropReason::WrongMode);
        }
        let carries = peer.mode == Mode::WireGuard;
        let opened = peer.tunn.open(now, receiver, counter, datagram).map_err(reason_of)?;
        let Opened { len, confirmed } = opened;
        self.learn_endpoint(slot, from);
        if confirmed {
            self.drain(slot, out);
        }
        self.speak(slot, out);
        if len == 0 {
            return Ok(None);
        }
        if !carries {
            return Err(DropReason::WrongMode);
        }
        let packet = &mut datagram[DATA_HEADER..DATA_HEADER + len];
        let len = self.accept(slot, ecn, packet)?;
        Ok(Some(Inner { at: DATA_HEADER..DATA_HEADER + len, trusted: true, segment: 0 }))
    }

    /// Checks a decrypted packet, with its padding, and marks it; gives its length.
    fn accept(&mut self, slot: Slot, ecn: Ecn, padded: &mut [u8]) -> Result<usize, DropReason> {
        let len = packet_length(padded).map_err(|_| DropReason::Malformed)?;
        let mut view = IpView::new(&mut padded[..len]).map_err(|_| DropReason::Malformed)?;
        self.check_inner(slot, &view)?;
        let before = view.ecn();
        let marked = before.decapsulated_under(ecn).ok_or(DropReason::Congestion)?;
        if marked != before {
            view.set_ecn(marked);
        }
        if let Some(peer) = self.peer_mut(slot) {
            peer.rx.count(1, len);
        }
        Ok(len)
    }

    /// Everything but data. Errors say whose they are, where that is known.
    fn handshake(
        &mut self,
        from: SocketAddr,
        message: Message<'_>,
        datagram: &[u8],
        out: &mut Outbox,
    ) -> Result<(), (Option<Slot>, DropReason)> {
        let claimed = match message {
            Message::Response(bytes) => Some(u32_at(bytes, 8)),
            Message::Cookie(bytes) => Some(u32_at(bytes, 4)),
            _ => None,
        };
        let slot = match claimed.map(|number| self.slot_of(number)) {
            Some(None) => return Err((None, DropReason::UnknownPeer)),
            Some(slot) => slot,
            None => None,
        };
        if let Message::Cookie(bytes) = message {
            let now = self.now;
            let peer = slot.and_then(|slot| self.peer_mut(slot)).filter(|peer| peer.hears());
            let peer = peer.ok_or((slot, DropReason::WrongMode))?;
            // It says nothing about where the peer is.
            return peer.tunn.take_cookie(now, bytes).map_err(|e| (slot, reason_of(e)));
        }
        self.admit(from, datagram, out).map_err(|reason| (slot, reason))?;
        match (message, slot) {
            (Message::Initiation(bytes), _) => self.answer(from, bytes, out),
            (Message::Response(bytes), Some(slot)) => {
                let finished = self.finish(slot, from, bytes, out);
                finished.map_err(|reason| (Some(slot), reason))
            }
            _ => Err((None, DropReason::Malformed)),
        }
    }

    /// Before the costly key agreement: does it know our key, and is there room?
    fn admit(
        &mut self,
        from: SocketAddr,
        datagram: &[u8],
        out: &mut Outbox,
    ) -> Result<(), DropReason> {
        match self.gate.judge(&self.us, self.now, from, datagram) {
            Verdict::Welcome => Ok(()),
            Verdict::Cookie(reply) => {
                send(out, from, &reply);
                Err(DropReason::RateLimited)
            }
            Verdict::Refused => Err(DropReason::RateLimited),
            Verdict::Stranger => Err(DropReason::BadHandshake),
        }
    }

    fn answer(
        &mut self,
        from: SocketAddr,
        message: &[u8; INITIATION],
        out: &mut Outbox,
    ) -> Result<(), (Option<Slot>, DropReason)> {
        let claim = Claim::read(&self.us, message).map_err(|_| (None, DropReason::BadHandshake))?;
        let slot = self.by_key.get(&PublicKey(claim.public)).copied();
        let slot = slot.ok_or((None, DropReason::UnknownPeer))?;
        let now = self.now;
        let peer = self.peer_mut(slot).filter(|peer| peer.hears());
        let peer = peer.ok_or((Some(slot), DropReason::WrongMode))?;
        let mut response = [0; RESPONSE];
        let made = peer.tunn.respond(now, claim, &mut response);
        made.map_err(|error| (Some(slot), reason_of(error)))?;
        self.learn_endpoint(slot, from);
        send(out, from, &response);
        Ok(())
    }

    fn finish(
        &mut self,
        slot: Slot,
        from: SocketAddr,
        message: &[u8; RESPONSE],
        out: &mut Outbox,
    ) -> Result<(), DropReason> {
        let now = self.now;
        let peer = self.peers.get_mut(slot as usize).and_then(Option::as_mut);
        let peer = peer.filter(|peer| peer.hears()).ok_or(DropReason::WrongMode)?;
        peer.tunn.finish(&self.us, now, message).map_err(reason_of)?;
        self.learn_endpoint(slot, from);
        self.drain(slot, out);
        self.speak(slot, out);
        Ok(())
    }

    /// Sends what has waited for the session.
    fn drain(&mut self, slot: Slot, out: &mut Outbox) {
        let now = self.now;
        let Some(peer) = self.peer_mut(slot) else { return };
        let Some(endpoint) = peer.endpoint.filter(|_| peer.mode == Mode::WireGuard) else { return };
        let mtu = usize::from(peer.inner_mtu());
        while let Some(packet) = peer.tunn.dequeue() {
            let ecn = IpView::new(&packet[..]).map_or(Ecn::NotEct, |view| view.ecn());
            let write = |space: &mut [u8]| space.copy_from_slice(&packet);
            // It fitted when it came.
            let may_fragment = packet.len() > mtu;
            let way = Way { may_fragment, ..Way::new(Destination::Udp(endpoint), ecn) };
            if let Err(reason) = seal(peer, now, way, [packet.len(), mtu], out, write) {
                peer.drops.count(reason);
            }
        }
    }

    /// Sends the initiations and keepalives that a peer's state asks for.
    pub(super) fn speak(&mut self, slot: Slot, out: &mut Outbox) {
        let (now, unix) = (self.now, self.unix + (self.now - self.began));
        let peer = self.peers.get_mut(slot as usize).and_then(Option::as_mut);
        let Some(peer) = peer.filter(|peer| peer.tunn.has_message()) else { return };
        let Some(endpoint) = peer.endpoint.filter(|_| peer.speaks()) else {
            return peer.tunn.discard_messages();
        };
        let mut message = [0; INITIATION];
        while peer.tunn.has_message() {
            if let Some(len) = peer.tunn.poll_message(&self.us, now, unix, &mut message) {
                send(out, endpoint, &message[..len]);
            }
        }
    }

    /// When [`Core::handle_timeout`] has something to do next.
    pub fn poll_timeout(&self) -> Instant {
        self.timers.tick
    }

    /// Does what is due: retries, keepalives, new keys, expiry.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut Outbox) {
        self.advance(now);
        if self.now < self.timers.tick {
            return;
        }
        let now = self.now;
        self.timers.tick = now + TICK;
        for slot in 0..self.peers.len() {
            let Some(peer) = self.peers.get_mut(slot).and_then(Option::as_mut) else { continue };
            if peer.tunn.poll_timeout().is_none_or(|at| at > now) {
                continue;
            }
            peer.tunn.handle_timeout(now);
            count_lost(peer);
            if let Ok(slot) = Slot::try_from(slot) {
                self.speak(slot, out);
            }
        }
    }
}

fn send(out: &mut Outbox, to: SocketAddr, message: &[u8]) {
    let way = Way::new(Destination::Udp(to), Ecn::NotEct);
    let space = out.reserve(way, message.len(), message.len());
    space.copy_from_slice(message);
    out.commit(message.len());
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn reason_of(error: NoiseError) -> DropReason {
    match error {
        NoiseError::NoSession => DropReason::UnknownPeer,
        NoiseError::Replay => DropReason::Replay,
        NoiseError::Tag => DropReason::BadTag,
        NoiseError::Handshake | NoiseError::Entropy => DropReason::BadHandshake,
    }
}
