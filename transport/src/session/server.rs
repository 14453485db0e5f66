//! The answering half of a session: each call runs at most once.
//!
//! ```text
//! Idle ──pieces──► Assembling ──whole──► Running ──reply──► Done ──newer call──► …
//!                                  same call: WORKING   same call: the reply again
//! ```
//!
//! A reply is kept until the client uses its slot again. One that fits a packet is
//! sent again when the client asks again, unless the client was told to wait: then
//! it asks only once a second, so the reply is tracked and repeated from here. A
//! larger one goes in tracked pieces, and its bytes are freed when all have
//! arrived.
//!
//! Invariants: a sequence is handed out for execution once; memory is bounded by
//! [`Limits::assembling`] for what arrives and by the slots for what is kept; a
//! reply to a call of an earlier incarnation goes nowhere.

use super::client::{fits_one_packet, push_piece};
use super::flow::Tracked;
use super::limits::Limits;
use super::packet::Packet;
use super::payload::{Assembly, Outgoing};
use super::slots::{CallVerdict, ServerSlot};
use conet_wire::session::frame::{CHUNK_OVERHEAD, Direction, Frame, SlotHead, Status};
use std::collections::VecDeque;

/// A call of the peer's.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct IncomingId {
    slot: u16,
    sequence: u64,
    incarnation: u64,
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
}

/// What the peer's call means for the application.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Asked {
    /// Run this, once.
    Run(IncomingId, Vec<u8>),
    /// The peer no longer wants it; it still waits for a reply.
    Cancel(IncomingId),
}

#[derive(Debug)]
struct Kept {
    status: Status,
    body: Outgoing,
    whole: bool,
}

#[derive(Debug)]
enum State {
    Idle,
    Assembling {
        sequence: u64,
        assembly: Assembly,
    },
    Running {
        told_to_wait: bool,
        cancelled: bool,
    },
    Done(Kept),
    /// The whole reply has arrived at the client.
    Delivered,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Say {
    Reply {
        tracked: bool,
    },
    Working,
    /// It has ended, whatever it said: for a client that gave it up.
    Ended,
}

#[derive(Debug)]
struct Slot {
    slot: ServerSlot,
    state: State,
    say: Option<Say>,
}

/// All calls of the peer.
#[derive(Debug)]
pub(crate) struct Server {
    limits: Limits,
    incarnation: u64,
    slots: Vec<Slot>,
    outbox: VecDeque<u16>,
    assembling: usize,
    turn: usize,
    pub(crate) executions: u64,
    pub(crate) duplicates: u64,
    pub(crate) refused_pieces: u64,
}

impl Server {
    pub(crate) const fn new(limits: Limits) -> Self {
        Self {
            limits,
            incarnation: 0,
            slots: Vec::new(),
            outbox: VecDeque::new(),
            assembling: 0,
            turn: 0,
            executions: 0,
            duplicates: 0,
            refused_pieces: 0,
        }
    }

    /// The client started anew: nothing of its earlier life counts.
    pub(crate) fn on_peer_restart(&mut self, incarnation: u64) {
        self.incarnation = incarnation;
        self.slots.clear();
        self.outbox.clear();
        self.assembling = 0;
    }

    fn slot(&mut self, number: u16) -> Option<&mut Slot> {
        let at = usize::from(number);
        if at >= self.limits.slots {
            return None;
        }
        while self.slots.len() <= at {
            self.slots.push(Slot { slot: ServerSlot::new(), state: State::Idle, say: None });
        }
        self.slots.get_mut(at)
    }

    fn say(&mut self, number: u16, say: Say) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        let waits = slot.say.is_some();
        // A duplicate question must not make a tracked reply an untracked one.
        if slot.say != Some(Say::Reply { tracked: true }) || say == Say::Ended {
            slot.say = Some(say);
        }
        if !waits {
            self.outbox.push_back(number);
        }
    }

