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
//!
//! Invariant: what a frame makes us look at is bounded, or ends by it.

use super::{After, Body, Kept, Say, Server, State, Status, Vec, What};
use core::cmp::Ordering;

/// Most calls that wait for the same one; in a row that is one. Each time that one's slot is
/// used, all of them are looked at.
const MOST_WAITING: usize = 8;

/// What to do with a call of a row.
enum Turn {
    Wait,
    /// With the other one's result.
    Run,
    Abort,
}

impl Server {
    /// Lets a call, which says that it waits, go on if the one that it waits for has ended.
    #[inline]
    pub(super) fn wait(&mut self, number: u16, after: After) {
        match self.turn_of(number, after) {
            Turn::Wait if self.wait_behind(number, after.slot).is_some() => {}
            Turn::Run => self.go_on(number, after.slot),
            Turn::Wait | Turn::Abort => self.stop_waiting(number, Status::Aborted),
        }
    }

    /// Puts a call among those that wait for the one in slot `earlier`; `None` if there can be
    /// no such slot, or too many wait for it.
    pub(super) fn wait_behind(&mut self, number: u16, earlier: u16) -> Option<()> {
        let first = self.slot(earlier)?.first_waiting;
        let (mut next, mut count) = (first, 0);
        while let Some(waiting) = next {
            count += 1;
            next = self.slots.get(usize::from(waiting))?.next_waiting;
        }
        if count >= MOST_WAITING {
            return None;
        }
        self.slots.get_mut(usize::from(earlier))?.first_waiting = Some(number);
        self.slots.get_mut(usize::from(number))?.next_waiting = first;
        Some(())
    }

    /// A call has ended: those that waited for it go on, and those that waited for these.
    #[inline]
    pub(super) fn on_ended(&mut self, number: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(number))
            && let Some(first) = slot.first_waiting.take()
        {
            self.let_go_on(first);
        }
    }

    /// Lets calls go on that waited for one that has ended, from the first of them on.
    fn let_go_on(&mut self, first: u16) {
        let mut next = Some(first);
        // Who will not run ends as well. No recursion: a row is as long as its client likes.
        let mut others = Vec::new();
        loop {
            while let Some(number) = next {
                let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
                next = slot.next_waiting.take();
                let State::Waiting { after, .. } = slot.state else { continue };
                match self.turn_of(number, after) {
                    Turn::Run => self.go_on(number, after.slot),
                    Turn::Wait => {
                        self.wait_behind(number, after.slot);
                    }
                    Turn::Abort => {
                        self.say_stopped(number, Status::Aborted);
                        others.push(number);
                    }
                }
            }
            let Some(other) = others.pop() else { return };
            next =
                self.slots.get_mut(usize::from(other)).and_then(|slot| slot.first_waiting.take());
        }
    }

    /// Hands a call out that waited, with a copy of an earlier one's result.
    #[inline]
    fn go_on(&mut self, number: u16, earlier: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        let (sequence, lane) = (slot.slot.sequence(), slot.lane);
        let State::Waiting { payload, told_to_wait, .. } = &mut slot.state else { return };
        let Some(asked) = self.asked.add() else { return };
        (asked.slot, asked.sequence) = (number, sequence);
        (asked.incarnation, asked.lane) = (self.incarnation, lane);
        asked.payload = core::mem::take(payload);
        asked.what = What::CallInRow;
        self.executions += 1;
        let told_to_wait = *told_to_wait;
        slot.turn(State::Running { told_to_wait, cancelled: false });
        let earlier = self.slots.get(usize::from(earlier)).map(|slot| &slot.state);
        if let Some(State::Done(Kept { body: Body::Whole(result), .. })) = earlier {
            self.pool.refill(&mut asked.argument, result);
        }
    }

    #[inline]
    fn turn_of(&self, number: u16, after: After) -> Turn {
        let earlier = self.slots.get(usize::from(after.slot)).filter(|_| after.slot != number);
        let Some(earlier) = earlier else {
            // Its slot is not known yet; for itself it cannot wait.
            return if after.slot == number { Turn::Abort } else { Turn::Wait };
        };
        match earlier.slot.sequence().cmp(&after.sequence) {
            Ordering::Less => Turn::Wait,
            Ordering::Greater => Turn::Abort,
            Ordering::Equal => match &earlier.state {
                State::Waiting { .. } | State::Running { .. } => Turn::Wait,
                State::Done(Kept { status, body: Body::Whole(_) })
                    if *status == Status::Done || (*status == Status::Stopped && after.anyhow) =>
                {
                    Turn::Run
                }
                _ => Turn::Abort,
            },
        }
    }

    /// Ends a waiting call that never ran, and those that wait for it.
    pub(super) fn stop_waiting(&mut self, number: u16, status: Status) {
        self.wait_no_more(number);
        self.say_stopped(number, status);
        self.on_ended(number);
    }

    /// Takes a call out of those that wait for the same one.
    fn wait_no_more(&mut self, number: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return };
        let State::Waiting { after: After { slot: earlier, .. }, .. } = slot.state else { return };
        let behind = slot.next_waiting.take();
        let Some(earlier) = self.slots.get_mut(usize::from(earlier)) else { return };
        let mut link = &mut earlier.first_waiting;
        while let Some(waiting) = *link {
            if waiting == number {
                *link = behind;
                return;
            }
            let Some(slot) = self.slots.get_mut(usize::from(waiting)) else { return };
            link = &mut slot.next_waiting;
        }
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
