//! Calls that take the result of another one.
//!
//! ```text
//! the earlier one    this one
//! not yet here, runs waits
//! Done               runs with its result
//! Stopped            runs with its result if it is to run anyhow, else Aborted
//! never ran, or its  Aborted
//! result is long
//! ```

use super::{After, Body, Kept, Say, Server, State, Status, Vec};
use core::cmp::Ordering;

/// What to do with a call of a row.
enum Turn {
    Wait,
    Run(Vec<u8>),
    Abort,
}

impl Server {
    pub(super) fn wait(&mut self, number: u16, after: After, payload: Vec<u8>) {
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            slot.state = State::Waiting { after, payload, told_to_wait: false };
            self.waiting.push(number);
            self.take_turn(number);
        }
    }

    /// A call has ended: those that waited for it go on, and those that waited for these.
    pub(super) fn on_ended(&mut self, number: u16) {
        let mut at = 0;
        while let Some(&waiting) = self.waiting.get(at) {
            let after = self.slots.get(usize::from(waiting)).and_then(|slot| match &slot.state {
                State::Waiting { after, .. } => Some(after.slot),
                _ => None,
            });
            if after == Some(number) && self.take_turn(waiting) {
                // The list has changed; whoever waits for that one is found by it.
                at = 0;
            } else {
                at += 1;
            }
        }
    }

    /// Lets a waiting call go on if it can; says whether it waits no more.
    fn take_turn(&mut self, number: u16) -> bool {
        let slot = self.slots.get(usize::from(number));
        let Some(State::Waiting { after, .. }) = slot.map(|slot| &slot.state) else { return false };
        let after = *after;
        match self.turn_of(number, after) {
            Turn::Wait => false,
            Turn::Abort => {
                self.stop_waiting(number, Status::Aborted);
                true
            }
            Turn::Run(argument) => {
                self.waiting.retain(|&waiting| waiting != number);
                let Some(slot) = self.slots.get_mut(usize::from(number)) else { return true };
                let next = State::Running { told_to_wait: false, cancelled: false };
                let old = core::mem::replace(&mut slot.state, next);
                if let State::Waiting { payload, told_to_wait: told, .. } = old {
                    if let State::Running { told_to_wait, .. } = &mut slot.state {
                        *told_to_wait = told;
                    }
                    self.run(number, payload, Some(argument));
                }
                true
            }
        }
    }

    fn turn_of(&mut self, number: u16, after: After) -> Turn {
        let earlier = self.slots.get(usize::from(after.slot)).filter(|_| after.slot != number);
        let Some(earlier) = earlier else {
            // Its slot is not known yet; itself it cannot wait for.
            return if after.slot == number { Turn::Abort } else { Turn::Wait };
        };
        match earlier.slot.sequence().cmp(&after.sequence) {
            Ordering::Less => Turn::Wait,
            Ordering::Greater => Turn::Abort,
            Ordering::Equal => match &earlier.state {
                State::Waiting { .. } | State::Running { .. } => Turn::Wait,
                State::Done(Kept { status, body: Body::Whole(bytes) })
                    if *status == Status::Done || (*status == Status::Stopped && after.anyhow) =>
                {
                    Turn::Run(self.pool.copy(bytes))
                }
                _ => Turn::Abort,
            },
        }
    }

    /// Ends a waiting call that never ran, and those that wait for it.
    pub(super) fn stop_waiting(&mut self, number: u16, status: Status) {
        self.waiting.retain(|&waiting| waiting != number);
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        let sequence = slot.slot.sequence();
        slot.slot.on_done(sequence);
        let kept = Kept { status, body: Body::Whole(Vec::new()) };
        let old = core::mem::replace(&mut slot.state, State::Done(kept));
        if let State::Waiting { payload, told_to_wait, .. } = old {
            self.pool.put(payload);
            self.unpark(told_to_wait);
            self.say(number, Say::Reply { tracked: told_to_wait });
        }
        self.on_ended(number);
    }
}
