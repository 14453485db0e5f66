//! Calls that come in pieces; room for them until they are answered, and for replies while
//! they are kept.
//!
//! A call in pieces is granted, or begins, only when there is room for it until it is
//! answered; until then it waits where it is, and its client is not told to go on.

use super::{
    Account, Arc, Assembly, Body, Box, CallVerdict, Data, IncomingId, Kept, Lane, Marks, Say,
    Server, Slot, SlotHead, State, Status, Total, Vec,
};

impl Slot {
    /// Room for the call that arrives here until it is answered; whether it has some.
    pub(super) fn hold(&mut self, calls: &Account) -> bool {
        let State::Assembling { assembly, .. } = &mut self.state else { return true };
        if assembly.taken.is_none() {
            assembly.taken = calls.take(assembly.total());
        }
        assembly.taken.is_some()
    }
}

impl Server {
    /// Draws on what all peers of a hub share; before there is anything.
    pub(crate) fn share(&mut self, total: &Arc<Total>) {
        self.calls = Account::new(self.limits.unanswered, total);
        self.replies = Account::new(self.limits.unanswered, total);
        // What was thawed.
        for slot in &mut self.slots {
            match &mut slot.state {
                State::Assembling { assembly, .. } if assembly.granted() == assembly.total() => {
                    assembly.taken = self.calls.take(assembly.total());
                }
                State::Done(Kept { body: Body::Pieces(body), .. }) => {
                    body.taken = self.replies.take(body.bytes().len());
                }
                _ => {}
            }
        }
        self.grant();
    }

    /// Bytes of calls handed out, and of replies kept, that do not fit a packet.
    pub(crate) fn unanswered(&self) -> (usize, usize) {
        (self.calls.used(), self.replies.used())
    }

    /// Lets calls go on for which there is memory now.
    pub(super) fn grant(&mut self) {
        self.is_short = false;
        loop {
            let Self { grants, slots, calls, is_short, .. } = self;
            let granted = grants.grant(|number| {
                let fits = slots.get_mut(usize::from(number)).is_none_or(|slot| slot.hold(calls));
                *is_short = !fits;
                fits
            });
            let Some((number, _)) = granted else { return };
            let Some(slot) = self.slots.get_mut(usize::from(number)) else { continue };
            if let State::Assembling { assembly, .. } = &mut slot.state {
                if assembly.is_complete() {
                    self.begin_assembled(number);
                } else {
                    assembly.grant();
                    self.say(number, Say::Grant);
                }
            }
        }
    }

    /// A call has arrived and has room until it is answered: it begins.
    pub(super) fn begin_assembled(&mut self, number: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        let lane = slot.lane;
        let state = core::mem::replace(&mut slot.state, State::Idle);
        if let State::Assembling { sequence, mut assembly, whole } = state {
            let total = assembly.total();
            self.grants.end(number, sequence, total, assembly.granted(), whole);
            let taken = assembly.taken.take();
            let head = SlotHead { slot: number, sequence, total: 0 };
            self.begin(head, Marks { lane, after: None }, assembly.into_bytes());
            if let Some(taken) = taken {
                let incarnation = self.incarnation;
                self.held.insert(IncomingId { slot: number, sequence, incarnation }, taken);
            }
        }
    }

    /// Whether calls wait until others are answered.
    #[inline]
    pub(crate) const fn is_short(&self) -> bool {
        self.is_short
    }

    /// Ends the calls for which there is no room; none of them ran.
    #[cold]
    pub(crate) fn refuse_waiting(&mut self) {
        let waiting: Vec<_> = self.grants.waiting().collect();
        for (number, sequence) in waiting {
            let Some(slot) = self.slots.get_mut(usize::from(number)) else { continue };
            if matches!(slot.state, State::Assembling { sequence: now, .. } if now == sequence) {
                self.end_unrun(number, sequence, Status::Refused);
                self.say(number, Say::Reply { tracked: false });
            }
        }
    }

    /// A long call was answered, whoever still waits for that.
    #[inline(never)]
    pub(super) fn release(&mut self, id: IncomingId) {
        if self.held.remove(&id).is_some() {
            self.freed += 1;
            self.grant();
        }
    }

    pub(super) fn drop_assembly(&mut self, number: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        if !matches!(slot.state, State::Assembling { .. }) {
            return;
        }
        let state = core::mem::replace(&mut slot.state, State::Idle);
        if let State::Assembling { sequence, assembly, whole } = state {
            self.grants.end(number, sequence, assembly.total(), assembly.granted(), whole);
            self.pool.put(assembly.into_bytes());
            self.grant();
        }
    }

