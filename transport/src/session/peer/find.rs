//! A peer that is not where it was, and peers that may know where it is.
//!
//! Invariants: an answer counts once, and only for a peer that was asked for since; who is
//! asked too much says nothing.

use super::Peer;
use crate::session::packet::Packet;
use crate::session::protect::Label;
use crate::session::ways::stream_number;
use crate::time::Instant;
use alloc::vec;
use conet_wire::session::frame::Frame;
use conet_wire::session::handshake::FEATURE_FIND;
use conet_wire::session::{HEADER, PacketKind, TAG};
use core::net::SocketAddr;

/// Packets that wait; beyond that nothing is said about others.
const MOST_PREPARED: usize = 16;

impl Peer {
    /// Whether the peer answers no more where it was: two attempts have brought nothing,
    /// and nobody has said where else it may be.
    pub(crate) fn is_lost(&self) -> bool {
        self.current.is_none()
            && !self.superseded
            && self.hint.is_none()
            && self.ask_pause > self.limits.handshake_retry
    }

    pub(crate) const fn set_sought(&mut self) {
        self.is_sought = true;
    }

    /// Whether the peer knows questions about others.
    pub(crate) fn can_be_asked(&self) -> bool {
        self.current.as_ref().is_some_and(|keys| keys.has(FEATURE_FIND))
    }

    /// Where the peer is at this moment, as far as another node could reach it there.
    pub(crate) fn whereabouts(&self, now: Instant) -> Option<SocketAddr> {
        let is_heard = now.since(self.heard) <= self.limits.keepalive * 2;
        self.address.filter(|at| self.is_up() && is_heard && stream_number(*at).is_none())
    }

    /// Somebody says where the peer is. It may be wrong: one attempt is made there.
    pub(crate) fn on_told(&mut self, now: Instant, address: SocketAddr) {
        if self.current.is_none() && core::mem::take(&mut self.is_sought) {
            self.on_moved(now, address);
        }
    }

    /// Says something about another peer.
    pub(crate) fn say(&mut self, frame: &Frame<'_>) {
        let (Some(to), Some(keys)) = (self.address, &mut self.current) else { return };
        if self.prepared.len() >= MOST_PREPARED {
            return;
        }
        let mut bytes = vec![0; HEADER + frame.wire_len() + TAG];
        let size = bytes.len();
        let mut packet = Packet::new(&mut bytes, size);
        packet.push(frame);
        let (length, label) = (
            packet.payload_len(),
            Label { kind: PacketKind::Data, flags: 0, session: keys.remote_index },
        );
        // Numbers that are used up are noticed by who sends calls.
        if keys.sealer.seal_in_place(label, &mut bytes, length).is_ok() {
            self.prepared.push_back((to, bytes));
        }
    }
}
