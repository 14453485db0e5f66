//! The calling half of a session: calls in slots until each has ended, once.
//!
//! ```text
//! call ──► queue ──► Active ──reply──► ended ──► Free, or Held while others wait for it
//!                      │ cancelled, timed out, peer gone
//!                      └──► ended, slot Draining ──any answer──► Free or Held
//! ```
//!
//! A call that fits one packet is repeated until something answers: after
//! [`Rtt::call_timeout`], then half as long again each time, and rarely after WORKING:
//! the call is parked, takes no window, and its reply comes tracked. A longer one goes
//! out in tracked pieces, and is asked for only when all have arrived.
//!
//! Calls of a row stand in consecutive slots from the start, so that they go in one
//! datagram; the slot of an earlier one is kept until the later one has been answered,
//! since that answer is what shows that its result was taken.
//!
//! Invariants: every call handed in ends exactly once; a slot is used again only
//! when the server has answered for its last call, or the server that knew it
//! is gone; sequences are counted over all slots, so that a slot that is given back and
//! used again never sees an old one.

use super::free::Free;
use super::grants::Grants;
use super::handshake::PublicKey;
use super::hub::Event;
use super::limits::{Limits, MOST_IN_ROW};
use super::outbox::Outbox;
use super::packet::Packet;
use super::payload::{Assembly, Outgoing, UNASKED};
use super::pool::Pool;
use super::queue::Queue;
use super::rtt::{PARKED_PROBE, PROBE, Pause, Rtt};
use super::slots::{ClientSlot, ReplyVerdict};
use super::timers::Timers;
use crate::time::Instant;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use conet_wire::session::frame::{
    After, Direction, Frame, Lane, MARKED_OVERHEAD, Marks, SlotHead, Status,
};
use conet_wire::session::{HEADER, TAG};
use core::time::Duration;

mod events;
mod freeze;
mod output;
mod state;

pub(crate) use freeze::thaw_lane;
pub(crate) use output::{Piece, choose, granted, push_piece};
use state::{Active, Body, How, Link, Slot, State, Waiting};

/// A call of ours, unique within one session's life.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CallId(pub(crate) u64);

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
    /// It never ran: the call before it in its row ended otherwise than well, or with
    /// a result too long to be an argument.
    #[error("an earlier call of the row did not go well; this one never ran")]
    Aborted,
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
    /// The payload is longer than [`Limits::payload`], or one of a row does not fit a
    /// packet.
    #[error("payload is too long")]
    TooLong,
    /// [`Limits::queued`] calls wait already.
    #[error("too many calls wait")]
    QueueFull,
    /// A row of none, or of more than [`MOST_IN_ROW`].
    #[error("a row has 1 to {MOST_IN_ROW} calls")]
    RowLength,
}

/// Slots that every server accepts before it has granted any.
pub(crate) const FIRST_SLOTS: usize = 64;
/// Marks a call in the queue among those with a deadline.
const QUEUED: u32 = u32::MAX;

/// How a call has ended, for its caller.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    id: u64,
    bytes: Vec<u8>,
    error: Option<CallError>,
}

/// All calls of one session.
#[derive(Debug)]
pub(crate) struct Client {
    limits: Limits,
    slots: Vec<Slot>,
    free: Free,
    queue: [VecDeque<Waiting>; 4],
    queued: usize,
    next_id: u64,
    sequence: u64,
    pub(super) outbox: Outbox,
    /// Slots with a payload in pieces on its way.
    large: Vec<u16>,
    due: Timers<u16>,
    deadlines: Timers<(u32, u64)>,
    active: usize,
    grants: Grants,
    granted: usize,
    version: u32,
    /// A RELEASE is to be said.
    release: bool,
    /// The peer knows marks, grants and the rest.
    lanes: bool,
    pub(crate) pool: Pool,
    /// Calls that have ended.
    pub(crate) ended: Queue<Ended>,
    pub(crate) repeats: u64,
    pub(crate) stale_replies: u64,
}

