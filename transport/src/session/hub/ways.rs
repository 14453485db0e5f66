//! What a choice of ways asks of a hub; see [`crate::session::ways`].

use super::{Duration, Hub, Instant, PublicKey, SocketAddr};
use crate::session::ways::stream_number;

impl Hub {
    fn known(&self, key: &PublicKey) -> Option<&super::Peer> {
        self.peers.get(*self.keys.get(key)?)?.as_ref()
    }

    /// Where packets for the peer go now.
    #[must_use]
    pub fn address_of(&self, key: &PublicKey) -> Option<SocketAddr> {
        self.known(key)?.address()
    }

    /// Smoothed round-trip time.
    #[must_use]
    pub fn rtt_of(&self, key: &PublicKey) -> Option<Duration> {
        self.known(key)?.smoothed_rtt()
    }

    /// Whether a session with the peer stands.
    #[must_use]
    pub fn is_up(&self, key: &PublicKey) -> bool {
        self.known(key).is_some_and(super::Peer::is_up)
    }

    /// Since when the peer has been sent something that it answers at once, and has not
    /// been heard.
    #[must_use]
    pub fn unanswered(&self, key: &PublicKey) -> Option<Instant> {
        self.known(key)?.unanswered()
    }

    /// The numbers of streams at which peers are, or may be.
    pub fn streams(&self) -> impl Iterator<Item = u64> {
        self.peers.iter().flatten().flat_map(super::Peer::may_be_at).filter_map(stream_number)
    }

    /// Asks the peer whether it is there, if a session stands.
    pub fn ask_whether_there(&mut self, key: &PublicKey) {
        if let Ok((at, peer)) = self.peer(key) {
            peer.ask_whether_there();
            self.touch(at);
        }
    }

    /// Asks the peer whether it is at `address` too; if it answers, it is moved there.
    pub fn probe(&mut self, now: Instant, key: &PublicKey, address: SocketAddr) {
        let token = self.tokens.take();
        if let Ok((at, peer)) = self.peer(key) {
            peer.challenge_at(now, address, token);
            self.touch(at);
        }
    }

    /// Sends packets for the peer to `address` from now on; what is on its way elsewhere
    /// counts as lost. The caller answers for the address.
    pub fn redirect(&mut self, now: Instant, key: &PublicKey, address: SocketAddr) {
        if let Ok((at, peer)) = self.peer(key) {
            peer.redirect(now, address);
            self.touch(at);
        }
    }
}
