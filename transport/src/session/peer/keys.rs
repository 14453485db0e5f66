//! How a peer's keys come, are confirmed, are replaced and go.

use super::{Asking, DownReason, KeptRoot, Keys, Life, MOST_ENDED, MOST_ROOTS, Peer};
use crate::session::flow::{Arrivals, Fates, Tracked};
use crate::session::handshake::{Established, Initiator, Resume};
use crate::session::hub::Event;
use crate::session::key::Root;
use crate::session::ways::stream_number;
use crate::time::Instant;
use alloc::vec::Vec;
use conet_wire::session::frame::Direction;
use conet_wire::session::handshake::{
    COOKIE, FEATURE_RESUMED, FEATURE_SUPERSEDED, Response, ResumptionSecret,
};
use core::net::SocketAddr;
use core::time::Duration;

/// What is to be done with an initiation that opened.
pub(crate) enum Admission {
    /// Nothing.
    Ignore,
    /// Tell it that its life is over.
    Superseded,
    /// Answer it; slots of before count where this names their secret, or where the
    /// session never moved.
    Answer(Option<Root>),
}

/// Least time between two initiations of ours that others' make us send.
const CROSSING: Duration = Duration::from_millis(20);
/// So many of the peer's initiations give way to ours before one of them counts: perhaps ours
/// are old to the peer, since our clock went back over a restart.
const MOST_CROSSED: u32 = 4;

impl Peer {
    /// Whether it is time for an initiation, and to where.
    pub(crate) fn wants_to_ask(&self, now: Instant) -> bool {
        let somewhere = self.address.is_some() || self.hint.is_some();
        somewhere && self.ask_at.is_some_and(|at| at <= now)
    }

    /// Our epoch and life.
    pub(crate) const fn life(&self) -> (u64, u64) {
        (self.ours.epoch, self.ours.life)
    }

    /// What a session that was moved asks with.
    pub(crate) fn resume(&self) -> Option<Resume> {
        let Life { epoch, life } = self.ours;
        let root = self.current_root().filter(|_| epoch > 0)?.duplicate();
        Some(Resume { epoch, life, root })
    }

    /// The number of the next initiation: `counter`, unless one before was beyond it.
    pub(crate) fn next_counter(&mut self, counter: u64) -> u64 {
        self.least_counter = counter.max(self.least_counter.saturating_add(1));
        self.least_counter
    }

    pub(crate) fn on_asked(
        &mut self,
        now: Instant,
        index: u32,
        initiator: Initiator,
        packet: &[u8],
        digest: u64,
    ) {
        // A hint is good for one attempt.
        let Some(to) = self.hint.take().or(self.address) else { return };
        let packet = packet.to_vec();
        self.prepared.push_back((to, packet.clone()));
        let asking = Asking { initiator, index, since: now, to, packet, digest };
        if let Some(old) = self.asking.replace(asking) {
            self.retired.push(old.index);
        }
        self.put_off_asking(now);
    }

    /// Whether our initiation with this digest waits for an answer.
    pub(crate) fn asks(&self, digest: u64) -> bool {
        self.asking.as_ref().is_some_and(|asking| asking.digest == digest)
    }

    /// The peer has many initiations to answer and wants to see that we are where ours
    /// came from; says whether that was ours.
    pub(crate) fn on_cookie(&mut self, digest: u64, cookie: &[u8; COOKIE]) -> bool {
        let Some(asking) = self.asking.as_mut().filter(|asking| asking.digest == digest) else {
            return false;
        };
        let mut packet = asking.packet.clone();
        packet.extend_from_slice(cookie);
        // Once: who forges cookies must not make us send.
        asking.digest = 0;
        let to = asking.to;
        self.prepared.push_back((to, packet));
        true
    }

    /// The next attempt comes after a pause that doubles.
    pub(crate) fn put_off_asking(&mut self, now: Instant) {
        self.ask_at = Some(now + self.ask_pause);
        self.ask_pause = (self.ask_pause * 2).min(self.limits.dead_after);
    }

