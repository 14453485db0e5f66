//! WireGuard by boringtun's protocol part, fenced in.
//!
//! What boringtun 0.7.1 leaves to its caller, and what is done about it here:
//!
//! | trap | fence |
//! |---|---|
//! | `decapsulate` panics when `dst` is shorter than a data datagram, before any key is checked | buffers are at least as long as the datagram; longer datagrams are dropped unseen |
//! | `encapsulate` panics when `dst < src + 32`, and a handshake needs 148 | space for both is always reserved |
//! | a data counter of 2^64 − 1 overflows its window (panic with overflow checks) | counters from Reject-After-Messages on are dropped (whitepaper §6.1) |
//! | handshakes end in UnderLoad unless counts are reset | one limiter for all peers, source address always given, reset each second |
//! | queued packets stay queued after `WriteToNetwork` | asked again until `Done` |
//! | allowed addresses are checked per peer | [`Core::check_inner`] |
//! | a cookie reply looks like an answer | it does not count as authentic, so it does not move the endpoint |
//!
//! Not mended, being inside: no padding to 16 bytes, a replay window of 1024, no
//! jitter on retries, cookies without the source port, its own clock.
//!
//! Source: "WireGuard: Next Generation Kernel Network Tunnel" (whitepaper),
//! boringtun 0.7.1 `src/noise`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet as Message, Tunn, TunnResult};
use conet_dataplane::DropReason;
use conet_wire::ip::{Ecn, IpView};

use super::peer::Peer;
use super::routes::Slot;
use super::{Core, Destination, Inbox, Outbox};
use crate::{Mode, PublicKey};

/// Bytes around an encrypted packet: header 16, tag 16.
const DATA_OVERHEAD: usize = 32;
/// Length of a handshake initiation, the longest message without a packet.
const HANDSHAKE_LEN: usize = 148;
/// First byte of a cookie reply.
const COOKIE_REPLY: u8 = 3;
/// 2^64 − 2^13 − 1, the last counter of a session (whitepaper §6.1).
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// How often sessions look at their timers (boringtun's own device: 250 ms).
const TICK: Duration = Duration::from_millis(250);
/// How often handshakes are counted anew (boringtun RESET_PERIOD).
const RESET: Duration = Duration::from_secs(1);

/// When something is due.
#[derive(Debug)]
pub(crate) struct Timers {
    tick: Instant,
    reset: Instant,
}

impl Timers {
    pub(crate) fn new(now: Instant) -> Self {
        Self { tick: now, reset: now + RESET }
    }
}

/// Encrypts a packet straight into the outbox, or queues it and sends a
/// handshake.
pub(crate) fn encapsulate(
    peer: &mut Peer,
    view: &IpView<&[u8]>,
    out: &mut Outbox,
) -> Result<(), DropReason> {
    let endpoint = peer.endpoint.ok_or(DropReason::NoEndpoint)?;
    let packet = view.bytes();
    let expected = packet.len() + DATA_OVERHEAD;
    let space =
        out.reserve(Destination::Udp(endpoint), view.ecn(), expected, expected.max(HANDSHAKE_LEN));
    match peer.tunn.encapsulate(packet, space) {
        TunnResult::WriteToNetwork(datagram) => {
            let len = datagram.len();
            out.commit(len);
        }
        TunnResult::Err(error) => return Err(reason_of(&error)),
        // Queued behind a handshake that is under way.
        _ => {}
    }
    peer.tx.count(packet.len());
    Ok(())
}

impl Core {
    /// A UDP datagram from the network, marked `ecn` outside.
    pub fn handle_udp(
        &mut self,
        from: SocketAddr,
        ecn: Ecn,
        datagram: &[u8],
        out: &mut Outbox,
        inbox: &mut Inbox,
    ) {
        match self.find_peer(from, datagram, out) {
            Ok(slot) => {
                if let Err(reason) = self.decapsulate(slot, from, ecn, datagram, out, inbox) {
                    self.drop_from(slot, reason);
                }
            }
            Err(reason) => self.drops.count(reason),
        }
    }