    /// Takes a CALL: a whole call, or the question how a large one stands.
    pub(crate) fn on_call(&mut self, head: SlotHead, data: &[u8]) -> Option<Asked> {
        let slot = self.slot(head.slot)?;
        let mut ahead = slot.slot;
        match ahead.on_call(head.sequence) {
            CallVerdict::Execute => {
                if data.len() == head.total as usize {
                    return self.run(head, data.to_vec());
                }
                None
            }
            CallVerdict::Working => {
                if let State::Running { told_to_wait, .. } = &mut slot.state {
                    *told_to_wait = true;
                }
                self.duplicates += 1;
                self.say(head.slot, Say::Working);
                None
            }
            CallVerdict::RepeatReply => {
                let say = match &slot.state {
                    State::Done(kept) if kept.whole => Some(Say::Reply { tracked: false }),
                    _ => None,
                };
                self.duplicates += 1;
                if let Some(say) = say {
                    self.say(head.slot, say);
                }
                None
            }
            CallVerdict::Stale | CallVerdict::Overrun => {
                self.duplicates += 1;
                None
            }
        }
    }

    fn run(&mut self, head: SlotHead, payload: Vec<u8>) -> Option<Asked> {
        if payload.len() > self.limits.payload {
            return None;
        }
        self.drop_assembly(head.slot);
        let incarnation = self.incarnation;
        let slot = self.slot(head.slot)?;
        if slot.slot.on_call(head.sequence) != CallVerdict::Execute {
            return None;
        }
        slot.state = State::Running { told_to_wait: false, cancelled: false };
        self.executions += 1;
        Some(Asked::Run(
            IncomingId { slot: head.slot, sequence: head.sequence, incarnation },
            payload,
        ))
    }

    fn drop_assembly(&mut self, number: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        if let State::Assembling { assembly, .. } = &slot.state {
            self.assembling -= assembly.total();
            slot.state = State::Idle;
        }
    }

    /// Takes a piece of a large call; says whether it may be acknowledged.
    pub(crate) fn on_piece(
        &mut self,
        head: SlotHead,
        offset: usize,
        data: &[u8],
    ) -> (bool, Option<Asked>) {
        let total = head.total as usize;
        let (budget, longest) = (self.limits.assembling, self.limits.payload);
        let Some(slot) = self.slot(head.slot) else { return (false, None) };
        let mut ahead = slot.slot;
        match ahead.on_call(head.sequence) {
            CallVerdict::Execute => {}
            // Its call is known already; the client need not send it again.
            CallVerdict::Working | CallVerdict::RepeatReply | CallVerdict::Stale => {
                self.duplicates += 1;
                return (true, None);
            }
            CallVerdict::Overrun => return (false, None),
        }
        let begun = match &slot.state {
            State::Assembling { sequence, .. } if *sequence > head.sequence => return (true, None),
            State::Assembling { sequence, .. } => *sequence == head.sequence,
            _ => false,
        };
        if !begun {
            self.drop_assembly(head.slot);
            if total > longest || self.assembling + total > budget {
                self.refused_pieces += 1;
                return (false, None);
            }
            self.assembling += total;
            let Some(slot) = self.slot(head.slot) else { return (false, None) };
            slot.state =
                State::Assembling { sequence: head.sequence, assembly: Assembly::new(total) };
        }
        let Some(slot) = self.slot(head.slot) else { return (false, None) };
        let State::Assembling { assembly, .. } = &mut slot.state else { return (false, None) };
        if assembly.total() != total || assembly.insert(offset, data).is_err() {
            return (false, None);
        }
        if !assembly.is_complete() {
            return (true, None);
        }
        let State::Assembling { assembly, .. } = core::mem::replace(&mut slot.state, State::Idle)
        else {
            return (false, None);
        };
        self.assembling -= total;
        (true, self.run(head, assembly.into_bytes()))
    }

