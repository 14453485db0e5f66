//! What a packet's frames mean for a peer.

use super::places::Piece;
use super::{BulkPort, DownReason, FEATURE_BULK, Find, Peer, PublicKey, Which};
use crate::session::payload::Data;
use crate::time::Instant;
use conet_wire::session::frame::{Direction, Frame, Frames, Marks, Message, Says};

impl Peer {
    /// Handles every frame; says whether all that was tracked was taken.
    pub(super) fn on_frames(&mut self, now: Instant, which: Which, payload: &[u8]) -> bool {
        let mut taken = true;
        let mut frames = Frames::new(payload);
        loop {
            while let Some(Message { head, what, data }) = frames.next_message() {
                match what {
                    Says::Call(marks) => self.server.on_call(head, marks, data),
                    Says::Reply(status) => {
                        self.client.on_reply(now, head, status, data, &mut self.rtt);
                    }
                }
            }
            match frames.next() {
                None => return taken,
                Some(Ok(frame)) => taken &= self.on_frame(now, which, frame),
                Some(Err(_)) => {
                    self.counters.malformed += 1;
                    return false;
                }
            }
            if !self.is_up() {
                return false;
            }
        }
    }

    #[inline(never)]
    fn on_frame(&mut self, now: Instant, which: Which, frame: Frame<'_>) -> bool {
        match frame {
            // Messages but for a flag that none of ours leaves out.
            Frame::Call { head, data } => self.server.on_call(head, Marks::default(), data),
            Frame::Marked { head, marks, data } => self.server.on_call(head, marks, data),
            Frame::Reply { head, status, data } => {
                self.client.on_reply(now, head, status, data, &mut self.rtt);
            }
            Frame::Chunk { head, direction: Direction::Call, lane, offset, data } => {
                let piece = Piece { head, direction: Direction::Call, lane, offset };
                return self.on_piece(now, piece, Data::Here(data));
            }
            Frame::Chunk { head, direction: Direction::Reply, lane, offset, data } => {
                let piece = Piece { head, direction: Direction::Reply, lane, offset };
                return self.on_piece(now, piece, Data::Here(data));
            }
            _ => self.on_rare_frame(now, which, frame),
        }
        true
    }

    fn on_proof(&mut self, now: Instant, token: u64) {
        if let Some(candidate) = self.candidate.take_if(|one| one.proves(token)) {
            self.move_to(now, candidate.address);
        }
    }

    /// Frames that come beside calls; apart, as in [`Self::poll_transmit`].
    #[inline(never)]
    fn on_rare_frame(&mut self, now: Instant, which: Which, frame: Frame<'_>) {
        match frame {
            Frame::Working { slot, sequence } => self.client.on_working(now, slot, sequence),
            Frame::Cancel { slot, sequence } => self.server.on_cancel(slot, sequence),
            Frame::Grant { slot, sequence, direction: Direction::Call, upto } => {
                self.client.on_grant(slot, sequence, upto as usize);
            }
            Frame::Grant { slot, sequence, direction: Direction::Reply, upto } => {
                self.server.on_grant(slot, sequence, upto as usize);
            }
            Frame::Slots { version, count } => self.client.on_slots(version, count),
            Frame::Release { version, count, floor } => {
                self.server.on_release(version, count, floor);
            }
            Frame::Ack(ack) if which == Which::Current => {
                let mut fates = core::mem::take(&mut self.fates);
                self.flow.on_ack(now, &ack.into(), &mut self.rtt, &mut fates);
                self.on_fates(now, fates);
            }
            Frame::Seen(seen) if which == Which::Current => {
                let mut fates = core::mem::take(&mut self.fates);
                let arrived = self.flow.on_ack(now, &seen.to_seen(), &mut self.rtt, &mut fates);
                self.bulk.on_arrived(now, arrived);
                self.on_fates(now, fates);
            }
            Frame::Ping { token } => self.pong_due = Some(token),
            Frame::Pong { token } => {
                if let Some((_, at)) = self.pinged.take_if(|(asked, _)| *asked == token) {
                    self.rtt.on_sample(now.since(at));
                }
                self.on_proof(now, token);
            }
            Frame::Challenge { token } => {
                self.proof_due = Some(token);
                self.on_followed(now);
            }
            Frame::Bulk { port, buffer } => {
                let may = which == Which::Current && self.bulk.ours.is_some();
                if may && self.current.as_ref().is_some_and(|keys| keys.has(FEATURE_BULK)) {
                    self.bulk.on_port(BulkPort { port, buffer }, self.limits.datagram);
                }
            }
            Frame::Proof { token } => {
                self.bulk.on_proof(now, token);
                self.on_proof(now, token);
            }
            Frame::Close { .. } => {
                if which == Which::Current {
                    self.go_down(now, DownReason::Closed);
                }
            }
            Frame::Where { key } => self.finds.push(Find::Asked(PublicKey(*key))),
            Frame::There { key, address } => {
                self.finds.push(Find::Told(PublicKey(*key), address));
            }
            // Of earlier keys, or nothing to do; or a call's, which does not come here.
            Frame::Ack(_) | Frame::Seen(_) | Frame::Padding { .. } => {}
            Frame::Call { .. }
            | Frame::Marked { .. }
            | Frame::Reply { .. }
            | Frame::Chunk { .. } => {}
        }
    }
}
