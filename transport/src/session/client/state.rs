//! What a call of ours is while it has not ended.

use super::{Assembly, CallId, ClientSlot, Instant, Lane, Marks, Outgoing, Vec};
use crate::session::rtt::Pause;
use alloc::boxed::Box;

/// Whether a call stands alone or takes the result of the one queued before it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Link {
    Alone,
    Next { anyhow: bool },
}

/// What is said of a call beside its payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct How {
    pub(super) id: CallId,
    pub(super) deadline: Option<Instant>,
    pub(super) link: Link,
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) id: CallId,
    pub(super) payload: Vec<u8>,
    pub(super) deadline: Option<Instant>,
    pub(super) link: Link,
}

#[derive(Debug)]
pub(super) enum Body {
    /// Fits one packet, so it is repeated whole.
    Whole(Vec<u8>),
    /// Apart: most calls are small ones, and are moved from place to place.
    Pieces(Box<Outgoing>),
}

#[derive(Debug)]
pub(super) struct Active {
    pub(super) id: CallId,
    pub(super) body: Body,
    pub(super) marks: Marks,
    pub(super) first_sent: Option<Instant>,
    pub(super) repeated: bool,
    /// When to send or ask again; `None` while pieces are on their way.
    pub(super) due: Option<Instant>,
    pub(super) pause: Pause,
    pub(super) deadline: Option<Instant>,
    pub(super) reply: Option<Box<Assembly>>,
}

#[derive(Debug)]
pub(super) enum State {
    Free,
    Active(Active),
    /// Answered, but a later call of its row may still need the result.
    Held,
    /// Ended for the caller, but the server may still work on it.
    Draining {
        due: Instant,
        pause: Pause,
    },
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) slot: ClientSlot,
    pub(super) state: State,
    pub(super) lane: Lane,
    pub(super) in_outbox: bool,
    /// Calls that take this one's result and have not been answered.
    pub(super) pins: u16,
    /// The slot that this call pins.
    pub(super) after: Option<u16>,
    /// When the client is reminded of this slot: not later than its call is due.
    pub(super) timer: Option<Instant>,
}

impl Slot {
    pub(super) const fn new() -> Self {
        Self {
            slot: ClientSlot::new(),
            state: State::Free,
            lane: Lane::Calls,
            in_outbox: false,
            pins: 0,
            after: None,
            timer: None,
        }
    }

    /// Gives it another state where the old one owns no memory, or no longer, so that nobody
    /// looks for some: a call goes through two of them.
    #[inline]
    pub(super) fn turn(&mut self, state: State) {
        debug_assert!(match &self.state {
            State::Free | State::Held | State::Draining { .. } => true,
            State::Active(active) => {
                let is_empty = matches!(&active.body, Body::Whole(bytes) if bytes.capacity() == 0);
                is_empty && active.reply.is_none()
            }
        });
        core::mem::forget(core::mem::replace(&mut self.state, state));
    }
}
