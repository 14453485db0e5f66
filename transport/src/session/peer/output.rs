//! What a peer is sent: one datagram after the other, most urgent first.
//!
//! Acknowledgements and keep-alives, then lane by lane answers and calls, then one piece
//! of a large payload: whoever waits for a microsecond does not queue behind a bulk.

use super::{DownReason, FEATURE_LANES, Lane, Peer};
use crate::session::bulk::Probe;
use crate::session::flow::Tracked;
use crate::session::hub::Transmit;
use crate::session::packet::{PARTS, Packet};
use crate::session::protect::Label;
use crate::session::ways::stream_number;
use crate::time::Instant;
use conet_wire::session::frame::{Direction, FRAME_HEADER, Frame};
use conet_wire::session::{FLAG_BULK, FLAG_TRACKED, HEADER, PacketKind, TAG};
use core::net::SocketAddr;

/// Bytes of a packet with one CHALLENGE.
const CHALLENGE_PACKET: usize = HEADER + FRAME_HEADER + 8 + TAG;
/// One piece in so many is of the oldest payload, so that none starves.
const FAIR: u32 = 8;

/// Bytes of pieces in one system call; what a UDP datagram holds is a little more.
const BATCH: usize = 65_000;
/// The same while calls come and go: they wait for the system call that is under way.
const BATCH_BESIDE_CALLS: usize = 6_000;

/// Longest packet on a stream; its carriers take somewhat more.
const STREAM_PACKET: usize = 32_000;
/// Bytes of pieces on their way by a stream: what shared memory holds beside calls, and
/// connections several times over.
const ON_STREAM: usize = 896 * 1024;
/// Most pieces in one system call (`UDP_MAX_SEGMENTS` of Linux 4.18; 128 since 6.10).
pub(crate) const MOST_PIECES: usize = 64;

impl Peer {
    /// Writes what goes next into `buf`: one datagram, or by the way for bulk, where the carrier
    /// has one, a row of up to `batch`, whose payload stays where it is where that can be and
    /// `in_parts` is wanted.
    pub(crate) fn poll_transmit(
        &mut self,
        now: Instant,
        buf: &mut [u8],
        batch: Option<usize>,
        in_parts: bool,
    ) -> Option<Transmit> {
        if let Some((to, packet)) = self.prepared.pop_front() {
            return self.shake_hands(now, to, &packet, buf);
        }
        self.current.as_ref()?;
        if self.candidate.is_some()
            && let Some(transmit) = self.challenge(now, buf)
        {
            return Some(transmit);
        }
        let at = self.address?;
        // Beside a stream there is no such way.
        let batch = batch.filter(|_| stream_number(at).is_none());
        let way = batch.and_then(|_| self.bulk.way(now, at, self.flow.is_quiet()));
        if let Some(transmit) = self.packet(now, at, buf, way.is_none()) {
            return Some(transmit);
        }
        let batch = batch.filter(|batch| *batch > 0)?;
        if let Some((to, probe)) = self.bulk.probe(now, at, &self.rtt) {
            return self.learn(now, to, probe, buf);
        }
        let (to, size) = way?;
        self.pieces(now, to, size, batch, in_parts, buf)
    }

    // What seldom happens stands apart, so that what each call does is close together: after
    // a system call little of it is in the processor's caches.

    #[cold]
    fn shake_hands(
        &mut self,
        now: Instant,
        to: SocketAddr,
        packet: &[u8],
        buf: &mut [u8],
    ) -> Option<Transmit> {
        let length = packet.len();
        buf.get_mut(..length)?.copy_from_slice(packet);
        self.on_transmit(length);
        if self.asking.is_some() {
            self.expect_answer(now);
        }
        Some(Transmit::one(to, length))
    }