    /// Whose datagram it claims to be; no more than a claim yet.
    fn find_peer(
        &self,
        from: SocketAddr,
        datagram: &[u8],
        out: &mut Outbox,
    ) -> Result<Slot, DropReason> {
        // boringtun's session number of a peer is its slot and eight bits more.
        let of_index = |index: u32| {
            let slot = index >> 8;
            match self.peers.get(slot as usize) {
                Some(Some(_)) => Ok(slot),
                _ => Err(DropReason::UnknownPeer),
            }
        };
        match Tunn::parse_incoming_packet(datagram).map_err(|_| DropReason::Malformed)? {
            Message::HandshakeInit(_) => {}
            Message::HandshakeResponse(m) => return of_index(m.receiver_idx),
            Message::PacketCookieReply(m) => return of_index(m.receiver_idx),
            Message::PacketData(m) => return of_index(m.receiver_idx),
        }
        // Before the costly key agreement: does it know our key, and is there
        // room for it?
        let mut cookie = [0; HANDSHAKE_LEN];
        let init = match self.limiter.verify_packet(Some(from.ip()), datagram, &mut cookie) {
            Ok(Message::HandshakeInit(init)) => init,
            Err(TunnResult::WriteToNetwork(reply)) => {
                let space = out.reserve(Destination::Udp(from), Ecn::NotEct, 0, reply.len());
                space.copy_from_slice(reply);
                out.commit(reply.len());
                return Err(DropReason::RateLimited);
            }
            _ => return Err(DropReason::BadHandshake),
        };
        let half = parse_handshake_anon(&self.private.0, &self.public, &init)
            .map_err(|_| DropReason::BadHandshake)?;
        let slot = self.by_key.get(&PublicKey(half.peer_static_public));
        slot.copied().ok_or(DropReason::UnknownPeer)
    }

    fn decapsulate(
        &mut self,
        slot: Slot,
        from: SocketAddr,
        ecn: Ecn,
        datagram: &[u8],
        out: &mut Outbox,
        inbox: &mut Inbox,
    ) -> Result<(), DropReason> {
        let peer = self.peer_mut(slot).ok_or(DropReason::UnknownPeer)?;
        if peer.mode != Mode::WireGuard {
            return Err(DropReason::WrongMode);
        }
        if datagram.len() > inbox.pool.capacity() {
            return Err(DropReason::TooLong);
        }
        let counter = datagram.get(8..16).and_then(|b| b.first_chunk());
        let is_data = datagram.first() == Some(&4);
        if is_data && counter.is_none_or(|&c| u64::from_le_bytes(c) >= REJECT_AFTER_MESSAGES) {
            return Err(DropReason::Replay);
        }
        let mut packet = inbox.pool.take();
        packet.set_len(datagram.len().max(HANDSHAKE_LEN));
        let result = peer.tunn.decapsulate(Some(from.ip()), datagram, packet.data_mut());
        let received = match result {
            TunnResult::WriteToTunnelV4(inner, _) | TunnResult::WriteToTunnelV6(inner, _) => {
                Ok(Received::Packet(inner.len()))
            }
            TunnResult::WriteToNetwork(answer) => {
                Ok(Received::Answer { len: answer.len(), kind: answer.first().copied() })
            }
            TunnResult::Done => Ok(Received::Nothing),
            TunnResult::Err(error) => Err(reason_of(&error)),
        };
        let forwarded = match received {
            Ok(Received::Packet(len)) => {
                peer.endpoint = Some(from);
                packet.set_len(len);
                self.accept(slot, ecn, packet.data_mut())
            }
            Ok(Received::Answer { len, kind }) => {
                let space = out.reserve(Destination::Udp(from), Ecn::NotEct, 0, len);
                space.copy_from_slice(&packet.data()[..len]);
                out.commit(len);
                if kind == Some(COOKIE_REPLY) {
                    Err(DropReason::RateLimited)
                } else {
                    peer.endpoint = Some(from);
                    drain(peer, out);
                    Ok(false)
                }
            }
            Ok(Received::Nothing) => {
                // A keepalive has passed the tag; a cookie says nothing about
                // where the peer is.
                if is_data {
                    peer.endpoint = Some(from);
                }
                Ok(false)
            }
            Err(reason) => Err(reason),
        };
        if forwarded == Ok(true) {
            inbox.packets.push(packet);
        } else {
            inbox.pool.give(packet);
        }
        forwarded.map(|_| ())
    }

