//! What comes to a hub: datagrams and time.

use super::{Hub, Instant, SocketAddr};
use crate::session::bulk::EXPECTED;
use crate::session::gate::Verdict;
use crate::session::handshake::{Initiator, Received};
use crate::session::peer::Admission;
use conet_wire::session::handshake::{
    CookiePacket, HandshakeLayoutError, Initiation, InitiationSecret, Response,
};
use conet_wire::session::moved::MOVED;
use conet_wire::session::{FLAG_TRACKED, Header, PacketKind};
use ring::digest;

/// Packets beside the sessions' that wait to be sent; more are dropped.
pub(super) const MOST_ASIDES: usize = 64;
/// A tracked datagram of so many bytes carries a piece of a large payload.
const PIECE: usize = 1000;

impl Hub {
    /// Takes a datagram that came from `from`; overwrites it.
    pub fn handle_datagram(&mut self, now: Instant, from: SocketAddr, datagram: &mut [u8]) {
        self.handle_marked_datagram(now, from, datagram, false);
    }

    /// As [`handle_datagram`](Self::handle_datagram); `marked` says that the network has
    /// put a congestion mark on it (ECN CE, RFC 3168 §5).
    pub fn handle_marked_datagram(
        &mut self,
        now: Instant,
        from: SocketAddr,
        datagram: &mut [u8],
        marked: bool,
    ) {
        let Ok(header) = Header::parse(datagram) else {
            self.strays.malformed += 1;
            return;
        };
        match header.kind {
            PacketKind::Initiation | PacketKind::Resumption => {
                self.on_initiation(now, from, datagram);
                return;
            }
            PacketKind::Cookie => {
                self.on_cookie(datagram);
                return;
            }
            PacketKind::Data | PacketKind::Response | PacketKind::Moved => {}
        }
        let Some(at) = self.indices.get(header.session) else {
            if !self.on_entombed(now, from, &header, datagram.len()) {
                self.strays.unknown_index += 1;
            }
            return;
        };
        let Some(Some(peer)) = self.peers.get_mut(at) else { return };
        match header.kind {
            PacketKind::Data => {
                // A piece, and not a tracked answer.
                let is_piece = header.flags & FLAG_TRACKED != 0 && datagram.len() >= PIECE;
                let tokens = &mut self.tokens;
                if peer.on_data(now, from, header.session, datagram, marked, tokens) && is_piece {
                    self.bulk_expected = now + EXPECTED;
                    self.places.last = at;
                }
            }
            PacketKind::Moved if datagram.len() == MOVED => self.on_moved(now, at, datagram),
            _ => match Response::parse(datagram) {
                Ok(response) => peer.on_response(now, &response),
                Err(_) => {
                    self.strays.malformed += 1;
                    return;
                }
            },
        }
        self.touch(at);
        while let Some((at, find)) = self.finds.pop_front() {
            self.on_find(now, at, find);
        }
    }

    fn on_cookie(&mut self, datagram: &[u8]) {
        let Some(CookiePacket { digest, cookie }) = CookiePacket::parse(datagram) else {
            self.strays.malformed += 1;
            return;
        };
        let at = self.asked.remove(&digest).filter(|_| digest != 0);
        let peer = at.and_then(|at| self.peers.get_mut(at)?.as_mut());
        let is_asked = peer.is_some_and(|peer| peer.on_cookie(digest, &cookie));
        match at.filter(|_| is_asked) {
            Some(at) => self.touch(at),
            None => self.strays.unknown_index += 1,
        }
    }

    /// Notes whose initiation a cookie may name.
    fn note_asked(&mut self, digest: u64, at: usize) {
        let Self { asked, peers, .. } = self;
        if asked.len() > 64 + 2 * peers.len() {
            asked.retain(|digest, at| {
                peers.get(*at).is_some_and(|one| one.as_ref().is_some_and(|one| one.asks(*digest)))
            });
        }
        asked.insert(digest, at);
    }

