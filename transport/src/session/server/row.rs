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
    /// Lets a call, which is running, wait for another one's result, if there is none yet.
    pub(super) fn wait(&mut self, number: u16, after: After, payload: Vec<u8>) {
        let turn = self.turn_of(number, after);
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        match turn {
            Turn::Run(argument) => {
                let (sequence, lane) = (slot.slot.sequence(), slot.lane);
                self.run(number, sequence, lane, payload, Some(argument));
            }
            turn => {
                slot.turn(State::Waiting { after, payload, told_to_wait: false });
                if matches!(turn, Turn::Wait) {
                    self.waiting.push((after.slot, number));
                } else {
                    self.stop_waiting(number, Status::Aborted);
                }
            }
        }
    }

    /// A call has ended: those that waited for it go on, and those that waited for these.
    #[inline]
    pub(super) fn on_ended(&mut self, number: u16) {
        if !self.waiting.is_empty() {
            self.let_go_on(number);
        }
    }

    fn let_go_on(&mut self, mut ended: u16) {
        // Who will not run ends as well. No recursion: a row is as long as its client likes.
        let mut others = Vec::new();
        loop {
            let mut at = 0;
            while let Some(&(after, number)) = self.waiting.get(at) {
                if after != ended {
                    at += 1;
                    continue;
                }
                match self.turn_of_waiting(number) {
                    Some(Turn::Wait) => {
                        at += 1;
                        continue;
                    }
                    Some(Turn::Run(argument)) => self.go_on(number, argument),
                    Some(Turn::Abort) => {
                        self.say_stopped(number, Status::Aborted);
                        others.push(number);
                    }
                    None => {}
                }
                self.waiting.swap_remove(at);
            }
            match others.pop() {
                Some(other) => ended = other,
                None => break,
            }
        }
    }

    fn go_on(&mut self, number: u16, argument: Vec<u8>) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        let State::Waiting { payload, told_to_wait, .. } = &mut slot.state else { return };
        let (payload, told_to_wait) = (core::mem::take(payload), *told_to_wait);
        slot.turn(State::Running { told_to_wait, cancelled: false });
        let (sequence, lane) = (slot.slot.sequence(), slot.lane);
        self.run(number, sequence, lane, payload, Some(argument));
    }

    fn turn_of_waiting(&mut self, number: u16) -> Option<Turn> {
        match self.slots.get(usize::from(number))?.state {
            State::Waiting { after, .. } => Some(self.turn_of(number, after)),
            _ => None,
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
        self.waiting.retain(|&(_, waiting)| waiting != number);
        self.say_stopped(number, status);
        self.on_ended(number);
    }

    fn say_stopped(&mut self, number: u16, status: Status) {
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
    }
}
