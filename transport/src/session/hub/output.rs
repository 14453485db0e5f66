//! What a hub sends: datagrams, rows of datagrams for bulk, farewells.

use super::{BulkPort, Hub, Instant, SocketAddr, Vec};
use crate::session::peer::MOST_PIECES;
use conet_wire::session::handshake::{COOKIE, RESUMPTION};

/// Bytes that [`Hub::poll_batch`] wants room for.
pub const BATCH_BUFFER: usize = 65_536;

/// What goes next: it lies at the front of the buffer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Transmit {
    /// Where it goes.
    pub to: SocketAddr,
    /// Bytes.
    pub length: usize,
    /// Bytes of each datagram in it; the last one may be shorter.
    pub segment: usize,
    /// By the way for bulk: from the socket for bulk, with Don't Fragment.
    pub is_bulk: bool,
    /// The buffer has only what stands around the payloads, and [`Hub::parts`] everything.
    pub in_parts: bool,
}

/// Parts of one [`Transmit`] at most.
pub const MOST_PARTS: usize = 2 * MOST_PIECES + 1;

impl Transmit {
    pub(crate) const fn one(to: SocketAddr, length: usize) -> Self {
        Self { to, length, segment: length, is_bulk: false, in_parts: false }
    }
}

impl Hub {
    /// Writes the next datagram to send into `buf`, and says where it goes.
    pub fn poll_transmit(&mut self, now: Instant, buf: &mut Vec<u8>) -> Option<SocketAddr> {
        buf.resize(self.limits.datagram.max(RESUMPTION + COOKIE), 0);
        let transmit = self.poll_batch(now, buf, None);
        buf.truncate(transmit.map_or(0, |transmit| transmit.length));
        transmit.map(|transmit| transmit.to)
    }

    /// Writes what goes next to the front of `buf`, which must hold [`BATCH_BUFFER`]: one
    /// datagram or, by the way for bulk (see [`set_bulk`](Self::set_bulk)), a row of up to
    /// `batch` of them; with 0, what is to go that way waits. Without a batch there is no such
    /// way.
    #[inline]
    pub fn poll_batch(
        &mut self,
        now: Instant,
        buf: &mut [u8],
        batch: Option<usize>,
    ) -> Option<Transmit> {
        // Every other time, after the one datagram of a call.
        let is_idle = self.ready.is_empty() && self.held.is_empty() && self.asides.is_empty();
        if is_idle { None } else { self.poll_ready(now, buf, batch, false) }
    }

    /// As [`poll_batch`](Self::poll_batch), for a carrier that gathers what it sends: what goes
    /// in the clear by the way for bulk is not copied but given out by [`parts`](Self::parts).
    #[inline]
    pub fn poll_parts(
        &mut self,
        now: Instant,
        buf: &mut [u8],
        batch: Option<usize>,
    ) -> Option<Transmit> {
        let is_idle = self.ready.is_empty() && self.held.is_empty() && self.asides.is_empty();
        if is_idle { None } else { self.poll_ready(now, buf, batch, true) }
    }

    /// The parts of what [`poll_parts`](Self::poll_parts) gave last, in their order, up to
    /// [`MOST_PARTS`]; before anything else is asked of the hub.
    pub fn parts<'a>(&'a self, transmit: &Transmit, buf: &'a [u8], mut take: impl FnMut(&'a [u8])) {
        let peer = self.peers.get(self.in_parts).and_then(Option::as_ref);
        match peer.filter(|_| transmit.in_parts) {
            Some(peer) => peer.parts(buf, take),
            None => take(buf.get(..transmit.length).unwrap_or_default()),
        }
    }

    #[inline(never)]
    fn poll_ready(
        &mut self,
        now: Instant,
        buf: &mut [u8],
        batch: Option<usize>,
        in_parts: bool,
    ) -> Option<Transmit> {
        if !self.asides.is_empty()
            && let Some((to, packet)) = self.asides.pop_front()
        {
            let length = packet.len();
            buf.get_mut(..length)?.copy_from_slice(&packet);
            return Some(Transmit::one(to, length));
        }
        if batch != Some(0) && !self.held.is_empty() {
            self.ready.append(&mut self.held);
        }
        while let Some(&at) = self.ready.front() {
            let peer = self.peers.get_mut(at).and_then(Option::as_mut);
            self.ready.pop_front();
            let Some(peer) = peer else { continue };
            let transmit = peer.poll_transmit(now, buf, batch, in_parts);
            if transmit.is_some() {
                self.in_parts = at;
                if peer.has_said_all(now) {
                    peer.is_ready = false;
                } else {
                    self.ready.push_front(at);
                }
                return transmit;
            }
            if batch == Some(0) && peer.has_piece() {
                self.held.push_back(at);
            } else {
                peer.is_ready = false;
            }
        }
        None
    }

    /// Large payloads are taken at this port as well, beside the one that everything else
    /// goes to: peers are told, and what comes there goes to
    /// [`handle_datagram`](Self::handle_datagram) as well.
    pub fn set_bulk(&mut self, port: Option<BulkPort>) {
        self.bulk = port;
        for peer in self.peers.iter_mut().flatten() {
            peer.set_bulk(port);
        }
    }

    /// Until when something may come to the port for bulk. Before that a peer sends by the
    /// other one.
    #[must_use]
    pub const fn bulk_expected(&self) -> Instant {
        self.bulk_expected
    }

    /// What was to go by the way for bulk was longer than its device takes.
    pub fn handle_too_long(&mut self, transmit: &Transmit) {
        let mut peers = self.peers.iter_mut().flatten();
        if let Some(peer) = peers.find(|peer| peer.takes_bulk_at(transmit.to)) {
            peer.on_too_long(transmit.segment);
        }
    }

    /// Writes the farewell of the next peer that is up into `buf`; the session is
    /// forgotten there at once instead of after [`Limits::dead_after`](crate::session::Limits::dead_after). Call until
    /// `None`, then drop the hub.
    pub fn poll_farewell(&mut self, now: Instant, buf: &mut Vec<u8>) -> Option<SocketAddr> {
        buf.resize(self.limits.datagram, 0);
        while let Some((key, _)) = self.keys.first_key_value() {
            let key = *key;
            if let Some(transmit) = self.take_peer(&key).ok()?.close(now, buf) {
                buf.truncate(transmit.length);
                return Some(transmit.to);
            }
        }
        None
    }
}
