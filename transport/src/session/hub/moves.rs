//! Sessions that go to another process, and what they leave behind.
//!
//! A session that was frozen leaves a *tomb*: for [`TOMB`] this hub answers whoever
//! still looks for it here with MOVED, once it has been told where the session is. So two
//! ends that move at once find each other, as long as one of the old nodes is there.
//!
//! Invariants: a tomb sends nothing but MOVED, at most one a millisecond and none longer
//! than three times what it answers, nor to a MOVED; it is sealed under the session's secret.

use super::input::clock_counter;
use super::{Duration, Event, Hub, IncomingId, Instant, PublicKey, SocketAddr, UnknownPeer, Vec};
use crate::session::image::ImageError;
use crate::session::key::Root;
use crate::session::peer::Peer;
use crate::session::protect::{Cipher, Label, Opener, Replay, Sealer};
use conet_wire::session::moved::{MOVED, MOVED_SECRET, Moved};
use conet_wire::session::{HEADER, Header, PacketKind};

/// How long a tomb answers.
const TOMB: Duration = Duration::from_secs(120);
/// Least time between two answers of a tomb.
const PAUSE: Duration = Duration::from_millis(1);
/// Most tombs.
const MOST: usize = 1024;

/// What a frozen session left here.
pub(super) struct Tomb {
    key: PublicKey,
    indices: Vec<u32>,
    remote_index: Option<u32>,
    sealer: Sealer,
    epoch: u64,
    address: Option<SocketAddr>,
    until: Instant,
    next: Instant,
}

/// Why a session was not frozen.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FreezeError {
    /// No peer with this key was added.
    #[error(transparent)]
    Peer(#[from] UnknownPeer),
    /// No session has ever stood, or the peer's build knows no moves.
    #[error("there is no session that can move")]
    NoSession,
    /// No randomness; the kernel's fault.
    #[error("the system gives no randomness")]
    Entropy,
}

/// A frozen session. It holds the session's secret: keep it as a private key.
#[derive(Clone, Eq, PartialEq)]
pub struct Frozen {
    /// What [`Hub::thaw`] wants.
    pub image: Vec<u8>,
}

impl core::fmt::Debug for Frozen {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Frozen({} bytes)", self.image.len())
    }
}

/// A session that was thawed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Thawed {
    /// With whom.
    pub peer: PublicKey,
    /// Calls that had been handed out and not answered when it was frozen, and whether
    /// the peer still wants each. Answer them, or [`Hub::disown`] them.
    pub running: Vec<(IncomingId, bool)>,
}

impl Hub {
    /// Ends a session here and gives it as an image, to go on elsewhere under the same
    /// private key. Its calls go with it; events that have happened are still here. The
    /// peer is removed, and what comes for it is answered as [`Hub::set_moved`] says.
    ///
    /// # Errors
    ///
    /// [`FreezeError`]; then nothing has changed.
    pub fn freeze(&mut self, now: Instant, key: &PublicKey) -> Result<Frozen, FreezeError> {
        let mut number = [0; 8];
        self.entropy.fill(&mut number).map_err(|_| FreezeError::Entropy)?;
        let (owner, counter) = (self.public_key, clock_counter(self.newest_counter, now));
        let (at, peer) = self.peer(key)?;
        let left = peer.freeze(now, &owner, counter).ok_or(FreezeError::NoSession)?;
        self.touch(at);
        self.take_peer(key)?;
        if self.tombs.len() >= MOST {
            self.tombs.remove(0);
        }
        // Half of all numbers lie ahead, whatever chance gave.
        let first = u64::from_le_bytes(number) / 2;
        self.tombs.push(Tomb {
            key: *key,
            indices: left.indices,
            remote_index: left.remote_index,
            sealer: Sealer::new(Cipher::ChaCha20Poly1305, &left.root.moved_key(), first),
            epoch: left.epoch + 1,
            address: None,
            until: now + TOMB,
            next: now,
        });
        Ok(Frozen { image: left.image })
    }

    /// Says where a session that was frozen here has been thawed: whoever still looks for
    /// it here is told.
    ///
    /// # Errors
    ///
    /// [`UnknownPeer`] if none was frozen, or too long ago.
    pub fn set_moved(
        &mut self,
        now: Instant,
        key: &PublicKey,
        address: SocketAddr,
    ) -> Result<(), UnknownPeer> {
        let tomb = self.tombs.iter_mut().rev().find(|tomb| tomb.key == *key).ok_or(UnknownPeer)?;
        tomb.address = Some(address);
        tomb.until = now + TOMB;
        Ok(())
    }