    /// Frames that are no call's; says whether one is answered at once.
    #[inline(never)]
    fn emit_rare(&mut self, now: Instant, packet: &mut Packet<'_>) -> bool {
        let mut is_answered = false;
        if self.arrivals.is_due() {
            self.acknowledge(now, packet);
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
        if let Some(slots) = self.server.take_slots() {
            packet.push(&slots);
        }
        if let Some(release) = self.client.take_release() {
            packet.push(&release);
        }
        is_answered
    }

    fn acknowledge(&mut self, now: Instant, packet: &mut Packet<'_>) {
        let lanes = self.current.as_ref().is_some_and(|keys| keys.has(FEATURE_LANES));
        let seen = self.arrivals.take(now);
        let bitmap = seen.bitmap_bytes();
        packet.push(&if lanes { seen.frame(&bitmap) } else { Frame::Ack(seen.narrow()) });
        if let Some(ours) = self.bulk.take_tell() {
            packet.push(&Frame::Bulk { port: ours.port, buffer: ours.buffer });
        }
    }

    /// Whether there is certainly nothing more to send: seen at one look after a call, so
    /// that it is not sought.
    pub(crate) fn has_said_all(&self, now: Instant) -> bool {
        self.prepared.is_empty()
            && self.candidate.is_none()
            && !self.bulk.has_way()
            && !self.has_frame(now)
            && !self.has_piece()
    }

    /// A packet by the calls' way.
    fn packet(
        &mut self,
        now: Instant,
        to: SocketAddr,
        buf: &mut [u8],
        with_piece: bool,
    ) -> Option<Transmit> {
        let mut lanes = self.lanes();
        // What waits for an answer goes with it.
        let has_rare = self.has_rare_frame(now) || (self.arrivals.is_due() && !lanes.is_empty());
        if lanes.is_empty() && !has_rare && !(with_piece && self.has_piece()) {
            return None;
        }
        let (longest, buffer) = self.longest(now, to);
        let longest = longest.min(buf.len());
        let mut packet = Packet::new(buf, longest);
        let mut is_answered = has_rare && self.emit_rare(now, &mut packet);
        let mut is_all = true;
        while is_all && let Some(lane) = lanes.take() {
            let before = packet.payload_len();
            is_all = self.server.emit(lane, &mut packet);
            let between = packet.payload_len();
            is_all = is_all && self.client.emit(now, lane, &mut packet);
            is_answered |= packet.payload_len() > between;
            if packet.payload_len() > before && lane != Lane::Bulk {
                self.small = now;
            }
        }
        if is_all && with_piece && packet.tracked.is_none() && self.has_piece() {
            // A piece wants a packet nearly to itself, and one packet tracks one thing.
            let room = packet.room();
            if room >= longest * 4 / 5 {
                self.flow.set_path(longest, buffer);
                self.emit_piece(now, &mut packet);
            }
        }
        if packet.payload_len() == 0 {
            return None;
        }
        if is_answered || packet.tracked.is_some() {
            self.expect_answer(now);
        }
        let length = self.seal(now, packet, 0)?;
        Some(Transmit::one(to, length))
    }

    /// Longest packet by the calls' way, and bytes of pieces that may be on it: on a stream
    /// length costs nothing but the time of calls behind it, and what has no room is lost.
    fn longest(&self, now: Instant, to: SocketAddr) -> (usize, usize) {
        let least = self.limits.datagram;
        match stream_number(to) {
            None => (least, usize::MAX),
            Some(_) if self.is_beside_calls(now) => (least.max(BATCH_BESIDE_CALLS), ON_STREAM),
            Some(_) => (least.max(STREAM_PACKET), ON_STREAM),
        }
    }

    /// Pieces of large payloads, as many as the window, the carrier and the calls allow.
    #[inline(never)]
    fn pieces(
        &mut self,
        now: Instant,
        to: SocketAddr,
        size: usize,
        batch: usize,
        in_parts: bool,
        buf: &mut [u8],
    ) -> Option<Transmit> {
        let in_parts = in_parts && self.current.as_ref().is_some_and(|keys| keys.sealer.is_clear());
        let most =
            if self.is_beside_calls(now) { BATCH_BESIDE_CALLS } else { BATCH }.min(buf.len());
        let size = size.min(most);
        self.flow.set_path(size, self.bulk.buffer().unwrap_or(usize::MAX));
        self.parts.clear();
        let (mut segment, mut length, mut written) = (0, 0, 0);
        for _ in 0..batch.min(MOST_PIECES) {
            if most.saturating_sub(length) < size {
                break;
            }
            let Some(rest) = buf.get_mut(written..) else { break };
            let longest = if segment == 0 { size } else { segment };
            let mut packet =
                if in_parts { Packet::in_parts(rest, longest) } else { Packet::new(rest, longest) };
            self.emit_piece(now, &mut packet);
            if packet.tracked.is_none() {
                break;
            }
            if in_parts {
                self.parts.extend(packet.tracked.clone());
            }
            let left_apart = packet.left_apart();
            let sealed = self.seal(now, packet, FLAG_BULK)?;
            written += sealed - left_apart;
            length += sealed;
            if segment == 0 {
                segment = sealed;
            }
            // All but the last are of the same length.
            if sealed < segment || segment < size - size / 8 {
                break;
            }
        }
        if length > 0 {
            self.expect_answer(now);
        }
        (length > 0).then_some(Transmit { to, length, segment, is_bulk: true, in_parts })
    }

    /// The parts of what went last, one behind the other: `buf` has what stands around the
    /// payloads.
    pub(crate) fn parts<'a>(&'a self, buf: &'a [u8], mut take: impl FnMut(&'a [u8])) {
        let mut before = 0;
        for (n, piece) in self.parts.iter().enumerate() {
            let Tracked::Piece { direction, slot, sequence, range } = piece else { continue };
            let payload = match direction {
                Direction::Call => self.client.payload(*slot, *sequence),
                Direction::Reply => self.server.payload(*slot, *sequence),
            };
            let end = n * PARTS + PARTS - TAG;
            take(buf.get(before..end).unwrap_or_default());
            take(payload.and_then(|payload| payload.get(range.clone())).unwrap_or_default());
            before = end;
        }
        take(buf.get(before..before + TAG).unwrap_or_default());
    }

    /// A packet that learns about the way for bulk.
    #[cold]
    fn learn(
        &mut self,
        now: Instant,
        to: SocketAddr,
        probe: Probe,
        buf: &mut [u8],
    ) -> Option<Transmit> {
        let (token, size) = match probe {
            Probe::Small(token) => (token, CHALLENGE_PACKET),
            Probe::Padded(token, size) => (token, size),
        };
        let mut packet = Packet::new(buf, size);
        packet.push(&Frame::Challenge { token });
        if matches!(probe, Probe::Padded(..)) {
            packet.pad();
        }
        let length = self.seal(now, packet, FLAG_BULK)?;
        Some(Transmit { to, length, segment: length, is_bulk: true, in_parts: false })
    }

    /// A challenge to the address where the peer may be.
    #[cold]
    fn challenge(&mut self, now: Instant, buf: &mut [u8]) -> Option<Transmit> {
        let candidate = self.candidate.as_mut()?;
        let token = candidate.challenge(now, CHALLENGE_PACKET)?;
        let to = candidate.address;
        let mut packet = Packet::new(buf, self.limits.datagram);
        let knows = self.current.as_ref().is_some_and(|keys| keys.has(FEATURE_LANES));
        // An earlier version knows no challenge, but a ping brings its token back as well.
        packet.push(&if knows { Frame::Challenge { token } } else { Frame::Ping { token } });
        let length = self.seal(now, packet, 0)?;
        Some(Transmit::one(to, length))
    }

    /// Whether there is a piece to send, and room in the window.
    #[inline]
    pub(crate) fn has_piece(&self) -> bool {
        (self.client.has_large() || self.server.has_large()) && self.finds_piece()
    }

    #[inline(never)]
    fn finds_piece(&self) -> bool {
        // Where thousands of payloads wait for acknowledgements nobody looks at each.
        self.flow.may_send() && (self.client.has_piece() || self.server.has_piece())
    }

    #[inline(never)]
    fn emit_piece(&mut self, now: Instant, packet: &mut Packet<'_>) {
        if !self.flow.may_send() {
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

    /// Seals a packet and gives its length.
    fn seal(&mut self, now: Instant, packet: Packet<'_>, flags: u8) -> Option<usize> {
        let keys = self.current.as_mut()?;
        let (length, left_apart) = (packet.payload_len(), packet.left_apart());
        let (buf, tracked) = packet.finish();
        let flags = flags | if tracked.is_some() { FLAG_TRACKED } else { 0 };
        let label = Label { kind: PacketKind::Data, flags, session: keys.remote_index };
        let number = keys.sealer.next_number();
        match keys.sealer.seal_in_place(label, buf, length) {
            Ok(length) => {
                let length = length + left_apart;
                if let Some(what) = tracked {
                    self.flow.on_sent(now, number, length, what, flags & FLAG_BULK != 0);
                }
                self.on_transmit(length);
                Some(length)
            }
            Err(_) => {
                // Numbers are used up: as good as a silent peer.
                self.go_down(now, DownReason::Silent);
                None
            }
        }
    }

    fn on_transmit(&mut self, bytes: usize) {
        self.counters.sent_packets += 1;
        self.counters.sent_bytes += bytes as u64;
    }

    /// A last packet for the peer: this end forgets the session.
    pub(crate) fn close(&mut self, now: Instant, buf: &mut [u8]) -> Option<Transmit> {
        let to = self.address?;
        self.current.as_ref()?;
        let mut packet = Packet::new(buf, self.limits.datagram);
        packet.push(&Frame::Close { reason: 0 });
        let length = self.seal(now, packet, 0)?;
        Some(Transmit::one(to, length))
    }
}
