//! Peers that are asked where another one is.
//!
//! ```text
//! we ── no answer, twice ──► WHERE to peers that are up ──► THERE ──► one attempt there
//! ```
//!
//! Two nodes that move at once lose each other if none of their old ones is left to say
//! where they went ([`super::moves`]); whoever both of them still talk to can. An answer
//! is a hint like any other: only who proves the peer's key there is the peer.
//!
//! A node tells its peers where its other peers are, to whoever names them by key; an owner
//! who does not want that leaves `FEATURE_FIND` out of
//! [`HubConfig::features`](super::HubConfig::features).
//!
//! Invariants: a question is asked only with an attempt of our own, so as rarely; it goes to
//! few; nobody is told of a peer that has not just been heard.

use super::{Hub, Instant, PublicKey, SocketAddr};
use conet_wire::session::frame::Frame;

/// Peers that are asked at a time.
const MOST_ASKED: usize = 8;
/// Peers among which those are looked for at a time.
const MOST_LOOKED_AT: usize = 64;

/// What a peer wants to know, or says, of another.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Find {
    Asked(PublicKey),
    Told(PublicKey, SocketAddr),
}

impl Hub {
    /// The peer at `lost` is not where it was: others may know. Next time it is the turn of
    /// the ones behind those.
    pub(super) fn ask_others(&mut self, lost: usize) {
        let Some(Some(peer)) = self.peers.get_mut(lost) else { return };
        let key = peer.key();
        peer.set_sought();
        let (count, mut asked) = (self.peers.len(), 0);
        for _ in 0..count.min(MOST_LOOKED_AT) {
            self.last_asked = (self.last_asked + 1) % count;
            let at = self.last_asked;
            let Some(Some(other)) = self.peers.get_mut(at) else { continue };
            if at == lost || !other.can_be_asked() {
                continue;
            }
            other.say(&Frame::Where { key: &key.0 });
            self.touch(at);
            asked += 1;
            if asked == MOST_ASKED {
                return;
            }
        }
    }

    pub(super) fn on_find(&mut self, now: Instant, from: usize, find: Find) {
        let (Find::Asked(key) | Find::Told(key, _)) = find;
        let Some(&about) = self.keys.get(&key).filter(|about| **about != from) else { return };
        let Some(Some(peer)) = self.peers.get_mut(about) else { return };
        let change = match find {
            Find::Told(_, address) => {
                peer.on_told(now, address);
                about
            }
            Find::Asked(_) => {
                let Some(address) = peer.whereabouts(now) else { return };
                let Some(Some(asker)) = self.peers.get_mut(from) else { return };
                if asker.can_be_asked() {
                    asker.say(&Frame::There { key: &key.0, address });
                }
                from
            }
        };
        self.touch(change);
    }
}
