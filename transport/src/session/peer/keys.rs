//! How a peer's keys come, are confirmed, are replaced and go.

use super::{Asking, DownReason, Keys, Peer, PeerEvent};
use crate::session::flow::{Arrivals, Outcome, Tracked};
use crate::session::handshake::{Established, Initiator};
use crate::time::Instant;
use conet_wire::session::frame::Direction;
use conet_wire::session::handshake::{INITIATION, RESPONSE, Response};
use core::time::Duration;
use std::net::SocketAddr;

impl Peer {
    /// Whether it is time for an initiation, and to where.
    pub(crate) fn wants_to_ask(&self, now: Instant) -> bool {
        self.address.is_some() && self.ask_at.is_some_and(|at| at <= now)
    }

    pub(crate) fn on_asked(
        &mut self,
        now: Instant,
        index: u32,
        initiator: Initiator,
        packet: &[u8; INITIATION],
    ) {
        if let Some(old) = self.asking.replace(Asking { initiator, index, since: now }) {
            self.retired.push(old.index);
        }
        self.put_off_asking(now);
        if let Some(address) = self.address {
            self.handshake_out.push_back((address, packet.to_vec()));
        }
    }

    /// The next attempt comes after a pause that doubles.
    pub(crate) fn put_off_asking(&mut self, now: Instant) {
        self.ask_at = Some(now + self.ask_pause);
        self.ask_pause = (self.ask_pause * 2).min(self.limits.dead_after);
    }

    /// Whether an initiation of this peer with `counter` is to be answered. `smaller`
    /// says that our public key is the smaller one.
    pub(crate) fn admits(
        &mut self,
        now: Instant,
        from: SocketAddr,
        counter: u64,
        smaller: bool,
    ) -> bool {
        if self.newest_counter.is_some_and(|newest| counter <= newest) {
            self.counters.stale_initiations += 1;
            return false;
        }
        self.newest_counter = Some(counter);
        if self.asking.is_some() && !smaller {
            // Both began at once and ours wins; but now we know where it is.
            self.counters.stale_initiations += 1;
            if self.address != Some(from) {
                self.set_address(now, from);
            }
            // Ours was sent before the peer was there to hear it; now it is.
            let crossing = self.limits.handshake_retry / 4;
            if self.asking.as_ref().is_some_and(|asking| now.since(asking.since) > crossing) {
                self.ask_at = Some(now);
                self.ask_pause = self.limits.handshake_retry;
            }
            return false;
        }
        if let Some(asking) = self.asking.take() {
            self.retired.push(asking.index);
        }
        true
    }

    pub(crate) fn on_answered(
        &mut self,
        now: Instant,
        from: SocketAddr,
        index: u32,
        established: &Established,
        packet: &[u8; RESPONSE],
    ) {
        if let Some(old) = self.next.replace(Keys::new(now, index, false, established)) {
            self.retired.push(old.local_index);
        }
        if self.current.is_none() {
            // The initiator confirms soon; if it was a recording, nobody does.
            self.put_off_asking(now);
        }
        self.handshake_out.push_back((from, packet.to_vec()));
    }

    pub(crate) fn on_response(&mut self, now: Instant, from: SocketAddr, response: &Response<'_>) {
        let Some(asking) = &mut self.asking else { return };
        if asking.index != response.session {
            return;
        }
        let Ok(established) = asking.initiator.finish(response) else {
            self.counters.forged += 1;
            return;
        };
        let (index, since) = (asking.index, asking.since);
        self.asking = None;
        // Keys that we answered for earlier lose: both ends end up with these.
        self.retired.extend(self.next.take().map(|keys| keys.local_index));
        self.switch(now, Keys::new(now, index, true, &established));
        self.address = Some(from);
        self.rtt.on_upper_bound(now.since(since));
        // The responder waits for a packet under the new keys.
        self.ping_due = true;
    }

    /// Takes `keys` into use.
    pub(super) fn switch(&mut self, now: Instant, keys: Keys) {
        self.counters.handshakes += 1;
        self.heard = now;
        self.ask_at = None;
        self.ask_pause = self.limits.handshake_retry;
        let incarnation = keys.remote_incarnation;
        let was_up = self.current.is_some();
        let same = self.remote_incarnation == Some(incarnation);
        let old = self.current.replace(keys);
        self.retired.extend(self.previous.take().map(|keys| keys.local_index));
        if same {
            self.previous = old;
        } else {
            self.retired.extend(old.map(|keys| keys.local_index));
            if self.remote_incarnation.is_some() {
                self.client.on_peer_restart(now);
            }
            self.server.on_peer_restart(incarnation);
            self.remote_incarnation = Some(incarnation);
        }
        // Packet numbers begin anew: nothing in flight can be acknowledged now.
        self.restart_flow(now);
        self.arrivals = Arrivals::default();
        self.client.on_new_keys(now, &self.rtt);
        if was_up && !same {
            self.events.push_back(PeerEvent::Down(DownReason::Restarted));
        }
        if !was_up || !same {
            self.events.push_back(PeerEvent::Up);
        }
        self.assign(now);
        self.collect_ended();
    }

    pub(super) fn restart_flow(&mut self, now: Instant) {
        let lost = self.flow.restart();
        self.on_outcome(now, Outcome { acked: Vec::new(), lost });
    }

    pub(super) fn on_outcome(&mut self, now: Instant, outcome: Outcome) {
        let fates = outcome.acked.into_iter().map(|what| (what, true));
        for (what, arrived) in fates.chain(outcome.lost.into_iter().map(|what| (what, false))) {
            if let Tracked::Piece { direction: Direction::Call, .. } = what {
                self.client.on_piece_fate(now, &self.rtt, &what, arrived);
            } else {
                self.server.on_fate(&what, arrived);
            }
        }
    }

    /// Forgets the keys; calls end as the module says, and a new attempt begins.
    pub(super) fn go_down(&mut self, now: Instant, reason: DownReason) {
        let keys = [self.current.take(), self.previous.take()];
        self.retired.extend(keys.into_iter().flatten().map(|keys| keys.local_index));
        self.restart_flow(now);
        self.client.on_unreachable(now);
        self.events.push_back(PeerEvent::Down(reason));
        self.collect_ended();
        self.ask_pause = self.limits.handshake_retry;
        let wait = match reason {
            DownReason::Closed => self.ask_pause,
            DownReason::Silent | DownReason::Restarted => Duration::ZERO,
        };
        self.ask_at = self.address.map(|_| now + wait);
    }
}