    fn accept(&mut self, slot: Slot, ecn: Ecn, inner: &mut [u8]) -> Result<bool, DropReason> {
        let len = inner.len();
        let mut view = IpView::new(inner).map_err(|_| DropReason::Malformed)?;
        self.check_inner(slot, &view)?;
        let marked = view.ecn().decapsulated_under(ecn).ok_or(DropReason::Congestion)?;
        view.set_ecn(marked);
        if let Some(peer) = self.peer_mut(slot) {
            peer.rx.count(len);
        }
        Ok(true)
    }

    /// When [`Core::handle_timeout`] has something to do next.
    pub fn poll_timeout(&self) -> Instant {
        self.timers.tick.min(self.timers.reset)
    }

    /// Does what is due: retries, keepalives, new keys, expiry.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut Outbox) {
        if now >= self.timers.reset {
            self.limiter.reset_count();
            self.timers.reset = now + RESET;
        }
        if now < self.timers.tick {
            return;
        }
        self.timers.tick = now + TICK;
        for peer in self.peers.iter_mut().flatten() {
            let mut message = [0; HANDSHAKE_LEN];
            // Also in ipip mode and without an endpoint: sessions must age.
            let result = peer.tunn.update_timers(&mut message);
            let (TunnResult::WriteToNetwork(message), Mode::WireGuard, Some(to)) =
                (result, peer.mode, peer.endpoint)
            else {
                continue;
            };
            let space = out.reserve(Destination::Udp(to), Ecn::NotEct, 0, message.len());
            space.copy_from_slice(message);
            out.commit(message.len());
        }
    }
}

enum Received {
    Packet(usize),
    Answer { len: usize, kind: Option<u8> },
    Nothing,
}

/// Sends what was queued while there was no session.
fn drain(peer: &mut Peer, out: &mut Outbox) {
    let Some(endpoint) = peer.endpoint else { return };
    // What is queued passed the check against the inner MTU when it was.
    let space = usize::from(peer.path_mtu) + DATA_OVERHEAD + HANDSHAKE_LEN;
    loop {
        let space = out.reserve(Destination::Udp(endpoint), Ecn::NotEct, 0, space);
        match peer.tunn.decapsulate(None, &[], space) {
            TunnResult::WriteToNetwork(datagram) => {
                let len = datagram.len();
                out.commit(len);
            }
            _ => return,
        }
    }
}

fn reason_of(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidAeadTag => DropReason::BadTag,
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => DropReason::Replay,
        WireGuardError::WrongIndex
        | WireGuardError::NoCurrentSession
        | WireGuardError::ConnectionExpired => DropReason::UnknownPeer,
        WireGuardError::UnderLoad => DropReason::RateLimited,
        WireGuardError::InvalidPacket
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::DestinationBufferTooSmall => DropReason::Malformed,
        WireGuardError::UnexpectedPacket
        | WireGuardError::WrongPacketType
        | WireGuardError::WrongKey
        | WireGuardError::InvalidTai64nTimestamp
        | WireGuardError::WrongTai64nTimestamp
        | WireGuardError::InvalidMac
        | WireGuardError::LockFailed => DropReason::BadHandshake,
    }
}