    /// Continues a session that was frozen by a hub of the same private key. With
    /// `address` the peer is looked for there instead of where it was last.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; then nothing has changed.
    pub fn thaw(
        &mut self,
        now: Instant,
        image: &[u8],
        address: Option<SocketAddr>,
    ) -> Result<Thawed, ImageError> {
        let mut life = [0; 8];
        self.entropy.fill(&mut life).map_err(|_| ImageError::Malformed)?;
        let life = u64::from_le_bytes(life);
        let mut peer = Peer::thaw(now, &self.public_key, image, life, self.limits)?;
        if let Some(address) = address {
            peer.set_address(now, address);
        }
        let thawed = Thawed { peer: peer.key(), running: peer.running() };
        // The one that was here, if any, is an earlier life; its calls have ended.
        if let Ok(mut old) = self.take_peer(&thawed.peer) {
            old.abandon(now);
            while let Some(event) = old.poll_event() {
                if matches!(event, Event::Ended { .. }) {
                    self.events.push_back(event);
                }
            }
        }
        self.bury_none(&thawed.peer);
        self.insert(peer);
        Ok(thawed)
    }

    /// A peer is here again: its tombs say nothing more.
    pub(super) fn bury_none(&mut self, key: &PublicKey) {
        self.tombs.retain(|tomb| tomb.key != *key);
    }

    pub(super) fn forget_tombs(&mut self, now: Instant) {
        if !self.tombs.is_empty() {
            self.tombs.retain(|tomb| tomb.until > now);
        }
    }

    /// A packet for a session that has gone; says whether it was one.
    pub(super) fn on_entombed(
        &mut self,
        now: Instant,
        from: SocketAddr,
        header: &Header,
        bytes: usize,
    ) -> bool {
        let at = self.tombs.iter().position(|tomb| tomb.indices.contains(&header.session));
        let Some(tomb) = at.and_then(|at| self.tombs.get_mut(at)) else { return false };
        // Another tomb would answer an answer, and so on.
        let is_question = header.kind != PacketKind::Moved && bytes * 3 >= MOVED;
        if let Some(session) = tomb.remote_index.filter(|_| is_question) {
            let packet = tomb.answer(now, session);
            self.aside(from, packet);
        }
        true
    }

    /// An initiation for a session that has gone; says whether it was one.
    pub(super) fn on_initiation_to_gone(
        &mut self,
        now: Instant,
        from: SocketAddr,
        key: &PublicKey,
        session: u32,
    ) -> bool {
        let tomb = self.tombs.iter_mut().rev().find(|tomb| tomb.key == *key);
        let Some(tomb) = tomb else { return false };
        let packet = tomb.answer(now, session);
        self.aside(from, packet);
        true
    }

    fn aside(&mut self, to: SocketAddr, packet: Option<Vec<u8>>) {
        if let Some(packet) = packet.filter(|_| self.asides.len() < super::input::MOST_ASIDES) {
            self.asides.push_back((to, packet));
        }
    }

    /// The peer's old node says where it has gone.
    pub(super) fn on_moved(&mut self, now: Instant, at: usize, packet: &mut [u8]) {
        let Some(Some(peer)) = self.peers.get_mut(at) else { return };
        let opened = peer.roots().find_map(|root| open(root, packet));
        if let Some(Moved { address, .. }) = opened {
            peer.on_moved(now, address);
        }
    }
}

fn open(root: &Root, packet: &[u8]) -> Option<Moved> {
    let mut packet: [u8; MOVED] = packet.try_into().ok()?;
    let mut opener = Opener::new(Cipher::ChaCha20Poly1305, &root.moved_key(), Replay::window());
    let (_, range) = opener.open_in_place(&mut packet).ok()?;
    Moved::parse(packet.get(range)?.try_into().ok()?)
}

impl Tomb {
    fn answer(&mut self, now: Instant, session: u32) -> Option<Vec<u8>> {
        let address = self.address.filter(|_| now >= self.next)?;
        self.next = now + PAUSE;
        let mut packet = alloc::vec![0; MOVED];
        let moved = Moved { epoch: self.epoch, address };
        packet.get_mut(HEADER..HEADER + MOVED_SECRET)?.copy_from_slice(&moved.emit());
        let label = Label { kind: PacketKind::Moved, flags: 0, session };
        self.sealer.seal_in_place(label, &mut packet, MOVED_SECRET).ok()?;
        Some(packet)
    }
}
