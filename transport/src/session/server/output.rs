//! What answers put into packets, and what becomes of it.

use super::{Body, Direction, Frame, Kept, Lane, Packet, Say, Server, SlotHead, State, Status};
use crate::session::client::{Piece, choose, granted, push_piece};
use crate::session::flow::Tracked;

impl Server {
    #[inline]
    pub(crate) const fn has_slots_to_say(&self) -> bool {
        self.say_slots
    }

    /// Says how many slots there are again, if the client has not obeyed.
    pub(crate) fn remind(&mut self) {
        let is_beyond = self.version > 0 && self.slots.len() > self.granted;
        self.say_slots |= self.lanes && (is_beyond || !self.is_obeyed);
    }

    /// The SLOTS to say.
    #[inline]
    pub(crate) fn take_slots(&mut self) -> Option<Frame<'static>> {
        if !self.say_slots {
            return None;
        }
        self.say_slots = false;
        let count = u32::try_from(self.granted).unwrap_or(u32::MAX);
        Some(Frame::Slots { version: self.version, count })
    }

    /// Puts waiting answers of `lane` into `packet`; `false` if one did not fit.
    pub(crate) fn emit(&mut self, lane: Lane, packet: &mut Packet<'_>) -> bool {
        if !self.outbox.lanes().has(lane) {
            return true;
        }
        let (mut said, mut fits) = (0, true);
        while let Some(number) = self.outbox.get(lane, said) {
            fits = self.emit_one(number, packet);
            if !fits {
                break;
            }
            said += 1;
        }
        self.outbox.forget(lane, said);
        fits
    }

    /// Puts a slot's answer into `packet`; `false` if it did not fit.
    #[inline(always)]
    fn emit_one(&mut self, number: u16, packet: &mut Packet<'_>) -> bool {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return true };
        let sequence = slot.slot.sequence();
        let fits = match (slot.say, &slot.state) {
            (
                Some(Say::Reply { tracked }),
                State::Done(Kept { status, body: Body::Whole(data) }),
            ) => {
                let total = u32::try_from(data.len()).unwrap_or(u32::MAX);
                let head = SlotHead { slot: number, sequence, total };
                let fits = !(tracked && packet.tracked.is_some())
                    && packet.push(&Frame::Reply { head, status: *status, data });
                if tracked && fits {
                    packet.tracked = Some(Tracked::Reply { slot: number, sequence });
                }
                fits
            }
            (Some(Say::Working), State::Running { .. } | State::Waiting { .. }) => {
                packet.push(&Frame::Working { slot: number, sequence })
            }
            (Some(Say::Ended), _) => {
                let head = SlotHead { slot: number, sequence, total: 0 };
                packet.push(&Frame::Reply { head, status: Status::Cancelled, data: &[] })
            }
            (Some(Say::Grant), State::Assembling { sequence, assembly, .. }) => {
                let (direction, upto) = (Direction::Call, granted(assembly));
                packet.push(&Frame::Grant { slot: number, sequence: *sequence, direction, upto })
            }
            // What was to be said is no longer true.
            _ => true,
        };
        if fits {
            slot.say = None;
        }
        fits
    }

    /// The piece of a large reply that should go next.
    pub(crate) fn best_piece(&self, oldest: bool) -> Option<Piece> {
        choose(self.pieces(), oldest)
    }

    fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.large.iter().filter_map(|&number| {
            let slot = self.slots.get(usize::from(number))?;
            let State::Done(Kept { body: Body::Pieces(body), .. }) = &slot.state else {
                return None;
            };
            let (lane, remaining) = (slot.lane, body.remaining());
            let piece = Piece { lane, remaining, sequence: slot.slot.sequence(), slot: number };
            body.has_piece().then_some(piece)
        })
    }

    /// Puts a piece of the large reply in slot `number` into `packet`.
    pub(crate) fn emit_piece(&mut self, number: u16, packet: &mut Packet<'_>) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        let sequence = slot.slot.sequence();
        let lane = if self.lanes { slot.lane } else { Lane::Calls };
        let State::Done(Kept { body: Body::Pieces(body), .. }) = &mut slot.state else { return };
        let tracked = push_piece(packet, body, Direction::Reply, lane, number, sequence);
        if tracked.is_some() {
            packet.tracked = tracked;
        }
    }

    /// The bytes of the reply in slot `number`, if it is still the one that is meant.
    pub(crate) fn payload(&self, number: u16, sequence: u64) -> Option<&[u8]> {
        let slot = self.slots.get(usize::from(number))?;
        match &slot.state {
            State::Done(Kept { body: Body::Pieces(body), .. })
                if slot.slot.sequence() == sequence =>
            {
                Some(body.bytes())
            }
            _ => None,
        }
    }

    /// Whether there is a large reply, with a piece to send or without.
    #[inline]
    pub(crate) const fn has_large(&self) -> bool {
        !self.large.is_empty()
    }

    pub(crate) fn has_piece(&self) -> bool {
        self.pieces().next().is_some()
    }

    /// The client has memory for more of a reply.
    pub(crate) fn on_grant(&mut self, number: u16, sequence: u64, upto: usize) {
        if let Some(slot) = self.slots.get_mut(usize::from(number))
            && slot.slot.sequence() == sequence
            && let State::Done(Kept { body: Body::Pieces(body), .. }) = &mut slot.state
        {
            body.on_grant(upto);
        }
    }

    /// A tracked packet of ours arrived at the client, or was lost.
    pub(crate) fn on_fate(&mut self, what: &Tracked, arrived: bool) {
        let (Tracked::Piece { slot: number, sequence, .. }
        | Tracked::Reply { slot: number, sequence }) = what;
        let Some(slot) = self.slots.get_mut(usize::from(*number)) else { return };
        if slot.slot.sequence() != *sequence {
            return;
        }
        let State::Done(kept) = &mut slot.state else { return };
        match (what, &mut kept.body) {
            (Tracked::Piece { range, .. }, Body::Pieces(body)) if arrived => {
                body.on_acked(range.clone());
                if body.is_acked() {
                    self.delivered(*number);
                }
            }
            (Tracked::Piece { range, .. }, Body::Pieces(body)) => body.on_lost(range.clone()),
            (Tracked::Reply { .. }, _) if !arrived => {
                self.say(*number, Say::Reply { tracked: true });
            }
            _ => {}
        }
    }

    /// The client has a slot's reply, if there is one.
    pub(super) fn delivered(&mut self, number: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        if matches!(slot.state, State::Done(_))
            && let State::Done(kept) = core::mem::replace(&mut slot.state, State::Delivered)
        {
            self.put_back(number, kept);
        }
    }
}
