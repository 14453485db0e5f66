//! What a peer is sent: one datagram after the other, most urgent first.
//!
//! Acknowledgements and keep-alives, then answers, then calls, then one piece of a
//! large payload: whoever waits for a microsecond does not queue behind a bulk.

use super::{DownReason, Peer};
use crate::session::packet::Packet;
use crate::session::protect::Label;
use crate::time::Instant;
use conet_wire::session::frame::Frame;
use conet_wire::session::{FLAG_TRACKED, PacketKind};
use std::net::SocketAddr;

impl Peer {
    /// Writes the next datagram into `buf` and says where it goes.
    pub(crate) fn poll_transmit(&mut self, now: Instant, buf: &mut Vec<u8>) -> Option<SocketAddr> {
        if let Some((to, packet)) = self.handshake_out.pop_front() {
            buf.clear();
            buf.extend_from_slice(&packet);
            self.on_transmit(buf.len());
            return Some(to);
        }
        let to = self.address?;
        self.current.as_ref()?;
        let mut packet = Packet::new(buf, self.limits.datagram);
        if self.arrivals.is_due() {
            packet.push(&Frame::Ack(self.arrivals.take(now)));
        }
        if self.ping_due && packet.push(&Frame::Ping { token: self.pings }) {
            self.pinged = Some((self.pings, now));
            self.pings += 1;
            self.ping_due = false;
        }
        if let Some(token) = self.pong_due.take() {
            packet.push(&Frame::Pong { token });
        }
        if self.server.emit(&mut packet) && self.client.emit(now, &mut packet) {
            self.emit_piece(now, &mut packet);
        }
        if packet.payload_len() == 0 {
            return None;
        }
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
        self.server.emit_piece(packet);
        if packet.tracked.is_none() {
            self.client.emit_piece(now, packet);
        }
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
