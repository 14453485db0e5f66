//! What calls of ours put into packets.

use super::{
    Active, Assembly, Body, Client, Direction, Duration, Frame, Instant, Lane, Outgoing, PROBE,
    Packet, Pause, SlotHead, State,
};
use crate::session::flow::Tracked;
use conet_wire::session::frame::CHUNK_OVERHEAD;

/// A payload that has a piece to send, for choosing among them.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Piece {
    pub(crate) lane: Lane,
    pub(crate) remaining: usize,
    /// Smaller is older.
    pub(crate) sequence: u64,
    pub(crate) slot: u16,
}

/// Chooses the most urgent and shortest, or the oldest of all.
pub(crate) fn choose(pieces: impl Iterator<Item = Piece>, oldest: bool) -> Option<Piece> {
    if oldest { pieces.min_by_key(|piece| piece.sequence) } else { pieces.min() }
}

impl Client {
    /// Puts every frame of `lane` that is due into `packet`; `false` if one did not fit.
    pub(crate) fn emit(&mut self, now: Instant, lane: Lane, packet: &mut Packet<'_>) -> bool {
        if !self.outbox.lanes().has(lane) {
            return true;
        }
        let (mut said, mut fits) = (0, true);
        while let Some(number) = self.outbox.get(lane, said) {
            fits = self.emit_one(now, number, packet);
            if !fits {
                break;
            }
            said += 1;
        }
        self.outbox.forget(lane, said);
        if self.slots.len() > self.granted {
            self.shrink();
        }
        fits
    }

    /// Puts a slot's frame, if it is due, into `packet`; `false` if it did not fit.
    #[inline(always)]
    fn emit_one(&mut self, now: Instant, number: u16, packet: &mut Packet<'_>) -> bool {
        let lanes = self.lanes;
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return true };
        let sequence = slot.slot.sequence();
        let mut next = None;
        match &mut slot.state {
            State::Active(active) if active.due.is_some_and(|due| due <= now) => {
                if !active.emit(packet, number, sequence, lanes) {
                    return false;
                }
                if active.first_sent.is_some() {
                    active.repeated = true;
                    // With a reply on its way this is a grant for the rest of it.
                    self.repeats += u64::from(active.reply.is_none());
                } else {
                    active.first_sent = Some(now);
                }
                let due = active.pause.after(now);
                active.due = Some(due);
                active.pause = active.pause.longer();
                next = Some(due);
            }
            State::Draining { due, pause } if *due <= now => {
                if !packet.push(&Frame::Cancel { slot: number, sequence }) {
                    return false;
                }
                *due = pause.after(now);
                *pause = pause.longer();
                next = Some(*due);
            }
            _ => {}
        }
        slot.in_outbox = false;
        if let Some(at) = next
            && slot.timer.is_none_or(|timer| at < timer)
        {
            self.arm(number, at);
        }
        true
    }

    #[inline]
    pub(crate) const fn has_release_to_say(&self) -> bool {
        self.release
    }

    /// The piece of a large call that should go next.
    pub(crate) fn best_piece(&self, oldest: bool) -> Option<Piece> {
        choose(self.pieces(), oldest)
    }

    fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.large.iter().filter_map(|&number| {
            let slot = self.slots.get(usize::from(number))?;
            let State::Active(Active { body: Body::Pieces(body), .. }) = &slot.state else {
                return None;
            };
            let (lane, remaining) = (slot.lane, body.remaining());
            let piece = Piece { lane, remaining, sequence: slot.slot.sequence(), slot: number };
            body.has_piece().then_some(piece)
        })
    }

    /// Puts a piece of the large call in slot `number` into `packet`.
    pub(crate) fn emit_piece(&mut self, now: Instant, number: u16, packet: &mut Packet<'_>) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        let sequence = slot.slot.sequence();
        let lane = if self.lanes { slot.lane } else { Lane::Calls };
        let State::Active(active) = &mut slot.state else { return };
        let Body::Pieces(body) = &mut active.body else { return };
        if let Some(tracked) = push_piece(packet, body, Direction::Call, lane, number, sequence) {
            active.first_sent.get_or_insert(now);
            packet.tracked = Some(tracked);
        }
    }

    /// The bytes of the payload in slot `number`, if it is still the one that is meant.
    pub(crate) fn payload(&self, number: u16, sequence: u64) -> Option<&[u8]> {
        let slot = self.slots.get(usize::from(number))?;
        match &slot.state {
            State::Active(Active { body: Body::Pieces(body), .. })
                if slot.slot.sequence() == sequence =>
            {
                Some(body.bytes())
            }
            _ => None,
        }
    }

    /// Whether there is a large call, with a piece to send or without.
    #[inline]
    pub(crate) const fn has_large(&self) -> bool {
        !self.large.is_empty()
    }

    pub(crate) fn has_piece(&self) -> bool {
        self.pieces().next().is_some()
    }

    /// When time alone gives [`emit`](Self::emit) something to send.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due.next()
    }

    /// When the first call's time is up.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadlines.next()
    }

    /// Puts slots whose time has come among those that have something to say.
    pub(crate) fn wake(&mut self, now: Instant) {
        while let Some((at, number)) = self.due.pop_at(now) {
            let Some(slot) = self.slots.get_mut(usize::from(number)) else { continue };
            if slot.timer != Some(at) {
                // An earlier one was set since.
                continue;
            }
            slot.timer = None;
            let due = match &slot.state {
                State::Active(active) => active.due,
                State::Draining { due, .. } => Some(*due),
                State::Free | State::Held => None,
            };
            match due {
                Some(due) if due <= now => self.say(number),
                Some(due) => self.arm(number, due),
                None => {}
            }
        }
        if self.due.is_crowded(self.slots.len()) {
            let slots = &self.slots;
            self.due.retain(|at, number| {
                slots.get(usize::from(number)).is_some_and(|slot| slot.timer == Some(at))
            });
        }
    }

    /// Sees to it that the client is reminded of a slot at `at` or before: a call that is
    /// answered in time leaves its timer to the next one in its slot.
    fn arm(&mut self, number: u16, at: Instant) {
        if let Some(slot) = self.slots.get_mut(usize::from(number))
            && slot.timer.is_none_or(|timer| at < timer)
        {
            slot.timer = Some(at);
            self.due.set(at, number);
        }
    }

    /// Sets when a slot asks next, and how long the pause after that is.
    pub(super) fn ask_at(&mut self, number: u16, at: Instant, then: Pause) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        match &mut slot.state {
            State::Active(active) => {
                active.due = Some(at);
                active.pause = then;
            }
            State::Draining { due, pause } => {
                *due = at;
                *pause = then;
            }
            State::Free | State::Held => return,
        }
        self.arm(number, at);
    }
}

