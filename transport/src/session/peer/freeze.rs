//! A session as an image, to go on in another process.
//!
//! ```text
//! freeze: quiesce ─► image (epoch n) ─► thaw: epoch n + 1, a new life ─► resumption ─► up
//! ```
//!
//! The image holds slots, queued calls, replies, offsets of what is under way, and the
//! session's secret: whoever has it can continue the session, so it is to be kept like a
//! private key. No packet key and no packet number is in it. A thawed session always makes
//! a handshake, whose keys are as new as its ephemeral keys: thawed twice or from an old
//! image, no nonce is used again. The peer follows the first life of the highest epoch and
//! turns the others away.

use super::{KeptRoot, Life, MOST_ROOTS, Peer};
use crate::session::client::Client;
use crate::session::handshake::PublicKey;
use crate::session::image::{ImageError, Reader, Writer};
use crate::session::key::Root;
use crate::session::limits::Limits;
use crate::session::protect::Key;
use crate::session::server::{IncomingId, Server};
use crate::session::ways::stream_number;
use crate::time::Instant;
use alloc::vec::Vec;
use conet_wire::session::handshake::FEATURE_MOVE;
use conet_wire::session::moved::{MOVED_SECRET, Moved};
use core::net::SocketAddr;

const VERSION: u32 = 2;
/// Without the number of our newest initiation.
const VERSION_1: u32 = 1;
/// Numbers of initiations in an image end here, far from where counting would: nanoseconds
/// since 1970 get there in 2262.
const MOST_COUNTER: u64 = 1 << 63;
const MAGIC: [u8; 4] = *b"CNTs";

/// What a peer that has gone leaves behind.
pub(crate) struct Left {
    pub(crate) image: Vec<u8>,
    pub(crate) root: Root,
    pub(crate) epoch: u64,
    pub(crate) remote_index: Option<u32>,
    pub(crate) indices: Vec<u32>,
}

impl Peer {
    /// The session as an image of `owner`; `None` where none has ever stood, or the peer
    /// knows no moves. No initiation of ours had a number beyond `counter`.
    pub(crate) fn freeze(&mut self, now: Instant, owner: &PublicKey, counter: u64) -> Option<Left> {
        if self.current.as_ref().is_some_and(|keys| !keys.has(FEATURE_MOVE)) || self.superseded {
            return None;
        }
        // What is under way is as good as lost.
        self.restart_flow(now);
        let root = self.current_root()?.duplicate();
        let mut out = Writer::default();
        out.fixed(&MAGIC);
        out.u32(VERSION);
        out.fixed(&owner.0);
        out.fixed(&self.key.0);
        out.u64(self.incarnation);
        out.u64(self.remote_incarnation?);
        out.u64(self.ours.epoch);
        out.u64(self.theirs.epoch);
        out.u64(self.theirs.life);
        out.option(self.newest_counter);
        out.u64(self.least_counter.max(counter).min(MOST_COUNTER));
        out.count(self.ended.len());
        for ended in &self.ended {
            out.u64(*ended);
        }
        // The peer may know of a handshake more than we, or of one less.
        out.u64(root.id);
        out.count(self.roots.len());
        for kept in &self.roots {
            out.fixed(kept.root.expose().expose());
        }
        // A stream ends here; the peer is found where it was before it.
        let address = self.address.filter(|address| stream_number(*address).is_none());
        let address = address.or(self.beside);
        let address = address.map(|address| Moved { epoch: 0, address }.emit());
        out.bytes(address.as_ref().map_or(&[], |address| &address[..]));
        self.client.freeze(now, &mut out);
        self.server.freeze(&mut out);
        let remote_index = self.current.as_ref().map(|keys| keys.remote_index);
        let indices = self.indices().collect();
        Some(Left { image: out.bytes, root, epoch: self.ours.epoch, remote_index, indices })
    }

    /// A session from an image that `owner` froze, as its life `life`.
    pub(crate) fn thaw(
        now: Instant,
        owner: &PublicKey,
        image: &[u8],
        life: u64,
        limits: Limits,
    ) -> Result<Self, ImageError> {
        let mut from = Reader::new(image);
        if from.fixed()? != MAGIC {
            return Err(ImageError::Malformed);
        }
        let version = from.u32()?;
        if ![VERSION_1, VERSION].contains(&version) {
            return Err(ImageError::Version(version));
        }
        if from.fixed()? != owner.0 {
            return Err(ImageError::Owner);
        }
        let key = PublicKey(from.fixed()?);
        let mut peer = Self::new(now, key, None, limits, from.u64()?);
        peer.remote_incarnation = Some(from.u64()?);
        let epoch = from.u64()?.checked_add(1).ok_or(ImageError::Malformed)?;
        peer.ours = Life { epoch, life };
        peer.theirs = Life { epoch: from.u64()?, life: from.u64()? };
        peer.newest_counter = from.option()?;
        if version != VERSION_1 {
            peer.least_counter = from.u64()?;
            if peer.least_counter > MOST_COUNTER {
                return Err(ImageError::Malformed);
            }
        }
        for _ in 0..from.count(8)? {
            peer.ended.push_back(from.u64()?);
        }
        peer.root = Some(from.u64()?);
        for _ in 0..from.count(Key::LEN)?.min(MOST_ROOTS) {
            let root = Root::new(Key::new(from.fixed()?));
            peer.roots.push_back(KeptRoot { root, pinned: true });
        }
        if peer.current_root().is_none() {
            return Err(ImageError::Malformed);
        }
        let address = from.bytes()?;
        if !address.is_empty() {
            let address: &[u8; MOVED_SECRET] =
                address.try_into().map_err(|_| ImageError::Malformed)?;
            let address = Moved::parse(address).ok_or(ImageError::Malformed)?.address;
            if stream_number(address).is_some() {
                return Err(ImageError::Malformed);
            }
            peer.address = Some(address);
        }
        peer.client = Client::thaw(limits, now, &mut from)?;
        peer.server = Server::thaw(limits.of_server(), &mut from)?;
        from.end()?;
        peer.unannounced = true;
        peer.ask_at = peer.address.map(|_: SocketAddr| now);
        Ok(peer)
    }

    /// Ends all calls of a life that another one replaces.
    pub(crate) fn abandon(&mut self, now: Instant) {
        self.client.on_unreachable(now);
    }

    /// Calls that were handed out before and not answered, and whether each is still
    /// wanted.
    pub(crate) fn running(&self) -> Vec<(IncomingId, bool)> {
        self.server.running()
    }
}
