//! The answering half of a session: each call runs at most once.
//!
//! ```text
//! Idle ──pieces──► Assembling ──whole──► Running ──reply──► Done ──newer call──► …
//!                       of a row ──► Waiting ──┘ │            │
//!                            same call: WORKING ─┘            └─ same call: the reply again
//! ```
//!
//! A reply is kept until the client uses its slot again. One that fits a packet is
//! sent again when the client asks again, unless the client was told to wait: then
//! it asks rarely, so the reply is tracked and repeated from here. A larger one goes
//! in tracked pieces, and its bytes are freed when all have arrived.
//!
//! A call that takes another one's result waits until that one has ended. Only results
//! that fit a packet are passed on: whatever is lost on the way, the same calls run.
//!
//! Slots grow as calls are parked, so that patient calls leave room for others, and
//! shrink again. What a released slot has seen is kept as one number, the floor.
//!
//! Invariants: a sequence is handed out for execution once; memory is bounded by
//! [`Limits::assembling`] for what arrives, by [`Limits::unanswered`] for what was handed
//! out and what is kept where it is longer than a packet, and by the slots else; a
//! reply to a call of an earlier incarnation goes nowhere.

use super::budget::{Account, Taken, Total};
use super::client::{FIRST_SLOTS, fits_one_packet};
use super::grants::Grants;
use super::handshake::PublicKey;
use super::hub::Event;
use super::limits::Limits;
use super::outbox::Outbox;
use super::packet::Packet;
use super::payload::{Assembly, Data, Outgoing, UNASKED};
use super::pool::Pool;
use super::queue::Queue;
use super::slots::{CallVerdict, ServerSlot};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use conet_wire::session::frame::{After, Direction, Frame, Lane, Marks, SlotHead, Status};

mod freeze;
mod output;
mod places;
mod room;
mod row;

/// A call of the peer's.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct IncomingId {
    pub(crate) slot: u16,
    pub(crate) sequence: u64,
    pub(crate) incarnation: u64,
}

/// Why a reply was not taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ReplyError {
    /// The call was answered before, or its client is gone; nobody waits.
    #[error("nobody waits for this reply")]
    Stale,
    /// The payload is longer than [`Limits::payload`]; the caller's fault. The call
    /// still waits for a reply.
    #[error("reply is too long")]
    TooLong,
    /// More replies are kept than [`Limits::unanswered`] allows: the client has asked for too
    /// many at once. To it the call has ended as unknown.
    #[error("no memory for this reply: too many wait for their client")]
    Full,
}

#[derive(Debug)]
pub(crate) enum Body {
    Whole(Vec<u8>),
    /// Apart: most replies are small ones, and are moved from place to place.
    Pieces(Box<Outgoing>),
}

#[derive(Debug)]
struct Kept {
    status: Status,
    body: Body,
}

#[derive(Debug)]
enum State {
    Idle,
    Assembling {
        sequence: u64,
        assembly: Box<Assembly>,
        whole: bool,
    },
    /// For the result of another call.
    Waiting {
        after: After,
        payload: Vec<u8>,
        told_to_wait: bool,
    },
    Running {
        told_to_wait: bool,
        cancelled: bool,
    },
    Done(Kept),
    /// The whole reply has arrived at the client, or there is none to send.
    Delivered,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Say {
    Reply {
        tracked: bool,
    },
    Working,
    /// More of the call may come.
    Grant,
    /// It has ended, whatever it said: for a client that gave it up.
    Ended,
}

/// What goes to whoever runs calls.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    slot: u16,
    sequence: u64,
    incarnation: u64,
    lane: Lane,
    payload: Vec<u8>,
    argument: Vec<u8>,
    what: What,
}

#[derive(Clone, Copy, Debug, Default)]
enum What {
    #[default]
    Call,
    /// With an argument.
    CallInRow,
    Cancelled,
}

#[derive(Debug)]
struct Slot {
    slot: ServerSlot,
    state: State,
    lane: Lane,
    say: Option<Say>,
    /// A slot whose call waits for this one's result, and another that waits for the same as
    /// this one: so who waits is found without a search.
    first_waiting: Option<u16>,
    next_waiting: Option<u16>,
}

impl Slot {
    const fn new(slot: ServerSlot, state: State, lane: Lane) -> Self {
        Self { slot, state, lane, say: None, first_waiting: None, next_waiting: None }
    }

    /// Gives it another state where the old one owns no memory, or no longer, so that nobody
    /// looks for some: a call goes through three of them.
    #[inline]
    fn turn(&mut self, state: State) {
        debug_assert!(match &self.state {
            State::Idle | State::Running { .. } | State::Delivered => true,
            State::Waiting { payload: bytes, .. }
            | State::Done(Kept { body: Body::Whole(bytes), .. }) => bytes.capacity() == 0,
            State::Done(_) | State::Assembling { .. } => false,
        });
        core::mem::forget(core::mem::replace(&mut self.state, state));
    }
}

