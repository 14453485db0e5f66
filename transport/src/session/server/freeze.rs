//! Calls of the peer's as they go into an image and come out of it.

use super::{
    After, Assembly, Body, IncomingId, Kept, Limits, Outgoing, Server, ServerSlot, Slot, State,
    Status, Vec,
};
use crate::session::client::thaw_lane;
use crate::session::image::{ImageError, Reader, Writer};
use alloc::boxed::Box;

const IDLE: u8 = 0;
const ASSEMBLING: u8 = 1;
const WAITING: u8 = 2;
const RUNNING: u8 = 3;
const DONE: u8 = 4;
const DELIVERED: u8 = 5;

const STATUSES: [Status; 6] = [
    Status::Done,
    Status::Cancelled,
    Status::Refused,
    Status::Stopped,
    Status::Aborted,
    Status::Lost,
];

impl Server {
    pub(crate) fn freeze(&self, out: &mut Writer) {
        out.u64(self.incarnation);
        out.u32(self.version);
        out.count(self.granted);
        out.u64(self.floor);
        out.bool(self.lanes);
        out.count(self.slots.len());
        for slot in &self.slots {
            out.u64(slot.slot.sequence());
            out.u8(slot.lane as u8);
            slot.state.freeze(out);
        }
    }

    pub(crate) fn thaw(limits: Limits, from: &mut Reader<'_>) -> Result<Self, ImageError> {
        let mut server = Self::new(limits);
        server.incarnation = from.u64()?;
        server.version = from.u32()?;
        server.granted = from.u32()? as usize;
        server.is_obeyed = server.version == 0;
        server.floor = from.u64()?;
        server.lanes = from.bool()?;
        let count = from.count(10)?;
        if count > 1 << 16 || server.granted > 1 << 16 {
            return Err(ImageError::Malformed);
        }
        let mut waiting = Vec::new();
        for number in 0..count {
            let number = u16::try_from(number).map_err(|_| ImageError::Malformed)?;
            let sequence = from.u64()?;
            let lane = thaw_lane(from)?;
            let state = State::thaw(from)?;
            let works = matches!(state, State::Running { .. } | State::Waiting { .. });
            match &state {
                State::Running { told_to_wait: true, .. }
                | State::Waiting { told_to_wait: true, .. } => server.parked += 1,
                State::Assembling { sequence, assembly, whole } => {
                    let (total, granted) = (assembly.total(), assembly.granted());
                    let room = server.grants.restore(number, *sequence, total, granted, *whole);
                    room.ok_or(ImageError::Malformed)?;
                    if assembly.is_complete() {
                        server.grants.wait(number, *sequence);
                    }
                }
                State::Done(Kept { body: Body::Pieces(_), .. }) => server.large.push(number),
                _ => {}
            }
            if let State::Waiting { after, .. } = &state {
                waiting.push((number, after.slot));
            }
            let slot = ServerSlot::resume(sequence, works);
            server.slots.push(Slot::new(slot, state, lane));
        }
        for (number, earlier) in waiting {
            // Behind a slot that there cannot be it waits until it is cancelled.
            server.wait_behind(number, earlier);
        }
        Ok(server)
    }

    /// Calls that were handed out and have not been answered, and whether the client
    /// still wants each.
    pub(crate) fn running(&self) -> Vec<(IncomingId, bool)> {
        let slots = self.slots.iter().enumerate();
        slots
            .filter_map(|(at, slot)| {
                let State::Running { cancelled, .. } = slot.state else { return None };
                let number = u16::try_from(at).ok()?;
                let (sequence, incarnation) = (slot.slot.sequence(), self.incarnation);
                Some((IncomingId { slot: number, sequence, incarnation }, !cancelled))
            })
            .collect()
    }
}

impl State {
    fn freeze(&self, out: &mut Writer) {
        match self {
            Self::Idle => out.u8(IDLE),
            Self::Assembling { sequence, assembly, whole } => {
                out.u8(ASSEMBLING);
                out.u64(*sequence);
                out.bool(*whole);
                assembly.freeze(out);
            }
            Self::Waiting { after, payload, told_to_wait } => {
                out.u8(WAITING);
                out.u16(after.slot);
                out.u64(after.sequence);
                out.bool(after.anyhow);
                out.bool(*told_to_wait);
                out.bytes(payload);
            }
            Self::Running { told_to_wait, cancelled } => {
                out.u8(RUNNING);
                out.bool(*told_to_wait);
                out.bool(*cancelled);
            }
            Self::Done(Kept { status, body }) => {
                out.u8(DONE);
                let status = STATUSES.iter().position(|one| one == status).unwrap_or_default();
                out.u8(u8::try_from(status).unwrap_or_default());
                match body {
                    Body::Whole(bytes) => {
                        out.u8(0);
                        out.bytes(bytes);
                    }
                    Body::Pieces(body) => {
                        out.u8(1);
                        body.freeze(out);
                    }
                }
            }
            Self::Delivered => out.u8(DELIVERED),
        }
    }

    fn thaw(from: &mut Reader<'_>) -> Result<Self, ImageError> {
        Ok(match from.u8()? {
            IDLE => Self::Idle,
            ASSEMBLING => {
                let (sequence, whole) = (from.u64()?, from.bool()?);
                Self::Assembling { sequence, whole, assembly: Box::new(Assembly::thaw(from)?) }
            }
            WAITING => {
                let after =
                    After { slot: from.u16()?, sequence: from.u64()?, anyhow: from.bool()? };
                let told_to_wait = from.bool()?;
                Self::Waiting { after, told_to_wait, payload: from.bytes()?.to_vec() }
            }
            RUNNING => Self::Running { told_to_wait: from.bool()?, cancelled: from.bool()? },
            DONE => {
                let status = STATUSES.get(usize::from(from.u8()?)).copied();
                let body = match from.u8()? {
                    0 => Body::Whole(from.bytes()?.to_vec()),
                    1 => Body::Pieces(Box::new(Outgoing::thaw(from)?)),
                    _ => return Err(ImageError::Malformed),
                };
                Self::Done(Kept { status: status.ok_or(ImageError::Malformed)?, body })
            }
            DELIVERED => Self::Delivered,
            _ => return Err(ImageError::Malformed),
        })
    }
}
