//! The calling half of a session: calls in slots until each has ended, once.
//!
//! ```text
//! call ──► queue ──► Active ──reply──► ended (slot free)
//!                      │ cancelled, timed out, peer gone
//!                      └──► ended, slot Draining ──any answer──► free
//! ```
//!
//! A call that fits one packet is repeated until something answers: after
//! [`Rtt::call_timeout`], then half as long again each time, and a second after
//! WORKING. A longer one goes out in tracked pieces, and is asked for only when
//! all have arrived.
//!
//! Invariants: every call handed in ends exactly once; a slot is used again only
//! when the server has answered for its last call, or the server that knew it
//! is gone.

use super::flow::Tracked;
use super::limits::Limits;
use super::packet::Packet;
use super::payload::{Assembly, Outgoing};
use super::rtt::{PROBE, Rtt, back_off};
use super::slots::{ClientSlot, ReplyVerdict};
use crate::time::Instant;
use conet_wire::session::frame::{
    CALL_OVERHEAD, CHUNK_OVERHEAD, Direction, Frame, SlotHead, Status,
};
use conet_wire::session::{HEADER, TAG};
use core::time::Duration;
use std::collections::VecDeque;

/// A call of ours, unique within one session's life.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CallId(u64);

/// How a call ended without a reply.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CallError {
    /// It was never sent, so it never ran: the peer was not there in time.
    #[error("peer is not reachable; the call never ran")]
    Unreachable,
    /// It never ran: it was cancelled first.
    #[error("call was cancelled; it never ran")]
    Cancelled,
    /// The peer refused it without running it.
    #[error("peer refused the call; it never ran")]
    Refused,
    /// No reply in time. It may have run, or may still.
    #[error("no reply in time; the call may have run")]
    TimedOut,
    /// The peer restarted, fell silent, or the call was given up after it was sent.
    /// It may have run.
    #[error("outcome unknown; the call may have run")]
    Unknown,
}

/// Why a call was not taken; the caller's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NotTaken {
    /// The payload is longer than [`Limits::payload`].
    #[error("payload is too long")]
    TooLong,
    /// [`Limits::queued`] calls wait already.
    #[error("too many calls wait")]
    QueueFull,
}

/// A call that has ended.
pub(crate) type Ended = (CallId, Result<Vec<u8>, CallError>);

#[derive(Debug)]
struct Waiting {
    id: CallId,
    payload: Vec<u8>,
    deadline: Option<Instant>,
}

#[derive(Debug)]
struct Active {
    id: CallId,
    body: Outgoing,
    /// Fits one packet, so it is repeated whole.
    whole: bool,
    first_sent: Option<Instant>,
    repeated: bool,
    /// When to send or ask again; `None` while pieces are on their way.
    due: Option<Instant>,
    pause: Duration,
    deadline: Option<Instant>,
    reply: Option<Assembly>,
}

#[derive(Debug)]
enum State {
    Free,
    Active(Box<Active>),
    /// Ended for the caller, but the server may still work on it.
    Draining {
        due: Instant,
        pause: Duration,
    },
}

#[derive(Debug)]
struct Slot {
    slot: ClientSlot,
    state: State,
}

/// All calls of one session.
#[derive(Debug)]
pub(crate) struct Client {
    limits: Limits,
    slots: Vec<Slot>,
    queue: VecDeque<Waiting>,
    next_id: u64,
    /// Slot that may send the next piece, so that large calls take turns.
    turn: usize,
    pub(crate) ended: VecDeque<Ended>,
    pub(crate) repeats: u64,
    pub(crate) stale_replies: u64,
}

