//! Payloads that a carrier receives straight where they belong.
//!
//! ```text
//! around │ front │ tag front │ tag front │ tag …     PARTS bytes for each packet
//!             └ data ┘    └ data ┘    └ data ┘       one piece after the other in the payload
//! ```
//!
//! What turns out otherwise is put together again and taken as any other datagram.

use super::{Hub, Instant, Peer, SocketAddr, Vec};
use crate::session::bulk::EXPECTED;
use crate::session::packet::PARTS;
pub use crate::session::peer::MOST_AROUND;
use crate::session::peer::{FRONT, Plan};
use conet_wire::session::TAG;

/// Where the payload of what comes next by the way for bulk is likely to belong.
#[derive(Debug)]
pub struct Place<'a> {
    data: &'a mut [u8],
    piece: usize,
}

impl<'a> Place<'a> {
    /// The places to receive into, in their order, up to
    /// [`MOST_PARTS`](crate::session::MOST_PARTS); `around`, which must hold [`MOST_AROUND`], gets
    /// what stands around the payload.
    pub fn parts(self, around: &'a mut [u8], mut take: impl FnMut(&'a mut [u8])) {
        let mut rest = around;
        let mut length = FRONT;
        for piece in self.data.chunks_mut(self.piece.max(1)) {
            let (front, behind) = rest.split_at_mut(length.min(rest.len()));
            take(front);
            take(piece);
            (rest, length) = (behind, PARTS);
        }
        take(rest);
    }
}

/// What has come into [the parts of a place](Place::parts).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Scattered {
    /// Where it came from.
    pub from: SocketAddr,
    /// Bytes.
    pub length: usize,
    /// Bytes of each datagram in it; the last one may be shorter.
    pub segment: usize,
    /// The network has put a congestion mark on it (ECN CE, RFC 3168 §5).
    pub marked: bool,
}

/// What is planned.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The peer from which a piece came last.
    pub(super) last: usize,
    plan: Option<(usize, Plan)>,
    /// For what was not as planned.
    whole: Vec<u8>,
}

impl Hub {
    /// Where the payload of what comes next by the way for bulk is likely to belong, if that
    /// is known; then [`handle_scattered`](Self::handle_scattered), before anything else is
    /// asked of the hub.
    pub fn place(&mut self) -> Option<Place<'_>> {
        let at = self.places.last;
        let (plan, data) = self.peers.get_mut(at)?.as_mut()?.plan()?;
        self.places.plan = Some((at, plan));
        Some(Place { data, piece: plan.length })
    }

    /// Takes what came into the [place](Self::place) that was given last, and what stands around
    /// it; says how many datagrams there were.
    pub fn handle_scattered(
        &mut self,
        now: Instant,
        scattered: &Scattered,
        around: &[u8],
    ) -> usize {
        let Scattered { from, length, segment, marked } = *scattered;
        let Some((at, plan)) = self.places.plan.take() else { return 0 };
        let Some(Some(peer)) = self.peers.get_mut(at) else { return 0 };
        let segment = segment.clamp(1, length.max(1));
        let count = length.div_ceil(segment);
        let look = |n: usize| {
            let around = around.get(n * PARTS..(n + 1) * PARTS)?;
            let (front, tag) = around.split_at_checked(PARTS - TAG)?;
            let total = segment.min(length - n * segment);
            plan.fits(n, front, total).map(|header| (header, tag))
        };
        if !(0..count).all(|n| look(n).is_some()) {
            let mut whole = core::mem::take(&mut self.places.whole);
            put_together(peer, &plan, around, length, &mut whole);
            for datagram in whole.chunks_mut(segment) {
                self.handle_marked_datagram(now, from, datagram, marked);
            }
            self.places.whole = whole;
            return count;
        }
        for (n, (header, tag)) in (0..count).filter_map(|n| Some((n, look(n)?))) {
            if peer.take_planned(now, &plan, n, (header, tag), marked, &mut self.tokens) {
                self.bulk_expected = now + EXPECTED;
            }
        }
        self.touch(at);
        count
    }
}

/// What came, in the order in which it came.
fn put_together(peer: &mut Peer, plan: &Plan, around: &[u8], length: usize, whole: &mut Vec<u8>) {
    whole.clear();
    let (mut rest, mut next) = (around, FRONT);
    let pieces = peer.planned(plan).unwrap_or_default().chunks(plan.length.max(1));
    for piece in pieces {
        let (front, behind) = rest.split_at(next.min(rest.len()));
        whole.extend_from_slice(front);
        whole.extend_from_slice(piece);
        (rest, next) = (behind, PARTS);
        if whole.len() >= length {
            break;
        }
    }
    let missing = length.saturating_sub(whole.len());
    whole.extend_from_slice(rest.get(..missing).unwrap_or_default());
    whole.truncate(length);
}