    /// The client gave a call up. If it has not begun, it never will.
    pub(crate) fn on_cancel(&mut self, number: u16, sequence: u64) -> Option<Asked> {
        let incarnation = self.incarnation;
        let slot = self.slot(number)?;
        match slot.slot.on_call(sequence) {
            CallVerdict::Execute => {
                slot.slot.on_done(sequence);
                self.drop_assembly(number);
                let slot = self.slot(number)?;
                slot.state = State::Done(Kept {
                    status: Status::Cancelled,
                    body: Outgoing::new(Vec::new()),
                    whole: true,
                });
                self.say(number, Say::Reply { tracked: false });
                None
            }
            CallVerdict::Working => {
                let State::Running { told_to_wait, cancelled } = &mut slot.state else {
                    return None;
                };
                *told_to_wait = true;
                let first = !core::mem::replace(cancelled, true);
                self.say(number, Say::Working);
                first.then_some(Asked::Cancel(IncomingId { slot: number, sequence, incarnation }))
            }
            CallVerdict::RepeatReply => {
                slot.state = State::Delivered;
                self.say(number, Say::Ended);
                None
            }
            CallVerdict::Stale | CallVerdict::Overrun => None,
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
        let whole = fits_one_packet(&self.limits, payload.len());
        let slot = self.slots.get_mut(usize::from(id.slot)).ok_or(ReplyError::Stale)?;
        let State::Running { told_to_wait, .. } = slot.state else {
            return Err(ReplyError::Stale);
        };
        if id.incarnation != self.incarnation || !slot.slot.on_done(id.sequence) {
            return Err(ReplyError::Stale);
        }
        slot.state = State::Done(Kept { status, body: Outgoing::new(payload), whole });
        if whole {
            self.say(id.slot, Say::Reply { tracked: told_to_wait });
        }
        Ok(())
    }

    pub(crate) fn has_something_to_say(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Puts waiting answers into `packet`; `false` if one did not fit.
    pub(crate) fn emit(&mut self, packet: &mut Packet<'_>) -> bool {
        while let Some(&number) = self.outbox.front() {
            let Some(slot) = self.slots.get_mut(usize::from(number)) else { break };
            let sequence = slot.slot.sequence();
            let empty = SlotHead { slot: number, sequence, total: 0 };
            let ended = Frame::Reply { head: empty, status: Status::Cancelled, data: &[] };
            let mut track = None;
            let frame = match (slot.say, &slot.state) {
                (Some(Say::Working), State::Running { .. }) => {
                    Some(Frame::Working { slot: number, sequence })
                }
                (Some(Say::Ended), _) => Some(ended),
                (Some(Say::Reply { tracked }), State::Done(kept)) if kept.whole => {
                    track = tracked.then_some(Tracked::Reply { slot: number, sequence });
                    let data = kept.body.bytes();
                    let total = u32::try_from(data.len()).unwrap_or(u32::MAX);
                    let head = SlotHead { slot: number, sequence, total };
                    Some(Frame::Reply { head, status: kept.status, data })
                }
                // What was to be said is no longer true.
                _ => None,
            };
            if let Some(frame) = frame {
                if track.is_some() && packet.tracked.is_some() || !packet.push(&frame) {
                    return false;
                }
                if track.is_some() {
                    packet.tracked = track;
                }
            }
            slot.say = None;
            self.outbox.pop_front();
        }
        true
    }

    pub(crate) fn has_piece(&self) -> bool {
        self.slots.iter().any(|slot| match &slot.state {
            State::Done(kept) => !kept.whole && kept.body.has_piece(),
            _ => false,
        })
    }

    /// Puts one piece of a large reply into `packet`, if one waits.
    pub(crate) fn emit_piece(&mut self, packet: &mut Packet<'_>) {
        let slots = self.slots.len();
        for step in 0..slots {
            let at = (self.turn + step) % slots;
            let (Some(slot), Ok(number)) = (self.slots.get_mut(at), u16::try_from(at)) else {
                continue;
            };
            let State::Done(kept) = &mut slot.state else { continue };
            if kept.whole || !kept.body.has_piece() {
                continue;
            }
            let room = packet.room().saturating_sub(CHUNK_OVERHEAD);
            let sequence = slot.slot.sequence();
            let tracked =
                push_piece(packet, &mut kept.body, Direction::Reply, number, sequence, room);
            if tracked.is_some() {
                packet.tracked = tracked;
                self.turn = at + 1;
                return;
            }
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
        match what {
            Tracked::Piece { range, .. } if arrived => {
                kept.body.on_acked(range.clone());
                if kept.body.is_acked() {
                    slot.state = State::Delivered;
                }
            }
            Tracked::Piece { range, .. } => kept.body.on_lost(range.clone()),
            Tracked::Reply { .. } if arrived => {}
            Tracked::Reply { .. } => self.say(*number, Say::Reply { tracked: true }),
        }
    }
}
