//! What happens to calls of ours: answers, losses, time, the peer's end.

use super::output::{GRANT_PAUSE, PIECES_PAUSE};
use super::{
    Active, Assembly, Body, CallError, CallId, Client, Instant, Link, PARKED_PROBE, PROBE, Pause,
    QUEUED, ReplyVerdict, Rtt, SlotHead, State, Status, Waiting,
};
use crate::session::flow::Tracked;
use crate::session::payload::Data;
use alloc::boxed::Box;
use alloc::vec::Vec;
use conet_wire::session::frame::Lane;
use core::cmp::Reverse;

impl Client {
    /// Takes a reply that fits one frame.
    pub(crate) fn on_reply(
        &mut self,
        now: Instant,
        head: SlotHead,
        status: Status,
        data: &[u8],
        rtt: &mut Rtt,
    ) {
        let slot = self.slots.get_mut(usize::from(head.slot));
        // A reply in pieces has no frame of its own.
        let slot = slot.filter(|_| data.len() == head.total as usize);
        let slot = slot.and_then(|slot| {
            (slot.slot.on_reply(head.sequence) == ReplyVerdict::Complete).then_some(slot)
        });
        let Some(slot) = slot else {
            self.stale_replies += 1;
            return;
        };
        // One that is longer than we take is none; that is no business of its server's.
        let status = if data.len() > self.limits.payload { Status::Lost } else { status };
        let is_result = matches!(status, Status::Done | Status::Stopped);
        if is_result
            && let State::Active(active) = &mut slot.state
            && active.reply.is_none()
            && let Body::Whole(bytes) = &mut active.body
        {
            // As nearly all: the result goes where the call was.
            self.pool.refill(bytes, data);
            if let Some(ended) = self.ended.add() {
                ended.id = active.id.0;
                ended.bytes = core::mem::take(bytes);
            }
            if let Some(sent) = active.first_sent.filter(|_| !active.repeated) {
                rtt.on_upper_bound(now.since(sent));
            }
            self.active -= 1;
        } else if let Some(active) = self.take_active(head.slot) {
            let whole = matches!(active.body, Body::Whole(_));
            if let Some(sent) = active.first_sent.filter(|_| !active.repeated && whole) {
                rtt.on_upper_bound(now.since(sent));
            }
            let result = match status {
                Status::Done | Status::Stopped => Ok(self.pool.copy(data)),
                Status::Cancelled => Err(CallError::Cancelled),
                Status::Refused => Err(CallError::Refused),
                Status::Aborted => Err(CallError::Aborted),
                Status::Lost => Err(CallError::Unknown),
            };
            self.finish(head.slot, head.sequence, active, result);
        }
        self.give_back(head.slot);
    }

    /// Takes the call out of a slot, which its caller gives another state.
    fn take_active(&mut self, number: u16) -> Option<Active> {
        let slot = self.slots.get_mut(usize::from(number))?;
        if !matches!(slot.state, State::Active(_)) {
            return None;
        }
        match core::mem::replace(&mut slot.state, State::Held) {
            State::Active(active) => {
                self.active -= 1;
                Some(active)
            }
            State::Free | State::Held | State::Draining { .. } => None,
        }
    }

    /// Ends a call for its caller.
    fn finish(
        &mut self,
        number: u16,
        sequence: u64,
        active: Active,
        result: Result<Vec<u8>, CallError>,
    ) {
        self.pool.put(match active.body {
            Body::Whole(bytes) => bytes,
            Body::Pieces(body) => {
                self.large.retain(|&large| large != number);
                body.into_bytes()
            }
        });
        self.give_up_assembly(number, sequence, active.reply);
        self.ended.tell(active.id, result);
        self.grant(None);
    }