    /// What to do with an initiation of this peer. `smaller` says that our public key is
    /// the smaller one.
    pub(crate) fn admit(
        &mut self,
        now: Instant,
        from: SocketAddr,
        secret: &ResumptionSecret,
        smaller: bool,
    ) -> Admission {
        let life = Life { epoch: secret.epoch, life: secret.life };
        let is_same = self.remote_incarnation == Some(secret.common.incarnation);
        if self.ended.contains(&secret.common.incarnation)
            || (is_same && life != self.theirs && life.epoch <= self.theirs.epoch)
        {
            // Its number must not count: the clock of a stale life may be ahead, or behind.
            self.counters.superseded += 1;
            return Admission::Superseded;
        }
        if self.newest_counter.is_some_and(|newest| secret.common.counter <= newest) {
            self.counters.stale_initiations += 1;
            return Admission::Ignore;
        }
        self.newest_counter = Some(secret.common.counter);
        if self.unannounced && life.epoch == 0 {
            // It does not know that we have moved: before it does, nobody must be us.
            if self.address != Some(from) {
                self.set_address(now, from);
            }
            if self.asking.as_ref().is_none_or(|asking| now.since(asking.since) > CROSSING) {
                self.ask_at = Some(now);
            }
            return Admission::Ignore;
        }
        // A resumption says more than an initiation; of two alike the keys decide.
        let ours_wins = match (self.ours.epoch > 0, life.epoch > 0) {
            (ours, theirs) if ours == theirs => !smaller,
            (ours, _) => ours,
        };
        if self.asking.is_some() && ours_wins && self.crossed < MOST_CROSSED {
            // Both began at once and ours wins; but now we know where it may be.
            self.crossed += 1;
            self.counters.stale_initiations += 1;
            if self.address != Some(from) {
                if self.current.is_some() {
                    // Whoever is on the path can send it from anywhere: what is said under the
                    // keys of before does not go there, one attempt does.
                    self.hint = Some(from);
                    self.ask_at = Some(now);
                } else {
                    self.set_address(now, from);
                }
            }
            // Ours was sent before the peer was there to hear it; now it is.
            let crossing = (self.limits.handshake_retry / 4).max(CROSSING);
            if self.asking.as_ref().is_some_and(|asking| now.since(asking.since) > crossing) {
                self.ask_at = Some(now);
                self.ask_pause = self.limits.handshake_retry;
            }
            return Admission::Ignore;
        }
        self.crossed = 0;
        if let Some(asking) = self.asking.take() {
            self.retired.push(asking.index);
        }
        // Of another incarnation no slot is left to go on with.
        let is_ours = |kept: &&mut KeptRoot| is_same && kept.root.id == secret.root;
        let kept = self.roots.iter_mut().filter(|_| life.epoch > 0).find(is_ours);
        Admission::Answer(kept.map(|kept| {
            kept.pinned = true;
            kept.root.duplicate()
        }))
    }

    pub(crate) fn on_answered(
        &mut self,
        now: Instant,
        from: SocketAddr,
        index: u32,
        established: &Established,
        secret: &ResumptionSecret,
        packet: Vec<u8>,
    ) {
        let life = Life { epoch: secret.epoch, life: secret.life };
        let keys = Keys {
            proved: Some(from),
            remote_life: Some(life),
            announces: life.epoch > 0,
            // It moved and we have forgotten what it moved with: begin anew.
            anew: life.epoch > 0 && established.features & FEATURE_RESUMED == 0,
            ..Keys::new(now, index, false, established)
        };
        if let Some(old) = self.next.replace(keys) {
            self.retired.push(old.local_index);
        }
        self.keep_root(established.root.duplicate());
        if self.current.is_none() {
            // The initiator confirms soon; if it was a recording, nobody does.
            self.put_off_asking(now);
        }
        self.prepared.push_back((from, packet));
    }

    pub(super) fn keep_root(&mut self, root: Root) {
        if self.roots.len() >= MOST_ROOTS {
            let first = self.roots.iter().position(|kept| !kept.pinned).unwrap_or(0);
            self.roots.remove(first);
        }
        self.roots.push_back(KeptRoot { root, pinned: false });
    }

    pub(super) fn current_root(&self) -> Option<&Root> {
        let id = self.root?;
        self.roots.iter().map(|kept| &kept.root).find(|root| root.id == id)
    }

    pub(crate) fn on_response(&mut self, now: Instant, response: &Response<'_>) {
        let Some(asking) = &mut self.asking else { return };
        if asking.index != response.session {
            return;
        }
        let Ok(established) = asking.initiator.finish(response) else {
            self.counters.forged += 1;
            return;
        };
        let (index, since, to) = (asking.index, asking.since, asking.to);
        self.asking = None;
        if established.features & FEATURE_SUPERSEDED != 0 {
            self.retired.push(index);
            self.go_down(now, DownReason::Superseded);
            return;
        }
        let responder = established.responder.map(|(epoch, life)| Life { epoch, life });
        if self.remote_incarnation == Some(established.remote_incarnation)
            && responder.is_some_and(|life| life != self.theirs && life.epoch <= self.theirs.epoch)
        {
            // Who answers there is an earlier life of the peer.
            self.retired.push(index);
            self.counters.superseded += 1;
            return;
        }
        // Keys that we answered for earlier lose: both ends end up with these.
        self.retired.extend(self.next.take().map(|keys| keys.local_index));
        self.keep_root(established.root.duplicate());
        let is_moved = self.ours.epoch > 0;
        let keys = Keys {
            // It answered at the address that was asked; where its answer came from, whoever
            // is on the path could have chosen.
            proved: Some(to),
            anew: is_moved && established.features & FEATURE_RESUMED == 0,
            remote_life: responder,
            announces: is_moved,
            ..Keys::new(now, index, true, &established)
        };
        self.switch(now, keys);
        self.rtt.on_upper_bound(now.since(since));
        // The responder waits for a packet under the new keys.
        self.ping_due = true;
    }

