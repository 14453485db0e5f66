//! Calls of ours as they go into an image and come out of it.

use super::{
    Active, After, Assembly, Body, CallId, Client, ClientSlot, Instant, Lane, Limits, Link, Marks,
    Outgoing, PROBE, QUEUED, Slot, State, Waiting,
};
use crate::session::image::{ImageError, Reader, Writer};
use crate::session::rtt::Pause;
use alloc::boxed::Box;
use core::time::Duration;

const FREE: u8 = 0;
const ACTIVE: u8 = 1;
const HELD: u8 = 2;
const DRAINING: u8 = 3;

/// A lane in one byte.
pub(crate) fn thaw_lane(from: &mut Reader<'_>) -> Result<Lane, ImageError> {
    Lane::ALL.get(usize::from(from.u8()?)).copied().ok_or(ImageError::Malformed)
}

fn freeze_deadline(now: Instant, deadline: Option<Instant>, out: &mut Writer) {
    let left = deadline.map(|at| u64::try_from(at.since(now).as_nanos()).unwrap_or(u64::MAX));
    out.option(left);
}

fn thaw_deadline(now: Instant, from: &mut Reader<'_>) -> Result<Option<Instant>, ImageError> {
    Ok(from.option()?.map(|left| now + Duration::from_nanos(left)))
}

impl Client {
    pub(crate) fn freeze(&self, now: Instant, out: &mut Writer) {
        out.u64(self.next_id);
        out.u64(self.sequence);
        out.u32(self.version);
        out.count(self.granted);
        out.bool(self.lanes);
        out.count(self.slots.len());
        for slot in &self.slots {
            out.u64(slot.slot.sequence());
            out.u8(slot.lane as u8);
            out.option(slot.after.map(u64::from));
            match &slot.state {
                State::Free => out.u8(FREE),
                State::Held => out.u8(HELD),
                State::Draining { .. } => out.u8(DRAINING),
                State::Active(active) => {
                    out.u8(ACTIVE);
                    active.freeze(now, out);
                }
            }
        }
        for queue in &self.queue {
            out.count(queue.len());
            for Waiting { id, payload, deadline, link } in queue {
                out.u64(id.0);
                out.u8(match link {
                    Link::Alone => 0,
                    Link::Next { anyhow: false } => 1,
                    Link::Next { anyhow: true } => 2,
                });
                freeze_deadline(now, *deadline, out);
                out.bytes(payload);
            }
        }
    }

    pub(crate) fn thaw(
        limits: Limits,
        now: Instant,
        from: &mut Reader<'_>,
    ) -> Result<Self, ImageError> {
        let mut client = Self::new(limits);
        client.next_id = from.u64()?;
        client.sequence = from.u64()?;
        client.version = from.u32()?;
        client.granted = from.u32()? as usize;
        client.lanes = from.bool()?;
        let count = from.count(10)?;
        // Far from where counting would end.
        let numbers = client.next_id.max(client.sequence);
        if count > 1 << 16 || client.granted > 1 << 16 || numbers > 1 << 62 {
            return Err(ImageError::Malformed);
        }
        for number in 0..count {
            let number = u16::try_from(number).map_err(|_| ImageError::Malformed)?;
            client.thaw_slot(now, number, count, from)?;
        }
        client.settle();
        client.thaw_queue(now, from)?;
        Ok(client)
    }

    fn thaw_slot(
        &mut self,
        now: Instant,
        number: u16,
        count: usize,
        from: &mut Reader<'_>,
    ) -> Result<(), ImageError> {
        let mut slot = Slot::new();
        let sequence = from.u64()?;
        slot.lane = thaw_lane(from)?;
        slot.after = match from.option()? {
            None => None,
            Some(after) => {
                let after = u16::try_from(after).map_err(|_| ImageError::Malformed)?;
                let good = usize::from(after) < count && after != number;
                Some(after).filter(|_| good).ok_or(ImageError::Malformed).map(Some)?
            }
        };
        slot.state = match from.u8()? {
            FREE => State::Free,
            HELD => State::Held,
            DRAINING => State::Draining { due: now, pause: Pause::of(PROBE / 4) },
            ACTIVE => State::Active(Active::thaw(now, slot.lane, from)?),
            _ => return Err(ImageError::Malformed),
        };
        if sequence > self.sequence {
            return Err(ImageError::Malformed);
        }
        let waits = matches!(slot.state, State::Active(_) | State::Draining { .. });
        slot.slot = ClientSlot::resume(sequence, waits);
        if let State::Active(active) = &mut slot.state {
            self.active += 1;
            if let Some(at) = active.deadline {
                self.deadlines.set(at, (number.into(), sequence));
            }
            if matches!(active.body, Body::Pieces(_)) {
                self.large.push(number);
            }
            if let Some(reply) = &mut active.reply {
                let (total, granted) = (reply.total(), reply.granted());
                reply.is_whole = !self.lanes && granted == total;
                let room = self.grants.restore(number, sequence, total, granted, reply.is_whole);
                room.ok_or(ImageError::Malformed)?;
            }
        }
        self.slots.push(slot);
        Ok(())
    }