    /// Lets replies go on for which there is memory now; the ones that may are asked for
    /// at once, which tells the server. Without a time that happens when one is due.
    fn grant(&mut self, now: Option<Instant>) {
        while let Some((number, _)) = self.grants.grant(|_| true) {
            let Some(slot) = self.slots.get_mut(usize::from(number)) else { continue };
            let State::Active(active) = &mut slot.state else { continue };
            if let Some(reply) = &mut active.reply {
                reply.grant();
            }
            self.ask_at(number, now.unwrap_or(Instant::START), GRANT_PAUSE);
            self.say(number);
        }
    }

    /// Where bytes of a large reply belong; see [`Assembly::room`].
    pub(crate) fn place_of(
        &mut self,
        head: SlotHead,
        offset: usize,
        most: usize,
    ) -> Option<&mut [u8]> {
        let slot = self.slots.get_mut(usize::from(head.slot))?;
        let is_same = slot.slot.sequence() == head.sequence && slot.slot.is_waiting();
        let State::Active(active) = &mut slot.state else { return None };
        let reply = active.reply.as_mut().filter(|_| is_same)?;
        if reply.total() == head.total as usize { reply.room(offset, most) } else { None }
    }

    /// Takes a piece of a large reply; says whether it may be acknowledged.
    pub(crate) fn on_piece(
        &mut self,
        now: Instant,
        head: SlotHead,
        offset: usize,
        data: Data<'_>,
    ) -> bool {
        let SlotHead { slot: number, sequence, total } = head;
        let (total, lanes) = (total as usize, self.lanes);
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return true };
        if sequence != slot.slot.sequence() || !slot.slot.is_waiting() {
            // Of a call that has ended: the server need not send it again.
            self.stale_replies += 1;
            return sequence <= slot.slot.sequence();
        }
        let State::Active(active) = &mut slot.state else {
            let State::Draining { due, .. } = slot.state else { return true };
            // Draining: any sign that it ran is an answer. But a server that waits for grants keeps
            // the reply, and with enough of them takes no calls, until it is told that nobody
            // wants it: the next CANCEL does.
            if !lanes {
                slot.slot.on_reply(sequence);
                self.give_back(number);
            } else if due > now + PROBE / 2 {
                self.ask_at(number, now, Pause::of(PROBE / 4));
            }
            return true;
        };
        if active.reply.is_none() {
            if total > self.limits.payload {
                // It will never be taken: the server need not keep it.
                self.abandon(now, usize::from(number), CallError::Unknown, CallError::Unknown);
                return true;
            }
            let Some(granted) = self.grants.begin(number, sequence, total, !lanes) else {
                return false;
            };
            let bytes = self.pool.take_large(total);
            let mut reply = Box::new(Assembly::new(total, granted, bytes));
            reply.is_whole = !lanes;
            active.reply = Some(reply);
        }
        let Some(reply) = &mut active.reply else { return false };
        if reply.total() != total || reply.insert(offset, data).is_err() {
            return false;
        }
        if reply.is_complete() {
            slot.slot.on_reply(sequence);
            if let Some(mut active) = self.take_active(number) {
                let mut bytes = Vec::new();
                if let Some(reply) = active.reply.take() {
                    let (total, granted) = (reply.total(), reply.granted());
                    self.grants.end(number, sequence, total, granted, reply.is_whole);
                    bytes = reply.into_bytes();
                }
                self.finish(number, sequence, active, Ok(bytes));
            }
            self.give_back(number);
            return true;
        }
        // The server sends on its own; ask only if it stops.
        let at = now + PIECES_PAUSE;
        // A grant that is to be said is not put off.
        if !slot.in_outbox && active.due.is_none_or(|due| due + PIECES_PAUSE / 2 < at) {
            self.ask_at(number, at, Pause::of(PROBE));
        }
        self.grant(Some(now));
        true
    }

    /// The server works on it: it is parked.
    pub(crate) fn on_working(&mut self, now: Instant, number: u16, sequence: u64) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        if sequence != slot.slot.sequence() {
            return;
        }
        let pause = match &slot.state {
            State::Active(active) if active.due.is_some() => active.pause,
            State::Draining { pause, .. } => *pause,
            _ => return,
        };
        let probe = Pause::of(PROBE);
        let pause = if pause < probe { probe } else { pause.longer_parked() };
        // Those that wait long are asked for together.
        let at = pause.min(Pause::of(PARKED_PROBE)).after(now).rounded_up(PROBE);
        self.ask_at(number, at, pause);
    }

    /// More of a call's payload may be sent.
    pub(crate) fn on_grant(&mut self, number: u16, sequence: u64, upto: usize) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        if slot.slot.sequence() == sequence
            && let State::Active(Active { body: Body::Pieces(body), due, .. }) = &mut slot.state
            && body.on_grant(upto)
        {
            *due = None;
        }
    }

    /// A piece arrived at the server, or was lost.
    pub(crate) fn on_piece_fate(&mut self, now: Instant, rtt: &Rtt, what: &Tracked, arrived: bool) {
        let Tracked::Piece { slot: number, sequence, range, .. } = what else { return };
        let Some(slot) = self.slots.get_mut(usize::from(*number)) else { return };
        if slot.slot.sequence() != *sequence {
            return;
        }
        let State::Active(Active { body: Body::Pieces(body), due, .. }) = &mut slot.state else {
            return;
        };
        if !arrived {
            body.on_lost(range.clone());
            self.repeats += 1;
            return;
        }
        body.on_acked(range.clone());
        if (body.is_acked() || body.waits_for_grant()) && due.is_none() {
            let pause = rtt.call_timeout();
            self.ask_at(*number, pause.after(now), pause);
        }
    }

    /// Gives the caller's side of a call up: it never ran if it was never sent.
    pub(crate) fn cancel(&mut self, now: Instant, id: CallId) {
        if !self.drop_queued(id, CallError::Cancelled) {
            let holds = |slot: &super::Slot| matches!(&slot.state, State::Active(active) if active.id == id);
            if let Some(number) = self.slots.iter().position(holds) {
                self.abandon(now, number, CallError::Cancelled, CallError::Unknown);
            }
        }
    }

    /// Ends a call that waits for a slot, and those that wait for it.
    fn drop_queued(&mut self, id: CallId, error: CallError) -> bool {
        for lane in Lane::ALL {
            let queue = &mut self.queue[lane as usize];
            // Ids grow along a queue.
            let Ok(at) = queue.binary_search_by_key(&id, |waiting| waiting.id) else { continue };
            let is_next = |waiting: &Waiting| matches!(waiting.link, Link::Next { .. });
            let length = 1 + queue.iter().skip(at + 1).take_while(|w| is_next(w)).count();
            for waiting in queue.drain(at..at + length) {
                self.queued -= 1;
                self.pool.put(waiting.payload);
                self.ended.tell(waiting.id, Err(error));
            }
            return true;
        }
        false
    }

    /// Ends an active call for its caller, and drains the slot if the server knows of it or
    /// will.
    fn abandon(&mut self, now: Instant, at: usize, unsent: CallError, sent: CallError) {
        let Ok(number) = u16::try_from(at) else { return };
        let Some(active) = self.take_active(number) else { return };
        let Some(slot) = self.slots.get_mut(at) else { return };
        let sequence = slot.slot.sequence();
        let was_sent = active.first_sent.is_some();
        // Where a later call of its row waits for it, the server has to be told that it never
        // comes.
        let drains = was_sent || slot.pins > 0;
        if drains {
            slot.state = State::Draining { due: now, pause: Pause::of(PROBE / 4) };
        } else {
            slot.slot.forget();
        }
        self.finish(number, sequence, active, Err(if was_sent { sent } else { unsent }));
        if drains {
            self.say(number);
        } else {
            self.give_back(number);
        }
    }

    /// Ends calls whose time is up.
    pub(crate) fn expire(&mut self, now: Instant) {
        while let Some((at, id)) = self.deadlines.pop(now) {
            if at == QUEUED {
                self.drop_queued(CallId(id), CallError::Unreachable);
            } else if self.holds(at, id) {
                self.abandon(now, at as usize, CallError::Unreachable, CallError::TimedOut);
            }
        }
        if self.deadlines.is_crowded(self.slots.len() + self.queued) {
            let mut deadlines = core::mem::replace(&mut self.deadlines, super::Timers::new());
            deadlines.retain(|_, (at, id)| match at {
                QUEUED => self.queue.iter().any(|queue| {
                    queue.binary_search_by_key(&CallId(id), |waiting| waiting.id).is_ok()
                }),
                at => self.holds(at, id),
            });
            self.deadlines = deadlines;
        }
    }

    fn holds(&self, at: u32, sequence: u64) -> bool {
        self.slots.get(at as usize).is_some_and(|slot| {
            slot.slot.sequence() == sequence && matches!(slot.state, State::Active(_))
        })
    }

    /// The peer fell silent: calls that may have run end as unknown, the others as
    /// unreachable.
    pub(crate) fn on_unreachable(&mut self, now: Instant) {
        for at in 0..self.slots.len() {
            self.abandon(now, at, CallError::Unreachable, CallError::Unknown);
        }
        for queue in &mut self.queue {
            for waiting in queue.drain(..) {
                self.pool.put(waiting.payload);
                self.ended.tell(waiting.id, Err(CallError::Unreachable));
            }
        }
        self.queued = 0;
    }

    /// The peer restarted: what may have run there is unknown, its slots are clean.
    pub(crate) fn on_peer_restart(&mut self) {
        let mut unsent: Vec<(Lane, Waiting)> = Vec::new();
        for at in 0..self.slots.len() {
            let Ok(number) = u16::try_from(at) else { break };
            let (sequence, in_row, lane) = match self.slots.get(at) {
                Some(slot) => {
                    (slot.slot.sequence(), slot.pins > 0 || slot.after.is_some(), slot.lane)
                }
                None => break,
            };
            let Some(active) = self.take_active(number) else { continue };
            match (active.first_sent, active.body) {
                (None, body) if !in_row => {
                    self.large.retain(|&large| large != number);
                    let payload = match body {
                        Body::Whole(bytes) => bytes,
                        Body::Pieces(body) => body.into_bytes(),
                    };
                    let Active { id, deadline, .. } = active;
                    unsent.push((lane, Waiting { id, payload, deadline, link: Link::Alone }));
                }
                (sent, body) => {
                    let error =
                        if sent.is_some() { CallError::Unknown } else { CallError::Unreachable };
                    let active = Active { body, ..active };
                    self.finish(number, sequence, active, Err(error));
                }
            }
        }
        self.start_anew();
        unsent.sort_by_key(|(_, waiting)| Reverse(waiting.id));
        for (lane, waiting) in unsent {
            self.queued += 1;
            if let Some(at) = waiting.deadline {
                self.deadlines.set(at, (QUEUED, waiting.id.0));
            }
            self.queue[lane as usize].push_front(waiting);
        }
    }

    /// A server that knows of no slot: all of them are free. Sequences go on.
    fn start_anew(&mut self) {
        self.slots.clear();
        self.free.clear();
        self.large.clear();
        self.due.clear();
        self.outbox.clear();
        self.grants.clear();
        self.granted = super::FIRST_SLOTS.min(self.limits.slots);
        self.version = 0;
        self.release = false;
    }

    /// New keys with the same peer: everything that waits is sent again.
    pub(crate) fn on_new_keys(&mut self, now: Instant, rtt: &Rtt) {
        let pause = rtt.call_timeout();
        for at in 0..self.slots.len() {
            let Ok(number) = u16::try_from(at) else { break };
            let asks = self.slots.get(at).is_some_and(|slot| match &slot.state {
                State::Active(active) => active.due.is_some(),
                State::Draining { .. } => true,
                State::Free | State::Held => false,
            });
            if asks {
                self.ask_at(number, now, pause);
                self.say(number);
            }
        }
    }
}