impl Client {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            slots: Vec::new(),
            queue: VecDeque::new(),
            next_id: 0,
            turn: 0,
            ended: VecDeque::new(),
            repeats: 0,
            stale_replies: 0,
        }
    }

    pub(crate) fn call(
        &mut self,
        payload: Vec<u8>,
        deadline: Option<Instant>,
    ) -> Result<CallId, NotTaken> {
        if payload.len() > self.limits.payload {
            return Err(NotTaken::TooLong);
        }
        if self.queue.len() >= self.limits.queued {
            return Err(NotTaken::QueueFull);
        }
        let id = CallId(self.next_id);
        self.next_id += 1;
        self.queue.push_back(Waiting { id, payload, deadline });
        Ok(id)
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.iter().filter(|slot| matches!(slot.state, State::Active(_))).count()
    }

    /// Gives the caller's side of a call up: it never ran if it was never sent.
    pub(crate) fn cancel(&mut self, now: Instant, id: CallId) {
        if let Some(at) = self.queue.iter().position(|waiting| waiting.id == id) {
            self.queue.remove(at);
            self.ended.push_back((id, Err(CallError::Cancelled)));
        }
        for slot in &mut self.slots {
            if matches!(&slot.state, State::Active(active) if active.id == id) {
                let error = slot.abandon(now, CallError::Cancelled, CallError::Unknown);
                self.ended.extend(error);
            }
        }
    }

    /// Moves waiting calls into free slots; only while there is somebody to call.
    pub(crate) fn assign(&mut self, now: Instant, rtt: &Rtt) {
        while !self.queue.is_empty() {
            let free = self.slots.iter().position(|slot| matches!(slot.state, State::Free));
            let at = match free {
                Some(at) => at,
                None if self.slots.len() < self.limits.slots => {
                    self.slots.push(Slot { slot: ClientSlot::new(), state: State::Free });
                    self.slots.len() - 1
                }
                None => return,
            };
            let (Some(slot), Some(waiting)) = (self.slots.get_mut(at), self.queue.pop_front())
            else {
                return;
            };
            if slot.slot.begin().is_err() {
                // 2^64 calls in one slot: this one is used up.
                self.queue.push_front(waiting);
                return;
            }
            let whole = fits_one_packet(&self.limits, waiting.payload.len());
            slot.state = State::Active(Box::new(Active {
                id: waiting.id,
                body: Outgoing::new(waiting.payload),
                whole,
                first_sent: None,
                repeated: false,
                due: whole.then_some(now),
                pause: rtt.call_timeout(),
                deadline: waiting.deadline,
                reply: None,
            }));
        }
    }

    /// Puts every frame that is due into `packet`; `false` if one did not fit.
    pub(crate) fn emit(&mut self, now: Instant, packet: &mut Packet<'_>) -> bool {
        for (at, slot) in self.slots.iter_mut().enumerate() {
            let Ok(number) = u16::try_from(at) else { break };
            let sequence = slot.slot.sequence();
            match &mut slot.state {
                State::Active(active) if active.due.is_some_and(|due| due <= now) => {
                    let bytes = active.body.bytes();
                    let total = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    let head = SlotHead { slot: number, sequence, total };
                    let data = if active.whole { bytes } else { &[] };
                    if !packet.push(&Frame::Call { head, data }) {
                        return false;
                    }
                    if active.first_sent.is_some() {
                        active.repeated = true;
                        self.repeats += 1;
                    }
                    active.first_sent.get_or_insert(now);
                    active.due = Some(now + active.pause);
                    active.pause = back_off(active.pause);
                }
                State::Draining { due, pause } if *due <= now => {
                    if !packet.push(&Frame::Cancel { slot: number, sequence }) {
                        return false;
                    }
                    *due = now + *pause;
                    *pause = back_off(*pause);
                }
                _ => {}
            }
        }
        true
    }

    /// Puts one piece of a large call into `packet`, if one waits.
    pub(crate) fn emit_piece(&mut self, now: Instant, packet: &mut Packet<'_>) {
        let slots = self.slots.len();
        for step in 0..slots {
            let at = (self.turn + step) % slots;
            let (Some(slot), Ok(number)) = (self.slots.get_mut(at), u16::try_from(at)) else {
                continue;
            };
            let State::Active(active) = &mut slot.state else { continue };
            let room = packet.room().saturating_sub(CHUNK_OVERHEAD);
            if active.whole || !active.body.has_piece() {
                continue;
            }
            if let Some(tracked) = push_piece(
                packet,
                &mut active.body,
                Direction::Call,
                number,
                slot.slot.sequence(),
                room,
            ) {
                active.first_sent.get_or_insert(now);
                packet.tracked = Some(tracked);
                self.turn = at + 1;
                return;
            }
        }
    }

    /// Takes a reply that fits one frame, or the first part of one that does not.
    pub(crate) fn on_reply(
        &mut self,
        now: Instant,
        head: SlotHead,
        status: Status,
        data: &[u8],
        rtt: &mut Rtt,
    ) {
        if data.len() != head.total as usize {
            // A reply in pieces has no frame of its own.
            self.stale_replies += 1;
            return;
        }
        let result = match status {
            Status::Done => Ok(data),
            Status::Cancelled => Err(CallError::Cancelled),
            Status::Refused => Err(CallError::Refused),
        };
        let Some(slot) = self.slots.get_mut(usize::from(head.slot)) else {
            self.stale_replies += 1;
            return;
        };
        if slot.slot.on_reply(head.sequence) != ReplyVerdict::Complete {
            self.stale_replies += 1;
            return;
        }
        if let State::Active(active) = core::mem::replace(&mut slot.state, State::Free) {
            if let Some(sent) = active.first_sent.filter(|_| !active.repeated && active.whole) {
                rtt.on_upper_bound(now.since(sent));
            }
            self.ended.push_back((active.id, result.map(<[u8]>::to_vec)));
        }
    }

    /// Takes a piece of a large reply; says whether it may be acknowledged.
    pub(crate) fn on_piece(
        &mut self,
        now: Instant,
        head: SlotHead,
        offset: usize,
        data: &[u8],
    ) -> bool {
        let total = head.total as usize;
        let Some(slot) = self.slots.get_mut(usize::from(head.slot)) else { return false };
        if head.sequence != slot.slot.sequence() || !slot.slot.is_waiting() {
            // Of a call that has ended: the server need not send it again.
            self.stale_replies += 1;
            return head.sequence <= slot.slot.sequence();
        }
        let State::Active(active) = &mut slot.state else {
            // Draining: any sign that it ran is an answer.
            slot.slot.on_reply(head.sequence);
            slot.state = State::Free;
            return true;
        };
        if total > self.limits.payload {
            return false;
        }
        let reply = active.reply.get_or_insert_with(|| Assembly::new(total));
        if reply.total() != total || reply.insert(offset, data).is_err() {
            return false;
        }
        // The server sends on its own; ask only if it stops.
        active.due = Some(now + PROBE);
        if reply.is_complete() {
            slot.slot.on_reply(head.sequence);
            if let State::Active(active) = core::mem::replace(&mut slot.state, State::Free) {
                let bytes = active.reply.map(Assembly::into_bytes).unwrap_or_default();
                self.ended.push_back((active.id, Ok(bytes)));
            }
        }
        true
    }

    /// The server works on it: ask again in a second.
    pub(crate) fn on_working(&mut self, now: Instant, number: u16, sequence: u64) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        if sequence != slot.slot.sequence() {
            return;
        }
        match &mut slot.state {
            State::Active(active) if active.due.is_some() => {
                active.due = Some(now + PROBE);
                active.pause = PROBE;
            }
            State::Draining { due, pause } => {
                *due = now + PROBE;
                *pause = PROBE;
            }
            State::Active(_) | State::Free => {}
        }
    }

    /// A piece arrived at the server, or was lost.
    pub(crate) fn on_piece_fate(&mut self, now: Instant, rtt: &Rtt, what: &Tracked, arrived: bool) {
        let Tracked::Piece { slot: number, sequence, range, .. } = what else { return };
        let Some(slot) = self.slots.get_mut(usize::from(*number)) else { return };
        if slot.slot.sequence() != *sequence {
            return;
        }
        let State::Active(active) = &mut slot.state else { return };
        if arrived {
            active.body.on_acked(range.clone());
            if active.body.is_acked() && active.due.is_none() {
                active.pause = rtt.call_timeout();
                active.due = Some(now + active.pause);
            }
        } else {
            active.body.on_lost(range.clone());
            self.repeats += 1;
        }
    }

    pub(crate) fn has_piece(&self) -> bool {
        self.slots.iter().any(|slot| match &slot.state {
            State::Active(active) => !active.whole && active.body.has_piece(),
            _ => false,
        })
    }

    /// When [`emit`](Self::emit) has something to send.
    pub(crate) fn due(&self) -> Option<Instant> {
        let due = |slot: &Slot| match &slot.state {
            State::Active(active) => active.due,
            State::Draining { due, .. } => Some(*due),
            State::Free => None,
        };
        self.slots.iter().filter_map(due).min()
    }

    /// When the first call's time is up.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let active = self.slots.iter().filter_map(|slot| match &slot.state {
            State::Active(active) => active.deadline,
            _ => None,
        });
        active.chain(self.queue.iter().filter_map(|waiting| waiting.deadline)).min()
    }

    /// Ends calls whose time is up.
    pub(crate) fn expire(&mut self, now: Instant) {
        let past = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        for slot in &mut self.slots {
            if matches!(&slot.state, State::Active(active) if past(active.deadline)) {
                let ended = slot.abandon(now, CallError::Unreachable, CallError::TimedOut);
                self.ended.extend(ended);
            }
        }
        let (late, queue): (VecDeque<_>, _) =
            self.queue.drain(..).partition(|waiting| past(waiting.deadline));
        self.queue = queue;
        self.ended.extend(late.into_iter().map(|w| (w.id, Err(CallError::Unreachable))));
    }

    /// The peer fell silent: calls that may have run end as unknown, the others as
    /// unreachable.
    pub(crate) fn on_unreachable(&mut self, now: Instant) {
        for slot in &mut self.slots {
            let ended = slot.abandon(now, CallError::Unreachable, CallError::Unknown);
            self.ended.extend(ended);
        }
        let queue = core::mem::take(&mut self.queue);
        self.ended.extend(queue.into_iter().map(|w| (w.id, Err(CallError::Unreachable))));
    }

    /// The peer restarted: what may have run there is unknown, its slots are clean.
    pub(crate) fn on_peer_restart(&mut self, now: Instant) {
        let mut unsent = VecDeque::new();
        for slot in &mut self.slots {
            if let State::Active(active) = &mut slot.state
                && active.first_sent.is_none()
            {
                let active = core::mem::replace(&mut slot.state, State::Free);
                if let State::Active(active) = active {
                    let Active { id, body, deadline, .. } = *active;
                    unsent.push_back(Waiting { id, payload: body.into_bytes(), deadline });
                }
            } else {
                self.ended.extend(slot.abandon(now, CallError::Unknown, CallError::Unknown));
                slot.state = State::Free;
            }
            slot.slot.forget();
        }
        unsent.append(&mut self.queue);
        self.queue = unsent;
    }

    /// New keys with the same peer: everything that waits is sent again.
    pub(crate) fn on_new_keys(&mut self, now: Instant, rtt: &Rtt) {
        for slot in &mut self.slots {
            match &mut slot.state {
                State::Active(active) => {
                    active.pause = rtt.call_timeout();
                    active.due = active.due.map(|_| now);
                }
                State::Draining { due, pause } => {
                    *pause = rtt.call_timeout();
                    *due = now;
                }
                State::Free => {}
            }
        }
    }
}

