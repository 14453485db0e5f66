//! What a peer is sent: one datagram after the other, most urgent first.
//!
//! Acknowledgements and keep-alives, then lane by lane answers and calls, then one piece
//! of a large payload: whoever waits for a microsecond does not queue behind a bulk.

use super::{DownReason, FEATURE_LANES, Lane, Peer};
use crate::session::packet::Packet;
use crate::session::protect::Label;
use crate::time::Instant;
use alloc::vec::Vec;
use conet_wire::session::frame::{FRAME_HEADER, Frame};
use conet_wire::session::{FLAG_TRACKED, HEADER, PacketKind, TAG};
use core::net::SocketAddr;

/// Bytes of a packet with one CHALLENGE.
const CHALLENGE_PACKET: usize = HEADER + FRAME_HEADER + 8 + TAG;
/// One piece in so many is of the oldest payload, so that none starves.
const FAIR: u32 = 8;

impl Peer {
    /// Writes the next datagram into `buf` and says where it goes.
    pub(crate) fn poll_transmit(&mut self, now: Instant, buf: &mut Vec<u8>) -> Option<SocketAddr> {
        if let Some((to, packet)) = self.handshake_out.pop_front() {
            buf.clear();
            buf.extend_from_slice(&packet);
            self.on_transmit(buf.len());
            if self.asking.is_some() {
                self.expect_answer(now);
            }
            return Some(to);
        }
        let lanes = self.current.as_ref()?.has(FEATURE_LANES);
        if let Some(to) = self.challenge(now, buf) {
            return Some(to);
        }
        let to = self.address?;
        let mut packet = Packet::new(buf, self.limits.datagram);
        let mut is_answered = false;
        if self.arrivals.is_due() {
            let seen = self.arrivals.take(now);
            packet.push(&if lanes { Frame::Seen(seen) } else { Frame::Ack(seen.narrow()) });
        }
        if self.ping_due && packet.push(&Frame::Ping { token: self.pings }) {
            self.pinged = Some((self.pings, now));
            self.pings += 1;
            self.ping_due = false;
            is_answered = true;
        }
        if let Some(token) = self.pong_due.take() {
            packet.push(&Frame::Pong { token });
        }
        if let Some(token) = self.proof_due.take() {
            packet.push(&Frame::Proof { token });
        }
        for frame in [self.server.take_slots(), self.client.take_release()].into_iter().flatten() {
            packet.push(&frame);
        }
        let is_all = Lane::ALL.iter().all(|&lane| {
            let all = self.server.emit(lane, &mut packet);
            let before = packet.payload_len();
            let all = all && self.client.emit(now, lane, &mut packet);
            is_answered |= packet.payload_len() > before;
            all
        });
        if is_all {
            self.emit_piece(now, &mut packet);
        }
        if packet.payload_len() == 0 {
            return None;
        }
        if is_answered || packet.tracked.is_some() {
            self.expect_answer(now);
        }
        self.seal(now, packet).then_some(to)
    }

    /// A challenge to the address where the peer may be.
    fn challenge(&mut self, now: Instant, buf: &mut Vec<u8>) -> Option<SocketAddr> {
        let candidate = self.candidate.as_mut()?;
        let token = candidate.challenge(now, CHALLENGE_PACKET)?;
        let to = candidate.address;
        let mut packet = Packet::new(buf, self.limits.datagram);
        packet.push(&Frame::Challenge { token });
        self.seal(now, packet).then_some(to)
    }

    fn emit_piece(&mut self, now: Instant, packet: &mut Packet<'_>) {
        // A piece wants a packet nearly to itself, and one packet tracks one thing.
        if packet.tracked.is_some()
            || !self.flow.may_send()
            || packet.room() < self.limits.datagram * 4 / 5
        {
            return;
        }
        let oldest = self.turn % FAIR == FAIR - 1;
        let (ours, theirs) = (self.client.best_piece(oldest), self.server.best_piece(oldest));
        let is_call = match (ours, theirs) {
            (Some(_), Some(_)) if oldest => (self.turn / FAIR).is_multiple_of(2),
            (Some(call), Some(reply)) => {
                (call.lane, call.remaining) < (reply.lane, reply.remaining)
            }
            (Some(_), None) => true,
            (None, _) => false,
        };
        match (is_call, ours, theirs) {
            (true, Some(piece), _) => self.client.emit_piece(now, piece.slot, packet),
            (false, _, Some(piece)) => self.server.emit_piece(piece.slot, packet),
            _ => return,
        }
        self.turn = self.turn.wrapping_add(1);
    }

    fn seal(&mut self, now: Instant, packet: Packet<'_>) -> bool {
        let Some(keys) = &mut self.current else { return false };
        let length = packet.payload_len();
        let (buf, tracked) = packet.finish();
        let flags = if tracked.is_some() { FLAG_TRACKED } else { 0 };
        let label = Label { kind: PacketKind::Data, flags, session: keys.remote_index };
        let number = keys.sealer.next_number();
        match keys.sealer.seal_in_place(label, buf, length) {
            Ok(length) => {
                buf.truncate(length);
                if let Some(what) = tracked {
                    self.flow.on_sent(now, number, length, what);
                }
                self.on_transmit(length);
                true
            }
            Err(_) => {
                // Numbers are used up: as good as a silent peer.
                self.go_down(now, DownReason::Silent);
                false
            }
        }
    }

    fn on_transmit(&mut self, bytes: usize) {
        self.counters.sent_packets += 1;
        self.counters.sent_bytes += bytes as u64;
    }

    /// A last packet for the peer: this end forgets the session.
    pub(crate) fn close(&mut self, now: Instant, buf: &mut Vec<u8>) -> Option<SocketAddr> {
        let to = self.address?;
        self.current.as_ref()?;
        let mut packet = Packet::new(buf, self.limits.datagram);
        let sent = packet.push(&Frame::Close { reason: 0 }) && self.seal(now, packet);
        sent.then_some(to)
    }
}