/// All calls of the peer.
#[derive(Debug)]
pub(crate) struct Server {
    limits: Limits,
    incarnation: u64,
    slots: Vec<Slot>,
    pub(super) outbox: Outbox,
    grants: Grants,
    /// Room for calls that were handed out, of earlier incarnations as well.
    held: BTreeMap<IncomingId, Taken>,
    calls: Account,
    replies: Account,
    /// Calls wait until others are answered.
    is_short: bool,
    /// Long calls that were answered.
    pub(super) freed: u64,
    /// Slots with a reply in pieces on its way.
    large: Vec<u16>,
    parked: usize,
    granted: usize,
    version: u32,
    say_slots: bool,
    /// The client has said that it knows how many slots there are.
    is_obeyed: bool,
    floor: u64,
    lanes: bool,
    /// Calls to run, once each, and those of them that are no longer wanted.
    pub(crate) asked: Queue<Asked>,
    pub(crate) pool: Pool,
    pub(crate) executions: u64,
    pub(crate) duplicates: u64,
    pub(crate) refused_pieces: u64,
}

impl Server {
    pub(crate) fn new(limits: Limits) -> Self {
        let total = Total::new(limits.unanswered_by_all);
        Self {
            limits,
            incarnation: 0,
            slots: Vec::new(),
            outbox: Outbox::default(),
            grants: Grants::new(limits.assembling, limits.payload),
            held: BTreeMap::new(),
            calls: Account::new(limits.unanswered, &total),
            replies: Account::new(limits.unanswered, &total),
            is_short: false,
            freed: 0,
            large: Vec::new(),
            parked: 0,
            granted: FIRST_SLOTS.min(limits.slots),
            version: 0,
            say_slots: false,
            is_obeyed: true,
            floor: 0,
            lanes: false,
            asked: Queue::default(),
            pool: Pool::default(),
            executions: 0,
            duplicates: 0,
            refused_pieces: 0,
        }
    }

    pub(crate) const fn set_lanes(&mut self, lanes: bool) {
        self.lanes = lanes;
    }

    /// Calls of the peer's that run or wait, and were told so.
    pub(crate) const fn parked(&self) -> usize {
        self.parked
    }

    /// Bytes set aside for payloads that arrive in part.
    pub(crate) const fn set_aside(&self) -> usize {
        self.grants.used()
    }

    /// Slots that exist.
    pub(crate) const fn slots_in_use(&self) -> usize {
        self.slots.len()
    }

    /// The client started anew: nothing of its earlier life counts.
    pub(crate) fn on_peer_restart(&mut self, incarnation: u64) {
        self.incarnation = incarnation;
        self.slots.clear();
        self.outbox.clear();
        self.grants.clear();
        self.is_short = false;
        self.large.clear();
        self.parked = 0;
        self.granted = FIRST_SLOTS.min(self.limits.slots);
        self.version = 0;
        self.say_slots = false;
        self.is_obeyed = true;
        self.floor = 0;
    }

    #[inline]
    fn slot(&mut self, number: u16) -> Option<&mut Slot> {
        let at = usize::from(number);
        if at >= self.slots.len() {
            self.make_slots(at)?;
        }
        self.slots.get_mut(at)
    }

    #[cold]
    fn make_slots(&mut self, upto: usize) -> Option<()> {
        if upto >= self.limits.slots {
            return None;
        }
        while self.slots.len() <= upto {
            let slot = ServerSlot::resume(self.floor, false);
            self.slots.push(Slot::new(slot, State::Idle, Lane::Calls));
        }
        Some(())
    }