impl Client {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            slots: Vec::new(),
            free: Free::default(),
            queue: Default::default(),
            queued: 0,
            next_id: 0,
            sequence: 0,
            outbox: Outbox::default(),
            large: Vec::new(),
            due: Timers::new(),
            deadlines: Timers::new(),
            active: 0,
            grants: Grants::new(limits.assembling, limits.payload),
            granted: FIRST_SLOTS.min(limits.slots),
            version: 0,
            release: false,
            lanes: false,
            pool: Pool::default(),
            ended: Queue::default(),
            repeats: 0,
            stale_replies: 0,
        }
    }

    pub(crate) const fn set_lanes(&mut self, lanes: bool) {
        self.lanes = lanes;
    }

    /// Takes a call; with `up`, the time and the path's, there is somebody to call.
    pub(crate) fn call(
        &mut self,
        up: Option<(Instant, &Rtt)>,
        lane: Lane,
        payload: Vec<u8>,
        deadline: Option<Instant>,
    ) -> Result<CallId, NotTaken> {
        if payload.len() > self.limits.payload {
            return Err(NotTaken::TooLong);
        }
        if self.queued >= self.limits.queued {
            return Err(NotTaken::QueueFull);
        }
        let id = self.name();
        let (mut payload, how) = (payload, How { id, deadline, link: Link::Alone });
        if let Some((now, rtt)) = up.filter(|_| self.queued == 0 && self.room() > 0) {
            self.start(now, rtt, lane, how, &mut payload, None);
        } else {
            self.enqueue(lane, how, payload);
        }
        Ok(id)
    }

    fn name(&mut self) -> CallId {
        let id = CallId(self.next_id);
        self.next_id += 1;
        id
    }

    /// Slots in which a call can begin.
    fn room(&self) -> usize {
        self.free.len() + self.granted.saturating_sub(self.slots.len())
    }

    /// Takes a row: each call has the result of the one before as an argument, and
    /// `true` if it is to run also when that one stopped the row.
    pub(crate) fn call_row(
        &mut self,
        up: Option<(Instant, &Rtt)>,
        lane: Lane,
        mut row: impl ExactSizeIterator<Item = (Vec<u8>, bool)>,
        deadline: Option<Instant>,
        ids: &mut Vec<CallId>,
    ) -> Result<(), NotTaken> {
        let length = row.len();
        if length == 0 || length > MOST_IN_ROW {
            return Err(NotTaken::RowLength);
        }
        if self.queued + length > self.limits.queued {
            return Err(NotTaken::QueueFull);
        }
        let mut taken: [Option<(Vec<u8>, bool)>; MOST_IN_ROW] =
            core::array::from_fn(|_| row.next());
        let longest = taken.iter().flatten().map(|(payload, _)| payload.len()).max();
        if longest.is_some_and(|longest| !fits_one_packet(&self.limits, longest)) {
            return Err(NotTaken::TooLong);
        }
        let is_free = self.queued == 0 && self.room() >= length && (self.lanes || length == 1);
        let up = up.filter(|_| is_free);
        let (mut before, mut is_first) = (None, true);
        ids.reserve(length);
        for (payload, anyhow) in taken.iter_mut().take(length).flatten() {
            let id = self.name();
            let link = if is_first { Link::Alone } else { Link::Next { anyhow: *anyhow } };
            is_first = false;
            let how = How { id, deadline, link };
            match up {
                Some((now, rtt)) => before = self.start(now, rtt, lane, how, payload, before),
                None => self.enqueue(lane, how, core::mem::take(payload)),
            }
            ids.push(id);
        }
        Ok(())
    }

    #[inline(never)]
    fn enqueue(&mut self, lane: Lane, how: How, payload: Vec<u8>) {
        let How { id, deadline, link } = how;
        if let Some(at) = deadline {
            self.deadlines.set(at, (QUEUED, id.0));
        }
        self.queued += 1;
        self.queue[lane as usize].push_back(Waiting { id, payload, deadline, link });
    }

    /// The next call that has ended.
    #[inline(always)]
    pub(crate) fn poll_event(&mut self, peer: PublicKey) -> Option<Event> {
        let Ended { id, bytes, error } = self.ended.next()?;
        let call = CallId(*id);
        if let Some(error) = error.take() {
            return Some(Event::Ended { peer, call, result: Err(error) });
        }
        Some(Event::Ended { peer, call, result: Ok(core::mem::take(bytes)) })
    }

    pub(crate) const fn in_flight(&self) -> usize {
        self.active
    }

    /// Bytes set aside for payloads that arrive in part.
    pub(crate) const fn set_aside(&self) -> usize {
        self.grants.used()
    }

    /// Slots that exist.
    pub(crate) const fn slots_in_use(&self) -> usize {
        self.slots.len()
    }

    /// Moves waiting calls into free slots; only while there is somebody to call.
    #[inline]
    pub(crate) fn assign(&mut self, now: Instant, rtt: &Rtt) {
        if self.queued > 0 {
            self.assign_all(now, rtt);
        }
    }

    fn assign_all(&mut self, now: Instant, rtt: &Rtt) {
        for lane in Lane::ALL {
            while let Some(length) = self.row_length(lane) {
                if length > 1 && !self.lanes {
                    self.give_up_row(lane, length, CallError::Refused);
                    continue;
                }
                if self.room() < length {
                    return;
                }
                let mut before = None;
                for _ in 0..length {
                    let waiting = self.queue[lane as usize].pop_front();
                    let Some(Waiting { id, mut payload, deadline, link }) = waiting else { break };
                    self.queued -= 1;
                    let how = How { id, deadline, link };
                    before = self.start(now, rtt, lane, how, &mut payload, before);
                }
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn make_slot(&mut self) -> Option<u16> {
        let number = u16::try_from(self.slots.len()).ok()?;
        self.slots.push(Slot::new());
        Some(number)
    }

    /// A payload that goes in pieces.
    #[inline(never)]
    fn in_pieces(&mut self, number: u16, payload: Vec<u8>) -> Body {
        let granted = if self.lanes { UNASKED } else { usize::MAX };
        self.large.push(number);
        Body::Pieces(Box::new(Outgoing::new(payload, granted)))
    }

    /// How many calls at the head of a lane's queue form a row.
    fn row_length(&self, lane: Lane) -> Option<usize> {
        let queue = &self.queue[lane as usize];
        queue.front()?;
        let mut length = 1;
        while let Some(Waiting { link: Link::Next { .. }, .. }) = queue.get(length) {
            length += 1;
        }
        Some(length)
    }

    fn give_up_row(&mut self, lane: Lane, length: usize, error: CallError) {
        for waiting in self.queue[lane as usize].drain(..length) {
            self.queued -= 1;
            self.pool.put(waiting.payload);
            self.ended.tell(waiting.id, Err(error));
        }
    }

    /// Gives a call the next free slot, of which the caller has seen that there is one. Its
    /// payload goes from where it is straight to where it stays.
    #[inline(always)]
    fn start(
        &mut self,
        now: Instant,
        rtt: &Rtt,
        lane: Lane,
        how: How,
        payload: &mut Vec<u8>,
        before: Option<u16>,
    ) -> Option<u16> {
        let number = match self.free.take() {
            Some(number) => number,
            None => self.make_slot()?,
        };
        let after = match (how.link, before) {
            (Link::Next { anyhow }, Some(slot)) => {
                let earlier = self.slots.get_mut(usize::from(slot))?;
                earlier.pins += 1;
                Some(After { slot, sequence: earlier.slot.sequence(), anyhow })
            }
            _ => None,
        };
        self.sequence += 1;
        let sequence = self.sequence;
        let whole = fits_one_packet(&self.limits, payload.len());
        let body = if whole {
            Body::Whole(core::mem::take(payload))
        } else {
            self.in_pieces(number, core::mem::take(payload))
        };
        let slot = self.slots.get_mut(usize::from(number))?;
        let begun = slot.slot.begin_at(sequence);
        debug_assert!(begun.is_ok(), "a free slot waits for nothing");
        slot.lane = lane;
        slot.after = after.map(|after| after.slot);
        slot.turn(State::Active(Active {
            id: how.id,
            body,
            marks: Marks { lane, after },
            first_sent: None,
            repeated: false,
            due: whole.then_some(now),
            pause: rtt.call_timeout(),
            deadline: how.deadline,
            reply: None,
        }));
        self.active += 1;
        if whole && !slot.in_outbox {
            slot.in_outbox = true;
            self.outbox.push(lane, number);
        }
        if let Some(at) = how.deadline {
            self.deadlines.set(at, (number.into(), sequence));
        }
        Some(number)
    }

    /// Puts a slot among those that have a frame to send.
    fn say(&mut self, number: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(number))
            && !slot.in_outbox
        {
            slot.in_outbox = true;
            self.outbox.push(slot.lane, number);
        }
    }

    /// The call in a slot has been answered for: the slot is free, as soon as no later
    /// call of its row needs it.
    #[inline]
    fn give_back(&mut self, number: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        let is_free = slot.pins == 0;
        slot.turn(if is_free { State::Free } else { State::Held });
        let earlier = slot.after.take();
        if is_free {
            self.put_free(number);
        }
        let Some(earlier) = earlier else { return };
        let Some(slot) = self.slots.get_mut(usize::from(earlier)) else { return };
        slot.pins -= 1;
        if slot.pins == 0 && matches!(slot.state, State::Held) {
            slot.state = State::Free;
            self.put_free(earlier);
        }
    }

    #[inline]
    fn put_free(&mut self, number: u16) {
        if usize::from(number) < self.granted {
            self.free.put(number);
        } else {
            self.shrink();
        }
    }

    /// Gives slots back that were taken away, once all of them are free.
    #[inline(never)]
    fn shrink(&mut self) {
        let Some(beyond) = self.slots.get(self.granted..) else { return };
        if beyond.iter().all(|slot| matches!(slot.state, State::Free) && !slot.in_outbox) {
            self.slots.truncate(self.granted);
            self.release = true;
        }
    }

    /// The server says how many slots there are.
    pub(crate) fn on_slots(&mut self, version: u32, count: u32) {
        let count = (count as usize).clamp(MOST_IN_ROW, self.limits.slots);
        if version < self.version || (version == self.version && count != self.granted) {
            return;
        }
        if version == self.version {
            // Asked again: the RELEASE was lost.
            self.release = self.slots.len() <= count;
            return;
        }
        self.version = version;
        let more = count > self.granted;
        let from = self.granted;
        self.granted = count;
        if more {
            // Slots that were taken away and are still there can be used again.
            let there = self.slots.iter().enumerate().skip(from).take(count - from);
            for (at, slot) in there {
                if let (State::Free, Ok(number)) = (&slot.state, u16::try_from(at)) {
                    self.free.put(number);
                }
            }
        } else {
            self.free.truncate(count);
            self.shrink();
        }
        if self.slots.len() <= count {
            self.release = true;
        }
    }

    /// The RELEASE to say.
    #[inline]
    pub(crate) fn take_release(&mut self) -> Option<Frame<'static>> {
        if !self.release {
            return None;
        }
        self.release = false;
        let count = u32::try_from(self.granted).unwrap_or(u32::MAX);
        Some(Frame::Release { version: self.version, count, floor: self.sequence })
    }

    fn give_up_assembly(&mut self, number: u16, sequence: u64, reply: Option<Box<Assembly>>) {
        if let Some(reply) = reply {
            let (total, granted) = (reply.total(), reply.granted());
            self.grants.end(number, sequence, total, granted, reply.is_whole);
            self.pool.put(reply.into_bytes());
        }
    }
}

impl Queue<Ended> {
    fn tell(&mut self, id: CallId, result: Result<Vec<u8>, CallError>) {
        let Some(ended) = self.add() else { return };
        ended.id = id.0;
        match result {
            Ok(bytes) => ended.bytes = bytes,
            Err(error) => ended.error = Some(error),
        }
    }
}

/// Whether a call or reply of `length` bytes goes in one frame of one packet.
pub(crate) const fn fits_one_packet(limits: &Limits, length: usize) -> bool {
    length + HEADER + MARKED_OVERHEAD + TAG <= limits.datagram
}