    pub(super) fn begin_assembly(
        &mut self,
        head: SlotHead,
        lane: Lane,
        total: usize,
        whole: bool,
    ) -> bool {
        self.drop_assembly(head.slot);
        let Some(granted) = self.grants.begin(head.slot, head.sequence, total, whole) else {
            return false;
        };
        let Some(slot) = self.slots.get_mut(usize::from(head.slot)) else { return false };
        // A reply that is still to be said is not needed: the client uses its slot again.
        let bytes = self.pool.take_large(total);
        let old = core::mem::replace(
            &mut slot.state,
            State::Assembling {
                sequence: head.sequence,
                assembly: Box::new(Assembly::new(total, granted, bytes)),
                whole,
            },
        );
        if slot.say.take().is_some() {
            let number = head.slot;
            self.outbox.retain(|_, waiting| waiting != number);
        }
        slot.lane = lane;
        if let State::Done(kept) = old {
            self.put_back(head.slot, kept);
        }
        true
    }

    /// The reply of a slot is not kept any longer.
    pub(super) fn put_back(&mut self, number: u16, kept: Kept) {
        // Thousands of others may be on their way, and most replies are short ones.
        if matches!(kept.body, Body::Pieces(_)) {
            self.large.retain(|&large| large != number);
        }
        self.pool.put(kept.body.into_bytes());
    }

    /// Ends a call that has not begun to run, and never will.
    #[cold]
    pub(super) fn end_unrun(&mut self, number: u16, sequence: u64, status: Status) {
        self.drop_assembly(number);
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        slot.slot.on_call(sequence);
        slot.slot.on_done(sequence);
        let kept = Kept { status, body: Body::Whole(Vec::new()) };
        let old = core::mem::replace(&mut slot.state, State::Done(kept));
        if let State::Done(kept) = old {
            self.put_back(number, kept);
        }
        self.on_ended(number);
    }

    /// Takes a piece of a large call; says whether it may be acknowledged.
    pub(crate) fn on_piece(
        &mut self,
        head: SlotHead,
        lane: Lane,
        offset: usize,
        data: Data<'_>,
    ) -> bool {
        let (total, lanes, longest) = (head.total as usize, self.lanes, self.limits.payload);
        let Some(slot) = self.slot(head.slot) else { return false };
        let mut ahead = slot.slot;
        match ahead.on_call(head.sequence) {
            CallVerdict::Execute if total > longest => {
                // Taken, so that it does not come again.
                self.end_unrun(head.slot, head.sequence, Status::Refused);
                self.say(head.slot, Say::Reply { tracked: false });
                return true;
            }
            CallVerdict::Execute => {}
            // Its call is known already; the client need not send it again.
            CallVerdict::Working | CallVerdict::RepeatReply | CallVerdict::Stale => {
                self.duplicates += 1;
                return true;
            }
            CallVerdict::Overrun => return false,
        }
        let begun = match &slot.state {
            State::Assembling { sequence, .. } if *sequence > head.sequence => return true,
            State::Assembling { sequence, .. } => *sequence == head.sequence,
            _ => false,
        };
        if !begun && !self.begin_assembly(head, lane, total, !lanes) {
            self.refused_pieces += 1;
            return false;
        }
        let Some(slot) = self.slots.get_mut(usize::from(head.slot)) else { return false };
        let State::Assembling { assembly, .. } = &mut slot.state else { return false };
        if begun && assembly.is_complete() {
            // It waits for room.
            return true;
        }
        if assembly.total() != total || assembly.insert(offset, data).is_err() {
            return false;
        }
        if assembly.is_complete() {
            if slot.hold(&self.calls) {
                self.begin_assembled(head.slot);
            } else {
                self.grants.wait(head.slot, head.sequence);
            }
        }
        self.grant();
        true
    }

    /// A call has ended whose reply there is no room for, or which nobody wants.
    #[cold]
    pub(super) fn end_without_reply(&mut self, number: u16, told_to_wait: bool) {
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            let body = Body::Whole(Vec::new());
            slot.turn(State::Done(Kept { status: Status::Lost, body }));
        }
        self.say(number, Say::Reply { tracked: told_to_wait });
        self.unpark(told_to_wait);
        self.on_ended(number);
    }
}
