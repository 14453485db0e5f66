//! Where packets for a peer go, and whether anything comes back.

use super::{Candidate, Peer, Rtt};
use crate::session::ways::stream_number;
use crate::time::Instant;
use core::net::SocketAddr;
use core::time::Duration;

impl Peer {
    pub(crate) const fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    pub(crate) const fn smoothed_rtt(&self) -> Option<Duration> {
        self.rtt.smoothed()
    }

    pub(crate) const fn unanswered(&self) -> Option<Instant> {
        self.unanswered
    }

    /// Where it is, and where it may be.
    pub(crate) fn may_be_at(&self) -> impl Iterator<Item = SocketAddr> + use<> {
        self.address.into_iter().chain(self.candidate.as_ref().map(|candidate| candidate.address))
    }

    /// Something went out that a living peer answers at once.
    pub(super) fn expect_answer(&mut self, now: Instant) {
        self.unanswered.get_or_insert(now);
    }

    pub(crate) fn ask_whether_there(&mut self) {
        self.ping_due = self.current.is_some();
    }

    /// Challenges the peer at an address that our owner has named.
    pub(crate) fn challenge_at(&mut self, now: Instant, address: SocketAddr, token: u64) {
        if self.current.is_some() && self.address != Some(address) {
            self.candidate = Some(Candidate::named(now, address, token));
        }
    }

    pub(crate) fn redirect(&mut self, now: Instant, address: SocketAddr) {
        if self.current.is_some() {
            self.move_to(now, address);
            self.ping_due = true;
            self.is_ahead = true;
        } else {
            self.set_address(now, address);
        }
        // A new way has a time of its own to answer.
        self.unanswered = None;
    }

    /// The peer comes along: what it has said on the old way since is lost, so it is asked
    /// again behind the proof.
    pub(super) fn on_followed(&mut self, now: Instant) {
        if core::mem::take(&mut self.is_ahead) {
            self.restart_flow(now);
            self.client.on_new_keys(now, &self.rtt);
        }
    }

    /// The peer is there, with all that is on its way.
    pub(super) fn place(&mut self, address: SocketAddr) {
        let old = self.address.replace(address);
        self.beside = old.filter(|old| stream_number(*old).is_none()).or(self.beside);
        self.rtt.set_patient(stream_number(address).is_some());
    }

    /// The peer is there now.
    pub(super) fn move_to(&mut self, now: Instant, address: SocketAddr) {
        self.candidate = None;
        let old = self.address;
        self.place(address);
        if old.is_some_and(|old| old != address) {
            self.rtt = Rtt::over(stream_number(address).is_some());
            self.restart_flow(now);
            // What went to the old address is as good as lost.
            self.client.on_new_keys(now, &self.rtt);
            self.counters.moves += 1;
        }
    }
}
