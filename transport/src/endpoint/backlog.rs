//! Events on their way to whoever reads them, and what is done when nobody does.
//!
//! ```text
//! hub ──► channel of CHANNEL ──► application
//!    └──► queue, while the channel is full: calls up to a bound, the rest condensed
//! ```
//!
//! The hub is asked for events all the same, since outcomes of calls come the same way, and
//! whoever reads events may wait for one. Slots bound a peer's calls, but each restart of the
//! peer gives it new ones, so calls are bounded here as well: more of them are refused, and
//! have never run.
//!
//! Invariants: what is handed out is in the hub's order; a peer has at most two notes of being
//! up or down in the queue, and the last one handed out is how it is; CANCELLED comes at most
//! once for a call that was handed out.

use super::EndpointEvent;
use crate::session::handshake::PublicKey;
use std::collections::VecDeque;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

/// Events in the channel.
pub(super) const CHANNEL: usize = 1024;
/// A channel does not say when there is room again.
pub(super) const RETRY: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(super) struct Backlog {
    channel: SyncSender<EndpointEvent>,
    queue: VecDeque<EndpointEvent>,
    most_calls: usize,
    most_bytes: usize,
    calls: usize,
    bytes: usize,
}

/// Peer, and whether it is up.
const fn status_of(event: &EndpointEvent) -> Option<(PublicKey, bool)> {
    match event {
        EndpointEvent::PeerUp(peer) => Some((*peer, true)),
        EndpointEvent::PeerDown(peer, _) => Some((*peer, false)),
        EndpointEvent::Call { .. } | EndpointEvent::Cancelled(_) => None,
    }
}

/// Bytes, if it is a call.
fn call_of(event: &EndpointEvent) -> Option<usize> {
    match event {
        EndpointEvent::Call { payload, argument, .. } => {
            Some(payload.len() + argument.as_ref().map_or(0, Vec::len))
        }
        _ => None,
    }
}

impl Backlog {
    /// Of calls that wait behind the channel, at most so many, and so many bytes of them.
    pub(super) const fn new(
        channel: SyncSender<EndpointEvent>,
        most_calls: usize,
        most_bytes: usize,
    ) -> Self {
        Self { channel, queue: VecDeque::new(), most_calls, most_bytes, calls: 0, bytes: 0 }
    }

    /// Whether something waits for room in the channel.
    pub(super) fn waits(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Hands out what has waited; gives what nobody will ever take.
    pub(super) fn flush(&mut self) -> Option<EndpointEvent> {
        while let Some(event) = self.queue.pop_front() {
            let length = call_of(&event);
            match self.channel.try_send(event) {
                Err(TrySendError::Full(event)) => {
                    self.queue.push_front(event);
                    return None;
                }
                result => {
                    if let Some(length) = length {
                        self.calls -= 1;
                        self.bytes -= length;
                    }
                    if let Err(TrySendError::Disconnected(event)) = result {
                        return Some(event);
                    }
                }
            }
        }
        None
    }

    /// Hands out an event, or lets it wait; gives it back if there is nobody, or no room for
    /// a call.
    pub(super) fn push(&mut self, event: EndpointEvent) -> Result<(), EndpointEvent> {
        let event = if self.queue.is_empty() {
            match self.channel.try_send(event) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(event)) => return Err(event),
                Err(TrySendError::Full(event)) => event,
            }
        } else {
            event
        };
        if let Some(length) = call_of(&event) {
            if self.calls >= self.most_calls || self.bytes + length > self.most_bytes {
                return Err(event);
            }
            self.calls += 1;
            self.bytes += length;
        }
        if !self.is_settled_by(&event) {
            self.queue.push_back(event);
        }
        Ok(())
    }

    /// A third note of one peer takes the second one back: what was before it is so again.
    fn is_settled_by(&mut self, event: &EndpointEvent) -> bool {
        let Some((peer, is_up)) = status_of(event) else { return false };
        let notes = self.queue.iter().enumerate().filter_map(|(at, queued)| {
            status_of(queued).filter(|(queued, _)| *queued == peer).map(|(_, is_up)| (at, is_up))
        });
        let notes: Vec<_> = notes.collect();
        match notes[..] {
            [(_, first), (at, _)] if first == is_up => {
                self.queue.remove(at);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::DownReason;
    use std::sync::mpsc::{Receiver, sync_channel};

    const ONE: PublicKey = PublicKey([1; 32]);
    const TWO: PublicKey = PublicKey([2; 32]);

    fn full() -> (Backlog, Receiver<EndpointEvent>) {
        let (sender, receiver) = sync_channel(1);
        let mut backlog = Backlog::new(sender, 2, 100);
        backlog.push(EndpointEvent::PeerUp(TWO)).expect("room");
        (backlog, receiver)
    }

    fn rest(backlog: &mut Backlog, receiver: &Receiver<EndpointEvent>) -> Vec<EndpointEvent> {
        let mut taken = Vec::new();
        while let Ok(event) = receiver.try_recv() {
            taken.push(event);
            assert_eq!(backlog.flush(), None);
        }
        taken
    }

    #[test]
    fn notes_of_a_peer_that_nobody_reads_are_two_at_most_and_end_as_it_is() {
        let down = |reason| EndpointEvent::PeerDown(ONE, reason);
        let closed = || down(DownReason::Closed);
        let up = || EndpointEvent::PeerUp(ONE);
        for turns in 0..9 {
            let (mut backlog, receiver) = full();
            for turn in 0..turns {
                backlog.push(if turn % 2 == 0 { up() } else { closed() }).expect("kept");
                assert!(backlog.queue.len() <= 2);
            }
            let taken = rest(&mut backlog, &receiver);
            let expected = match turns {
                0 => vec![],
                n if n % 2 == 0 => vec![up(), closed()],
                _ => vec![up()],
            };
            assert_eq!(taken[1..], expected, "{turns}");
        }
    }

    #[test]
    fn whoever_does_not_read_for_good_gets_nothing_kept() {
        let (mut backlog, receiver) = full();
        backlog.push(EndpointEvent::PeerUp(ONE)).expect("kept");
        drop(receiver);
        assert_eq!(backlog.flush(), Some(EndpointEvent::PeerUp(ONE)));
        assert_eq!(backlog.push(EndpointEvent::PeerUp(ONE)), Err(EndpointEvent::PeerUp(ONE)));
        assert!(!backlog.waits());
    }
}