impl Slot {
    /// Ends an active call for its caller, and drains the slot if it was sent.
    fn abandon(&mut self, now: Instant, unsent: CallError, sent: CallError) -> Option<Ended> {
        let State::Active(active) = &self.state else { return None };
        let id = active.id;
        if active.first_sent.is_some() {
            self.state = State::Draining { due: now, pause: PROBE / 4 };
            Some((id, Err(sent)))
        } else {
            self.slot.forget();
            self.state = State::Free;
            Some((id, Err(unsent)))
        }
    }
}

/// Whether a call or reply of `length` bytes goes in one frame of one packet.
pub(crate) const fn fits_one_packet(limits: &Limits, length: usize) -> bool {
    length + HEADER + CALL_OVERHEAD + TAG <= limits.datagram
}

/// Takes the next piece of `body` into `packet`.
pub(crate) fn push_piece(
    packet: &mut Packet<'_>,
    body: &mut Outgoing,
    direction: Direction,
    slot: u16,
    sequence: u64,
    room: usize,
) -> Option<Tracked> {
    let range = body.take_piece(room)?;
    let total = u32::try_from(body.bytes().len()).unwrap_or(u32::MAX);
    let offset = u32::try_from(range.start).unwrap_or(u32::MAX);
    let data = body.bytes().get(range.clone()).unwrap_or_default();
    let head = SlotHead { slot, sequence, total };
    if packet.push(&Frame::Chunk { head, direction, offset, data }) {
        Some(Tracked::Piece { direction, slot, sequence, range })
    } else {
        body.on_lost(range);
        None
    }
}