    /// Takes `keys` into use.
    pub(super) fn switch(&mut self, now: Instant, keys: Keys) {
        self.counters.handshakes += 1;
        self.heard = now;
        self.unanswered = None;
        self.ask_at = None;
        self.crossed = 0;
        self.ask_pause = self.limits.handshake_retry;
        self.superseded = false;
        let incarnation = keys.remote_incarnation;
        let was_up = self.current.is_some();
        let same = self.remote_incarnation == Some(incarnation) && !keys.anew;
        let (proved, life) = (keys.proved, keys.remote_life);
        let last = self.root.replace(keys.root);
        for kept in &mut self.roots {
            kept.pinned = [self.root, last].contains(&Some(kept.root.id));
        }
        let old = self.current.replace(keys);
        self.retired.extend(self.previous.take().map(|keys| keys.local_index));
        let moved = same && life.is_some_and(|life| life != self.theirs);
        if let Some(life) = life {
            self.theirs = life;
        } else if !same {
            self.theirs = Life::default();
        }
        if same && !moved {
            self.previous = old;
        } else {
            // Packets of an earlier life count no more.
            self.retired.extend(old.map(|keys| keys.local_index));
        }
        if !same {
            // Slots begin anew: nobody goes on with what was shared before.
            let root = self.root;
            self.roots.retain(|kept| Some(kept.root.id) == root);
            if let Some(old) = self.remote_incarnation {
                self.client.on_peer_restart();
                if old != incarnation {
                    // It has ended for good, whoever thaws an image of it.
                    while self.ended.len() >= MOST_ENDED {
                        self.ended.pop_front();
                    }
                    self.ended.push_back(old);
                }
            }
            self.server.on_peer_restart(incarnation);
            self.remote_incarnation = Some(incarnation);
        }
        if let Some(address) = proved {
            self.candidate = None;
            self.counters.moves += u64::from(self.address.is_some_and(|old| old != address));
            self.place(address);
        }
        // Packet numbers begin anew: nothing in flight can be acknowledged now.
        self.restart_flow(now);
        self.apply_features();
        self.arrivals = Arrivals::default();
        self.client.on_new_keys(now, &self.rtt);
        if was_up && !same {
            self.events.push_back(Event::Down(self.key, DownReason::Restarted));
        }
        if !was_up || !same {
            self.events.push_back(Event::Up(self.key));
        }
        self.assign(now);
    }

    pub(super) fn restart_flow(&mut self, now: Instant) {
        let mut fates = core::mem::take(&mut self.fates);
        self.flow.restart(&mut fates);
        self.bulk.forget();
        self.on_fates(now, fates);
    }

    pub(super) fn on_fates(&mut self, now: Instant, mut fates: Fates) {
        for (what, arrived) in fates.drain(..) {
            if let Tracked::Piece { direction: Direction::Call, .. } = what {
                self.client.on_piece_fate(now, &self.rtt, &what, arrived);
            } else {
                self.server.on_fate(&what, arrived);
            }
        }
        self.fates = fates;
    }

    /// Forgets the keys; calls end as the module says, and a new attempt begins.
    pub(super) fn go_down(&mut self, now: Instant, reason: DownReason) {
        let keys = [self.current.take(), self.previous.take()];
        self.retired.extend(keys.into_iter().flatten().map(|keys| keys.local_index));
        self.candidate = None;
        self.restart_flow(now);
        self.client.on_unreachable(now);
        self.events.push_back(Event::Down(self.key, reason));
        self.ask_pause = self.limits.handshake_retry;
        let wait = match reason {
            DownReason::Closed => self.ask_pause,
            DownReason::Silent | DownReason::Restarted => Duration::ZERO,
            DownReason::Superseded => {
                self.superseded = true;
                self.ask_at = None;
                return;
            }
        };
        self.ask_at = self.address.map(|_| now + wait);
    }

    /// The peer's old node says where it has gone. It may be a recording, so one attempt
    /// is made there, and only its answer moves the peer.
    pub(crate) fn on_moved(&mut self, now: Instant, address: SocketAddr) {
        let is_soon = |asking: &Asking| now.since(asking.since) < CROSSING;
        if self.superseded
            || stream_number(address).is_some()
            || self.address == Some(address)
            || self.asking.as_ref().is_some_and(|asking| is_soon(asking) && asking.to == address)
        {
            return;
        }
        self.hint = Some(address);
        self.ask_at = Some(now);
    }

    /// Secrets under which a MOVED may come.
    pub(crate) fn roots(&self) -> impl Iterator<Item = &Root> {
        self.roots.iter().rev().map(|kept| &kept.root)
    }
}