    #[inline]
    fn say(&mut self, number: u16, say: Say) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        let waits = slot.say.is_some();
        // A duplicate question must not make a tracked reply an untracked one.
        if slot.say != Some(Say::Reply { tracked: true }) || say == Say::Ended {
            slot.say = Some(say);
        }
        if !waits {
            self.outbox.push(slot.lane, number);
        }
    }

    /// Takes a CALL or MARKED: a whole call, or the question how a large one stands.
    pub(crate) fn on_call(&mut self, head: SlotHead, marks: Marks, data: &[u8]) {
        let longest = self.limits.payload;
        let whole = data.len() == head.total as usize && data.len() <= longest;
        let at = usize::from(head.slot);
        if at >= self.slots.len() && self.make_slots(at).is_none() {
            return;
        }
        let Some(slot) = self.slots.get_mut(at) else { return };
        let mut ahead = slot.slot;
        match ahead.on_call(head.sequence) {
            CallVerdict::Execute => {
                if !whole && head.total as usize > longest {
                    self.end_unrun(head.slot, head.sequence, Status::Refused);
                    self.say(head.slot, Say::Reply { tracked: false });
                    return;
                }
                if !whole {
                    let comes = matches!(&slot.state, State::Assembling { sequence, .. } if *sequence == head.sequence);
                    if comes && self.lanes {
                        self.say(head.slot, Say::Grant);
                    }
                    return;
                }
                if self.replies.is_half_full() && marks.lane != Lane::Control {
                    // It comes again.
                    return;
                }
                let (State::Done(Kept { body: Body::Whole(bytes), .. }), None) =
                    (&mut slot.state, slot.say)
                else {
                    let payload = self.pool.copy(data);
                    self.begin(head, marks, payload);
                    return;
                };
                // The client has the last reply of this slot, whose memory is free.
                self.pool.refill(bytes, data);
                let payload = core::mem::take(bytes);
                slot.slot = ahead;
                slot.lane = marks.lane;
                self.run(head.slot, marks, payload);
                return;
            }
            CallVerdict::Working => {
                self.park(head.slot);
                self.say(head.slot, Say::Working);
                // Lost, it would leave the client without slots for as long as its calls take.
                self.say_slots |= self.lanes && !self.is_obeyed;
            }
            CallVerdict::RepeatReply => {
                let is_whole =
                    matches!(&slot.state, State::Done(Kept { body: Body::Whole(_), .. }));
                if is_whole {
                    self.say(head.slot, Say::Reply { tracked: false });
                }
            }
            CallVerdict::Stale | CallVerdict::Overrun => {}
        }
        self.duplicates += 1;
    }

    /// Counts a call as one that takes long.
    fn park(&mut self, number: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        if let State::Running { told_to_wait, .. } | State::Waiting { told_to_wait, .. } =
            &mut slot.state
            && !*told_to_wait
        {
            *told_to_wait = true;
            self.parked += 1;
            if self.parked + FIRST_SLOTS / 2 > self.granted {
                self.resize();
            }
        }
    }

    #[inline]
    fn unpark(&mut self, told_to_wait: bool) {
        if told_to_wait {
            self.parked -= 1;
            // Not at once again: only when far too many.
            if self.granted > FIRST_SLOTS && self.parked * 8 + FIRST_SLOTS < self.granted {
                self.resize();
            }
        }
    }

    fn resize(&mut self) {
        let wanted = (self.parked * 2 + FIRST_SLOTS).min(self.limits.slots);
        if self.lanes && wanted != self.granted {
            self.granted = wanted;
            self.version = self.version.wrapping_add(1);
            self.say_slots = true;
            self.is_obeyed = false;
        }
    }

    /// The client has given slots back.
    pub(crate) fn on_release(&mut self, version: u32, count: u32, floor: u64) {
        let count = count as usize;
        self.is_obeyed |= version == self.version;
        if version != self.version || count != self.granted || count >= self.slots.len() {
            return;
        }
        let beyond = self.slots.get(count..).unwrap_or_default();
        let is_idle = |slot: &Slot| {
            let is_at_rest = matches!(slot.state, State::Idle | State::Done(_) | State::Delivered);
            is_at_rest && slot.first_waiting.is_none()
        };
        if !beyond.iter().all(is_idle) {
            return;
        }
        self.floor = self.floor.max(floor);
        for slot in self.slots.drain(count..) {
            // Whatever the client says of what it has used.
            self.floor = self.floor.max(slot.slot.sequence());
            if let State::Done(kept) = slot.state {
                self.pool.put(kept.body.into_bytes());
            }
        }
        let stays = |number: &u16| usize::from(*number) < count;
        self.large.retain(stays);
        self.outbox.retain(|_, number| stays(&number));
    }

    /// A complete call: runs it, or lets it wait for another one's result.
    fn begin(&mut self, head: SlotHead, marks: Marks, payload: Vec<u8>) {
        self.drop_assembly(head.slot);
        let Some(slot) = self.slot(head.slot) else { return };
        if slot.slot.on_call(head.sequence) != CallVerdict::Execute {
            self.pool.put(payload);
            return;
        }
        // The client has the last reply of this slot: what was to be said is old.
        let old = core::mem::replace(
            &mut slot.state,
            State::Running { told_to_wait: false, cancelled: false },
        );
        if slot.say.is_some() && slot.lane != marks.lane {
            // It stands in the other lane's row, and is taken out of it there.
            let number = head.slot;
            slot.say = None;
            slot.lane = marks.lane;
            self.outbox.retain(|_, waiting| waiting != number);
        } else {
            slot.lane = marks.lane;
        }
        if let State::Done(kept) = old {
            self.put_back(head.slot, kept);
        }
        self.run(head.slot, marks, payload);
    }

    /// Hands a call out, or lets it wait for another one's result. Its slot's state owns no
    /// memory.
    #[inline(always)]
    fn run(&mut self, number: u16, marks: Marks, payload: Vec<u8>) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        if let Some(after) = marks.after {
            slot.turn(State::Waiting { after, payload, told_to_wait: false });
            self.wait(number, after);
        } else if let Some(asked) = self.asked.add() {
            (asked.slot, asked.sequence) = (number, slot.slot.sequence());
            (asked.incarnation, asked.lane) = (self.incarnation, marks.lane);
            asked.payload = payload;
            asked.what = What::Call;
            self.executions += 1;
            slot.turn(State::Running { told_to_wait: false, cancelled: false });
        }
    }

    /// The next call to run, or to run no more.
    #[inline(always)]
    pub(crate) fn poll_event(&mut self, peer: PublicKey) -> Option<Event> {
        let Asked { slot, sequence, incarnation, lane, payload, argument, what } =
            self.asked.next()?;
        let (slot, sequence, incarnation) = (*slot, *sequence, *incarnation);
        let id = IncomingId { slot, sequence, incarnation };
        let argument = match what {
            What::Call => None,
            What::CallInRow => Some(core::mem::take(argument)),
            What::Cancelled => return Some(Event::Cancelled { peer, id }),
        };
        Some(Event::Call { peer, id, lane: *lane, payload: core::mem::take(payload), argument })
    }

    /// Takes a CANCEL: the call never runs, or whoever runs it is told.
    pub(crate) fn on_cancel(&mut self, number: u16, sequence: u64) {
        let incarnation = self.incarnation;
        let Some(slot) = self.slot(number) else { return };
        let mut ahead = slot.slot;
        match ahead.on_call(sequence) {
            CallVerdict::Execute => {
                self.end_unrun(number, sequence, Status::Cancelled);
                self.say(number, Say::Ended);
            }
            CallVerdict::Working if matches!(slot.state, State::Waiting { .. }) => {
                self.stop_waiting(number, Status::Cancelled);
            }
            CallVerdict::Working => {
                let State::Running { cancelled, .. } = &mut slot.state else { return };
                let first = !core::mem::replace(cancelled, true);
                self.park(number);
                self.say(number, Say::Working);
                if first && let Some(asked) = self.asked.add() {
                    (asked.slot, asked.sequence) = (number, sequence);
                    (asked.incarnation, asked.what) = (incarnation, What::Cancelled);
                }
            }
            CallVerdict::RepeatReply => {
                // Pieces of a newer call may already be there; they stay.
                self.delivered(number);
                self.say(number, Say::Ended);
            }
            CallVerdict::Stale | CallVerdict::Overrun => {}
        }
    }

    pub(crate) fn reply(
        &mut self,
        id: IncomingId,
        status: Status,
        payload: Vec<u8>,
    ) -> Result<(), ReplyError> {
        if payload.len() > self.limits.payload {
            return Err(ReplyError::TooLong);
        }
        if !self.held.is_empty() {
            self.release(id);
        }
        let slot = self.slots.get_mut(usize::from(id.slot)).ok_or(ReplyError::Stale)?;
        let State::Running { told_to_wait, cancelled } = slot.state else {
            return Err(ReplyError::Stale);
        };
        if id.incarnation != self.incarnation || !slot.slot.on_done(id.sequence) {
            return Err(ReplyError::Stale);
        }
        // A client without rows knows of no such end; to it, it is an end.
        let status = if self.lanes || status != Status::Stopped { status } else { Status::Done };
        let whole = fits_one_packet(&self.limits, payload.len());
        let body = if whole {
            Body::Whole(payload)
        } else if cancelled {
            // Nobody takes it, and none of a row could.
            self.end_without_reply(id.slot, told_to_wait);
            return Ok(());
        } else {
            let Some(taken) = self.replies.take(payload.len()) else {
                self.end_without_reply(id.slot, told_to_wait);
                return Err(ReplyError::Full);
            };
            let granted = if self.lanes { UNASKED } else { usize::MAX };
            self.large.push(id.slot);
            let mut outgoing = Outgoing::new(payload, granted);
            outgoing.taken = Some(taken);
            Body::Pieces(Box::new(outgoing))
        };
        slot.turn(State::Done(Kept { status, body }));
        if whole && slot.say.is_none() {
            slot.say = Some(Say::Reply { tracked: told_to_wait });
            self.outbox.push(slot.lane, id.slot);
        } else if whole {
            self.say(id.slot, Say::Reply { tracked: told_to_wait });
        }
        self.unpark(told_to_wait);
        self.on_ended(id.slot);
        Ok(())
    }
}

impl Body {
    fn into_bytes(self) -> Vec<u8> {
        match self {
            Self::Whole(bytes) => bytes,
            Self::Pieces(body) => body.into_bytes(),
        }
    }
}

#[cfg(test)]
mod tests;