    fn on_initiation(&mut self, now: Instant, from: SocketAddr, datagram: &[u8]) {
        let initiation = match Initiation::parse(datagram) {
            Ok(initiation) => initiation,
            Err(HandshakeLayoutError::Version(_)) => {
                self.strays.other_version += 1;
                return;
            }
            Err(_) => {
                self.strays.malformed += 1;
                return;
            }
        };
        match self.gate.admit(now, from, initiation.cookie, &mut *self.entropy) {
            Verdict::Open => {}
            verdict => {
                self.strays.turned_away += 1;
                if let Verdict::Ask(cookie) = verdict
                    && self.asides.len() < MOST_ASIDES
                {
                    let cookie = CookiePacket { digest: digest_of(&initiation), cookie };
                    self.asides.push_back((from, cookie.emit().to_vec()));
                }
                return;
            }
        }
        let Ok(received) = Received::open(&self.private_key, &initiation, &mut *self.entropy)
        else {
            self.strays.forged += 1;
            return;
        };
        let key = received.remote();
        let smaller = self.public_key < key;
        let secret = received.resumption();
        let Some(&at) = self.keys.get(&key) else {
            if !self.on_initiation_to_gone(now, from, &key, secret.common.session) {
                self.strays.unknown_key += 1;
            }
            return;
        };
        let Some(Some(peer)) = self.peers.get_mut(at) else { return };
        match peer.admit(now, from, &secret, smaller) {
            Admission::Ignore => {}
            Admission::Superseded => {
                if let (Ok(packet), true) = (received.refuse(), self.asides.len() < MOST_ASIDES) {
                    self.asides.push_back((from, packet));
                }
            }
            Admission::Answer(root) => {
                if let Some(index) = self.indices.insert(at, &mut *self.entropy) {
                    let incarnation = peer.incarnation;
                    let (root, ours) = (root.as_ref(), peer.life());
                    match received.answer(index, incarnation, self.features, root, ours) {
                        Ok((keys, packet)) => {
                            peer.on_answered(now, from, index, &keys, &secret, packet);
                        }
                        Err(_) => self.indices.remove(index),
                    }
                }
            }
        }
        self.touch(at);
    }

    pub(super) fn ask(&mut self, now: Instant, at: usize) {
        let Some(Some(peer)) = self.peers.get_mut(at) else { return };
        self.newest_counter += 1;
        let Some(index) = self.indices.insert(at, &mut *self.entropy) else {
            peer.put_off_asking(now);
            return;
        };
        let counter = peer.next_counter(clock_counter(self.newest_counter, now));
        let secret = InitiationSecret { counter, incarnation: peer.incarnation, session: index };
        let (local, remote, entropy) = (&self.private_key, peer.key(), &mut *self.entropy);
        let started = match peer.resume() {
            Some(resume) => {
                Initiator::resume(local, &remote, self.features, secret, resume, entropy)
                    .map(|(initiator, packet)| (initiator, packet.to_vec()))
            }
            None => Initiator::start(local, &remote, self.features, secret, entropy)
                .map(|(initiator, packet)| (initiator, packet.to_vec())),
        };
        let digest = started.as_ref().ok().and_then(|(_, packet)| {
            Initiation::parse(packet).ok().map(|initiation| digest_of(&initiation))
        });
        match started {
            Ok((initiator, packet)) => {
                let digest = digest.unwrap_or_default();
                peer.on_asked(now, index, initiator, &packet, digest);
                self.note_asked(digest, at);
            }
            Err(_) => {
                self.indices.remove(index);
                peer.put_off_asking(now);
            }
        }
    }
}

/// The number that the clock gives to an initiation.
pub(super) fn clock_counter(newest: u64, now: Instant) -> u64 {
    newest.saturating_add(u64::try_from(now.since_start().as_nanos()).unwrap_or(u64::MAX / 2))
}

/// What a cookie for an initiation names it by.
fn digest_of(initiation: &Initiation<'_>) -> u64 {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(initiation.clear);
    context.update(initiation.noise);
    let digest = context.finish();
    // Zero is what an answered one has.
    digest.as_ref().first_chunk().map_or(1, |first| u64::from_le_bytes(*first).max(1))
}
