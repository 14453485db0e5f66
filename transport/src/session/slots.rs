//! At most once: the two halves of a call slot, as pure logic.
//!
//! A call's identity is (client, its incarnation, slot, sequence). A slot holds one
//! call at a time; using it again acknowledges the reply before. Nothing here
//! allocates, sends or knows the time, so that the same code serves one slot in
//! a program without an allocator and many in a daemon.
//!
//! ```text
//! client   Idle ──begin──► Waiting ──on_reply(same sequence)──► Idle
//! server   Idle ──on_call(higher)──► Working ──on_done──► Done ──on_call(higher)──► Working …
//!                                  same: say so       same: send the reply again
//! ```
//!
//! Invariants: a sequence is executed at most once; a reply completes only the
//! call that waits, once. (A prototype kept a slot open after its reply; a late
//! duplicate then completed the next call, and made the benchmark look better.)

/// The client's half: which sequence waits for a reply.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ClientSlot {
    sequence: u64,
    waiting: bool,
}

/// The slot's call has not ended yet; the caller's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("slot still waits for its reply")]
pub struct SlotBusy;

/// What a reply means for a [`ClientSlot`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ReplyVerdict {
    /// It ends the call; take its payload.
    Complete,
    /// It belongs to a call that has ended already; drop it.
    Stale,
    /// It belongs to a call that was never begun; drop it, the peer is at fault.
    Unasked,
}

impl ClientSlot {
    /// A slot that has made no call.
    #[must_use]
    pub const fn new() -> Self {
        Self { sequence: 0, waiting: false }
    }

    /// Continues a slot where [`sequence`](Self::sequence) and
    /// [`is_waiting`](Self::is_waiting) of an earlier life left it.
    #[must_use]
    pub const fn resume(sequence: u64, waiting: bool) -> Self {
        Self { sequence, waiting }
    }

    /// Begins a call and gives its sequence, counted from 1.
    ///
    /// # Errors
    ///
    /// [`SlotBusy`] if the call before has not ended.
    pub const fn begin(&mut self) -> Result<u64, SlotBusy> {
        if self.waiting || self.sequence == u64::MAX {
            return Err(SlotBusy);
        }
        self.sequence += 1;
        self.waiting = true;
        Ok(self.sequence)
    }

    /// Begins a call with a sequence that the caller counts, higher than all before.
    ///
    /// # Errors
    ///
    /// [`SlotBusy`] if the call before has not ended, or `sequence` is no higher.
    pub const fn begin_at(&mut self, sequence: u64) -> Result<(), SlotBusy> {
        if self.waiting || sequence <= self.sequence {
            return Err(SlotBusy);
        }
        self.sequence = sequence;
        self.waiting = true;
        Ok(())
    }

    /// Takes a reply to `sequence`; only [`ReplyVerdict::Complete`] ends the call.
    pub const fn on_reply(&mut self, sequence: u64) -> ReplyVerdict {
        if sequence > self.sequence || sequence == 0 {
            return ReplyVerdict::Unasked;
        }
        if sequence < self.sequence || !self.waiting {
            return ReplyVerdict::Stale;
        }
        self.waiting = false;
        ReplyVerdict::Complete
    }

    /// The newest call will not be answered: it was never sent, or the server that
    /// knew it is gone. Its sequence stays used up.
    pub const fn forget(&mut self) {
        self.waiting = false;
    }

    /// Sequence of the newest call; zero before the first.
    #[must_use]
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether the newest call still waits for its reply.
    #[must_use]
    pub const fn is_waiting(&self) -> bool {
        self.waiting
    }
}

/// The server's half: which sequence ran or runs.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ServerSlot {
    sequence: u64,
    working: bool,
}

/// What a call means for a [`ServerSlot`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CallVerdict {
    /// New: run it, then say [`ServerSlot::on_done`]. The reply kept for the call
    /// before is no longer needed.
    Execute,
    /// It has run: send the kept reply again.
    RepeatReply,
    /// It runs now: tell the client.
    Working,
    /// Older than the newest, so its reply has arrived: drop it.
    Stale,
    /// Newer, though the call before still runs: drop it, the peer is at fault.
    Overrun,
}

impl ServerSlot {
    /// A slot that has seen no call.
    #[must_use]
    pub const fn new() -> Self {
        Self { sequence: 0, working: false }
    }

    /// Continues a slot where [`sequence`](Self::sequence) and
    /// [`is_working`](Self::is_working) of an earlier life left it.
    #[must_use]
    pub const fn resume(sequence: u64, working: bool) -> Self {
        Self { sequence, working }
    }

    /// Says what to do with call `sequence`, and counts it as begun if that is
    /// [`CallVerdict::Execute`].
    pub const fn on_call(&mut self, sequence: u64) -> CallVerdict {
        if sequence < self.sequence || sequence == 0 {
            return CallVerdict::Stale;
        }
        if sequence == self.sequence {
            return if self.working { CallVerdict::Working } else { CallVerdict::RepeatReply };
        }
        if self.working {
            return CallVerdict::Overrun;
        }
        self.sequence = sequence;
        self.working = true;
        CallVerdict::Execute
    }

    /// The call `sequence` has ended and its reply is kept; says whether that was
    /// the call that ran.
    pub const fn on_done(&mut self, sequence: u64) -> bool {
        let ended = self.working && sequence == self.sequence;
        if ended {
            self.working = false;
        }
        ended
    }

    /// Sequence of the newest call; zero before the first.
    #[must_use]
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether the newest call still runs.
    #[must_use]
    pub const fn is_working(&self) -> bool {
        self.working
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};
    use std::vec::Vec;

