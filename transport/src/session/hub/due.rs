//! When which peer is to be looked at.
//!
//! ```text
//! touched, due ──► awake ──more than a few are──► asleep until its deadline
//! ```
//!
//! Peers that something has just happened to are asked for their deadlines each time; the
//! others were asked when they fell asleep. So a call costs the same beside a thousand idle
//! peers as beside none.
//!
//! Invariants: nothing changes at a peer that is asleep without [`Hub::wake`]; a peer with
//! something to send is awake; an entry that no longer holds wakes nobody.

use super::{Hub, Instant, Peer};

/// So many are awake without end: to ask a few costs less than to put them to sleep.
const FEW: usize = 8;

impl Hub {
    /// A peer's deadline may have changed.
    #[inline]
    pub(super) fn wake(&mut self, at: usize) {
        if let Some(Some(peer)) = self.peers.get_mut(at)
            && !peer.is_awake
        {
            peer.is_awake = true;
            self.awake.push(at);
        }
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        if !self.asides.is_empty() {
            return Some(now);
        }
        let awake = self.awake.iter().filter_map(|at| self.peers.get(*at)?.as_ref());
        awake.filter_map(|peer| peer.deadline(now)).chain(self.due.next()).min()
    }

    /// Does what time has made due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.forget_tombs(now);
        while let Some((due, at)) = self.due.pop_at(now) {
            if let Some(Some(peer)) = self.peers.get_mut(at)
                && peer.due_at == Some(due)
            {
                peer.due_at = None;
                self.wake(at);
            }
        }
        let mut next = 0;
        // Who is due may wake others.
        while let Some(&at) = self.awake.get(next) {
            next += 1;
            let Some(Some(peer)) = self.peers.get_mut(at) else { continue };
            if peer.deadline(now).is_some_and(|deadline| deadline <= now) {
                peer.handle_timeout(now);
                if peer.wants_to_ask(now) {
                    let is_lost = peer.is_lost();
                    self.ask(now, at);
                    if is_lost {
                        self.ask_others(at);
                    }
                }
                self.touch(at);
            }
        }
        if self.awake.len() > FEW {
            self.put_to_sleep(now);
        }
    }

    /// Notes when the peers that are awake are to be looked at again, if nothing happens.
    #[cold]
    fn put_to_sleep(&mut self, now: Instant) {
        let Self { awake, peers, due, .. } = self;
        awake.retain(|&at| {
            let Some(Some(peer)) = peers.get_mut(at) else { return false };
            let deadline = peer.deadline(now);
            if peer.is_ready || deadline.is_some_and(|deadline| deadline <= now) {
                return true;
            }
            peer.is_awake = false;
            // An entry that comes earlier does as well: most deadlines are put off again.
            if let Some(deadline) = deadline
                && peer.due_at.is_none_or(|due_at| deadline < due_at)
            {
                peer.due_at = Some(deadline);
                due.set(deadline, at);
            }
            false
        });
        if due.is_crowded(peers.len()) {
            let holds = |peer: &Peer, at| peer.due_at == Some(at);
            due.retain(|due, at| {
                peers.get(at).is_some_and(|p| p.as_ref().is_some_and(|p| holds(p, due)))
            });
        }
    }
}
