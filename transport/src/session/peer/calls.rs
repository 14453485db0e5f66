//! A peer's calls, as the hub asks for them.

use super::{
    Arc, CallId, Counters, FEATURE_LANES, IncomingId, Instant, Lane, NotTaken, Peer, PeerStatus,
    ReplyError, Status, Total, Vec,
};
use crate::session::pool::Pool;

impl Peer {
    pub(crate) fn status(&self, now: Instant) -> PeerStatus {
        let counters = Counters {
            repeats: self.client.repeats,
            stale_replies: self.client.stale_replies,
            executions: self.server.executions,
            duplicates: self.server.duplicates,
            refused_pieces: self.server.refused_pieces,
            ..self.counters
        };
        PeerStatus {
            key: self.key,
            address: self.address,
            up: self.is_up(),
            rtt: self.rtt.smoothed(),
            last_handshake: self.current.as_ref().map(|keys| now.since(keys.since)),
            calls_in_flight: self.client.in_flight(),
            parked: self.server.parked(),
            slots: (self.client.slots_in_use(), self.server.slots_in_use()),
            set_aside: (self.client.set_aside(), self.server.set_aside()),
            unanswered: self.server.unanswered(),
            epochs: (self.ours.epoch, self.theirs.epoch),
            counters,
        }
    }

    pub(crate) fn call(
        &mut self,
        now: Instant,
        lane: Lane,
        payload: Vec<u8>,
        deadline: Option<Instant>,
    ) -> Result<CallId, NotTaken> {
        let up = self.current.is_some().then_some((now, &self.rtt));
        let id = self.client.call(up, lane, payload, deadline)?;
        self.assign(now);
        Ok(id)
    }

    pub(crate) fn call_row(
        &mut self,
        now: Instant,
        lane: Lane,
        row: impl ExactSizeIterator<Item = (Vec<u8>, bool)>,
        deadline: Option<Instant>,
        ids: &mut Vec<CallId>,
    ) -> Result<(), NotTaken> {
        let up = self.current.is_some().then_some((now, &self.rtt));
        self.client.call_row(up, lane, row, deadline, ids)?;
        self.assign(now);
        Ok(())
    }

    pub(crate) fn cancel(&mut self, now: Instant, id: CallId) {
        self.client.cancel(now, id);
        self.assign(now);
    }

    pub(crate) fn reply(
        &mut self,
        id: IncomingId,
        status: Status,
        payload: Vec<u8>,
    ) -> Result<(), ReplyError> {
        self.server.reply(id, status, payload)
    }

    pub(super) fn assign(&mut self, now: Instant) {
        if self.current.is_some() {
            self.client.assign(now, &self.rtt);
        }
    }

    /// What the keys in use allow.
    pub(super) fn apply_features(&mut self) {
        let lanes = self.current.as_ref().is_some_and(|keys| keys.has(FEATURE_LANES));
        self.client.set_lanes(lanes);
        self.server.set_lanes(lanes);
        if lanes {
            self.flow.widen();
        }
    }

    /// A buffer that was used before, with room for `length` bytes.
    pub(crate) fn buffer(&mut self, length: usize) -> Vec<u8> {
        if self.client.pool.kept() > self.server.pool.kept() {
            self.client.pool.take(length)
        } else {
            self.server.pool.take(length)
        }
    }

    /// A buffer of `length` bytes with whatever is in it.
    pub(crate) fn used_buffer(&mut self, length: usize) -> Vec<u8> {
        self.client.pool.take_used(length)
    }

    /// Takes a buffer back.
    pub(crate) fn recycle(&mut self, buffer: Vec<u8>) {
        // Large ones go where there are least, or else where payloads come: into these.
        let (ours, theirs) =
            (self.client.pool.kept_for(&buffer), self.server.pool.kept_for(&buffer));
        let is_call = Pool::is_large(&buffer) && self.places.are_calls();
        if ours > theirs || (ours == theirs && is_call) {
            self.server.pool.put(buffer);
        } else {
            self.client.pool.put(buffer);
        }
    }

    /// Calls of the peer's wait until others are answered: not for ever, for whoever answers
    /// may wait for one of them.
    pub(crate) fn on_short(&mut self, now: Instant) {
        if !self.server.is_short() {
            self.starved = None;
            return;
        }
        let freed = self.server.freed;
        let (since, before) = *self.starved.get_or_insert((now, freed));
        if before != freed {
            self.starved = Some((now, freed));
        } else if now.since(since) >= self.limits.dead_after {
            self.server.refuse_waiting();
            self.starved = None;
        }
    }

    /// Draws on what all peers share.
    pub(crate) fn share(&mut self, total: &Arc<Total>) {
        self.server.share(total);
    }

    /// All indices in use, when the peer is removed.
    pub(crate) fn indices(&self) -> impl Iterator<Item = u32> {
        let keys = [&self.current, &self.next, &self.previous];
        let asking = self.asking.as_ref().map(|asking| asking.index);
        keys.into_iter().flatten().map(|keys| keys.local_index).chain(asking)
    }
}