    /// A prototype's bug: the duplicate of an old reply ended the next call.
    #[test]
    fn late_duplicate_reply_completes_nothing() {
        let mut slot = ClientSlot::new();
        assert_eq!(slot.begin(), Ok(1));
        assert_eq!(slot.begin(), Err(SlotBusy));
        assert_eq!(slot.on_reply(1), ReplyVerdict::Complete);
        assert_eq!(slot.on_reply(1), ReplyVerdict::Stale);
        assert_eq!(slot.begin(), Ok(2));
        assert_eq!(slot.on_reply(1), ReplyVerdict::Stale);
        assert_eq!(slot.on_reply(3), ReplyVerdict::Unasked);
        assert_eq!(slot.on_reply(0), ReplyVerdict::Unasked);
        assert!(slot.is_waiting());
        assert_eq!(slot.on_reply(2), ReplyVerdict::Complete);
    }

    #[test]
    fn server_walks_through_every_verdict() {
        let mut slot = ServerSlot::new();
        assert_eq!(slot.on_call(0), CallVerdict::Stale);
        assert_eq!(slot.on_call(1), CallVerdict::Execute);
        assert_eq!(slot.on_call(1), CallVerdict::Working);
        assert_eq!(slot.on_call(2), CallVerdict::Overrun);
        assert!(!slot.on_done(2));
        assert!(slot.on_done(1));
        assert!(!slot.on_done(1));
        assert_eq!(slot.on_call(1), CallVerdict::RepeatReply);
        assert_eq!(slot.on_call(7), CallVerdict::Execute);
        assert_eq!(slot.on_call(1), CallVerdict::Stale);
        let moved = ServerSlot::resume(slot.sequence(), slot.is_working());
        assert_eq!(moved, slot);
    }

    /// A client, a server and all that was ever said between them.
    #[derive(Clone, Debug)]
    struct World {
        client: ClientSlot,
        server: ServerSlot,
        calls: u64,
        replies: BTreeSet<u64>,
        executed: BTreeSet<u64>,
        completed: BTreeSet<u64>,
    }

    /// Every state that four calls in one slot can reach over a link that delivers any
    /// earlier message at any time, any number of times.
    #[test]
    fn exhaustively_at_most_once() {
        const CALLS: u64 = 4;
        let (client, server, none) = (ClientSlot::new(), ServerSlot::new(), BTreeSet::new());
        let first = World {
            client,
            server,
            calls: 0,
            replies: none.clone(),
            executed: none.clone(),
            completed: none,
        };
        let (mut seen, mut open) = (BTreeSet::new(), vec![first]);
        while let Some(world) = open.pop() {
            if !seen.insert(format!("{world:?}")) {
                continue;
            }
            if world.calls < CALLS {
                let mut next = world.clone();
                if next.client.begin().is_ok() {
                    next.calls += 1;
                    open.push(next);
                }
            }
            // An honest client's sequences count from one.
            for sequence in 1..=world.calls {
                let mut next = world.clone();
                match next.server.on_call(sequence) {
                    CallVerdict::Execute => assert!(next.executed.insert(sequence), "{world:?}"),
                    CallVerdict::RepeatReply => drop(next.replies.insert(sequence)),
                    CallVerdict::Working | CallVerdict::Stale => {}
                    CallVerdict::Overrun => panic!("the client is honest: {world:?}"),
                }
                open.push(next);
            }
            if world.server.is_working() {
                let mut next = world.clone();
                assert!(next.server.on_done(next.server.sequence()));
                next.replies.insert(next.server.sequence());
                open.push(next);
            }
            for &sequence in &world.replies {
                let mut next = world.clone();
                if next.client.on_reply(sequence) == ReplyVerdict::Complete {
                    assert!(next.completed.insert(sequence), "{world:?}");
                    assert!(next.executed.contains(&sequence), "{world:?}");
                }
                open.push(next);
            }
        }
        let last = seen.iter().filter(|state| state.contains("completed: {1, 2, 3, 4}")).count();
        assert!(last > 0);
        // Of each call: under way, at work, answered, completed; and the beginning.
        assert_eq!(seen.len() as u64, 4 * CALLS + 1);
    }

    proptest! {
        /// A link that delivers any earlier message at any time, any number of times.
        #[test]
        fn at_most_once_whatever_the_link_does(steps in prop::collection::vec((0u8..4, any::<prop::sample::Index>()), 1..300)) {
            let (mut client, mut server) = (ClientSlot::new(), ServerSlot::new());
            let (mut calls, mut replies): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
            let mut executions = BTreeMap::new();
            let mut completions = BTreeMap::new();
            for (step, pick) in steps {
                match step {
                    0 => calls.extend(client.begin()),
                    1 if !calls.is_empty() => {
                        let sequence = *pick.get(&calls);
                        match server.on_call(sequence) {
                            CallVerdict::Execute => *executions.entry(sequence).or_insert(0) += 1,
                            CallVerdict::RepeatReply => replies.push(sequence),
                            CallVerdict::Working | CallVerdict::Stale => {}
                            CallVerdict::Overrun => prop_assert!(false, "client is honest"),
                        }
                    }
                    2 if server.is_working() => {
                        prop_assert!(server.on_done(server.sequence()));
                        replies.push(server.sequence());
                    }
                    3 if !replies.is_empty() => {
                        let sequence = *pick.get(&replies);
                        if client.on_reply(sequence) == ReplyVerdict::Complete {
                            *completions.entry(sequence).or_insert(0) += 1;
                        }
                    }
                    _ => {}
                }
            }
            prop_assert!(executions.values().all(|&n| n == 1));
            prop_assert!(completions.values().all(|&n| n == 1));
            prop_assert!(completions.keys().all(|sequence| executions.contains_key(sequence)));
            prop_assert!(executions.len() <= calls.len());
        }
    }
}