    /// What follows from the slots.
    fn settle(&mut self) {
        for at in 0..self.slots.len() {
            let after = self.slots.get(at).and_then(|slot| slot.after);
            if let Some(earlier) = after.and_then(|after| self.slots.get_mut(usize::from(after))) {
                earlier.pins = earlier.pins.saturating_add(1);
            }
        }
        for (at, slot) in self.slots.iter_mut().enumerate() {
            if matches!(slot.state, State::Held) && slot.pins == 0 {
                slot.state = State::Free;
            }
            if matches!(slot.state, State::Free) && slot.pins > 0 {
                slot.state = State::Held;
            }
            if let (State::Free, Ok(number)) = (&slot.state, u16::try_from(at))
                && at < self.granted
            {
                self.free.put(number);
            }
        }
        self.shrink();
    }

    fn thaw_queue(&mut self, now: Instant, from: &mut Reader<'_>) -> Result<(), ImageError> {
        for queue in &mut self.queue {
            let mut last = None;
            for _ in 0..from.count(14)? {
                let id = CallId(from.u64()?);
                let link = match from.u8()? {
                    0 => Link::Alone,
                    // A row has a first call.
                    1 if last.is_some() => Link::Next { anyhow: false },
                    2 if last.is_some() => Link::Next { anyhow: true },
                    _ => return Err(ImageError::Malformed),
                };
                if last.is_some_and(|last| last >= id) || id.0 >= self.next_id {
                    return Err(ImageError::Malformed);
                }
                last = Some(id);
                let deadline = thaw_deadline(now, from)?;
                let payload = from.bytes()?.to_vec();
                if let Some(at) = deadline {
                    self.deadlines.set(at, (QUEUED, id.0));
                }
                self.queued += 1;
                queue.push_back(Waiting { id, payload, deadline, link });
            }
        }
        Ok(())
    }
}

impl Active {
    fn freeze(&self, now: Instant, out: &mut Writer) {
        out.u64(self.id.0);
        out.bool(self.first_sent.is_some());
        freeze_deadline(now, self.deadline, out);
        out.bool(self.marks.after.is_some());
        if let Some(After { slot, sequence, anyhow }) = self.marks.after {
            out.u16(slot);
            out.u64(sequence);
            out.bool(anyhow);
        }
        match &self.body {
            Body::Whole(bytes) => {
                out.u8(0);
                out.bytes(bytes);
            }
            Body::Pieces(body) => {
                out.u8(1);
                body.freeze(out);
            }
        }
        out.bool(self.reply.is_some());
        if let Some(reply) = &self.reply {
            reply.freeze(out);
        }
    }

    fn thaw(now: Instant, lane: Lane, from: &mut Reader<'_>) -> Result<Self, ImageError> {
        let id = CallId(from.u64()?);
        let was_sent = from.bool()?;
        let deadline = thaw_deadline(now, from)?;
        let after = if from.bool()? {
            Some(After { slot: from.u16()?, sequence: from.u64()?, anyhow: from.bool()? })
        } else {
            None
        };
        let body = match from.u8()? {
            0 => Body::Whole(from.bytes()?.to_vec()),
            1 => Body::Pieces(Box::new(Outgoing::thaw(from)?)),
            _ => return Err(ImageError::Malformed),
        };
        let asks = match &body {
            Body::Whole(_) => true,
            Body::Pieces(body) => body.is_acked() || body.waits_for_grant(),
        };
        let reply = if from.bool()? { Some(Box::new(Assembly::thaw(from)?)) } else { None };
        Ok(Self {
            id,
            body,
            marks: Marks { lane, after },
            first_sent: was_sent.then_some(now),
            repeated: was_sent,
            due: asks.then_some(now),
            pause: Pause::of(PROBE / 4),
            deadline,
            reply,
        })
    }
}