impl Active {
    fn emit(&self, packet: &mut Packet<'_>, slot: u16, sequence: u64, lanes: bool) -> bool {
        let (length, data) = match &self.body {
            Body::Whole(bytes) => (bytes.len(), &bytes[..]),
            Body::Pieces(body) => (body.bytes().len(), &[][..]),
        };
        if let Some(reply) = self.reply.as_ref().filter(|_| lanes) {
            // The server is at it: all it can want is leave to send more.
            let (direction, upto) = (Direction::Reply, granted(reply));
            return packet.push(&Frame::Grant { slot, sequence, direction, upto });
        }
        let head = SlotHead { slot, sequence, total: u32::try_from(length).unwrap_or(u32::MAX) };
        let plain = !lanes || (self.marks.lane == Lane::Calls && self.marks.after.is_none());
        if plain {
            packet.push(&Frame::Call { head, data })
        } else {
            packet.push(&Frame::Marked { head, marks: self.marks, data })
        }
    }
}

/// As a GRANT says it.
pub(crate) fn granted(assembly: &Assembly) -> u32 {
    u32::try_from(assembly.granted()).unwrap_or(u32::MAX)
}

/// Takes the next piece of `body` into `packet`.
pub(crate) fn push_piece(
    packet: &mut Packet<'_>,
    body: &mut Outgoing,
    direction: Direction,
    lane: Lane,
    slot: u16,
    sequence: u64,
) -> Option<Tracked> {
    let range = body.take_piece(packet.room().saturating_sub(CHUNK_OVERHEAD))?;
    let total = u32::try_from(body.bytes().len()).unwrap_or(u32::MAX);
    let offset = u32::try_from(range.start).unwrap_or(u32::MAX);
    let data = body.bytes().get(range.clone()).unwrap_or_default();
    let head = SlotHead { slot, sequence, total };
    if packet.push_piece(&Frame::Chunk { head, direction, lane, offset, data }, data.len()) {
        Some(Tracked::Piece { direction, slot, sequence, range })
    } else {
        body.on_lost(range);
        None
    }
}

/// Pause until the sender of a payload is asked whether it goes on.
pub(super) const PIECES_PAUSE: Duration = PROBE;
/// Pause until a grant is repeated from which nothing has come.
pub(super) const GRANT_PAUSE: Pause = Pause::of(Duration::from_millis(50));
