//! What can be seen of a peer from outside: its state and its counters.

use super::Peer;
use super::PublicKey;
use crate::session::protect::OpenError;
use core::net::SocketAddr;
use core::time::Duration;

/// Why a peer is down.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DownReason {
    /// Nothing was heard for [`Limits::dead_after`](crate::session::Limits::dead_after).
    Silent,
    /// It said goodbye.
    Closed,
    /// It came back without memory of this session.
    Restarted,
    /// This end was thawed from an image of which another life is in the session now.
    /// Nothing is tried again until the peer is removed and added anew.
    Superseded,
}

/// What a session has counted since its peer was added.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Counters {
    /// Datagrams and bytes sent, headers of UDP and below not counted.
    pub sent_packets: u64,
    /// See [`sent_packets`](Self::sent_packets).
    pub sent_bytes: u64,
    /// Datagrams that opened, and their bytes.
    pub received_packets: u64,
    /// See [`received_packets`](Self::received_packets).
    pub received_bytes: u64,
    /// Handshakes finished.
    pub handshakes: u64,
    /// Initiations that were replayed or out of turn.
    pub stale_initiations: u64,
    /// Packets with a wrong tag.
    pub forged: u64,
    /// Packets seen before.
    pub replayed: u64,
    /// Packets that opened, but held no row of frames.
    pub malformed: u64,
    /// Calls and pieces sent again.
    pub repeats: u64,
    /// Calls handed out for execution.
    pub executions: u64,
    /// Calls and pieces that came again.
    pub duplicates: u64,
    /// Replies to calls that had ended.
    pub stale_replies: u64,
    /// Pieces dropped for want of memory.
    pub refused_pieces: u64,
    /// Times that the peer has proved to be at another address.
    pub moves: u64,
    /// Initiations of lives that are superseded.
    pub superseded: u64,
}

/// A snapshot of one peer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PeerStatus {
    /// Who.
    pub key: PublicKey,
    /// Where it was heard last, or where it is configured to be.
    pub address: Option<SocketAddr>,
    /// Whether a session stands.
    pub up: bool,
    /// Smoothed round-trip time.
    pub rtt: Option<Duration>,
    /// Time since the last handshake.
    pub last_handshake: Option<Duration>,
    /// Calls of ours that wait for a reply.
    pub calls_in_flight: usize,
    /// Calls of the peer's that take long, and were told so.
    pub parked: usize,
    /// Slots in memory: for calls of ours, and of the peer's.
    pub slots: (usize, usize),
    /// Bytes set aside for payloads that arrive in part: of replies, and of calls.
    pub set_aside: (usize, usize),
    /// Bytes of the peer's calls that were handed out, and of replies kept for it, that do not
    /// fit a packet; see [`Limits::unanswered`](crate::session::Limits::unanswered).
    pub unanswered: (usize, usize),
    /// How often this end, and the other, has moved.
    pub epochs: (u64, u64),
    /// What was counted.
    pub counters: Counters,
}

impl Peer {
    /// A packet was not opened.
    pub(super) const fn on_closed(&mut self, error: OpenError) {
        match error {
            OpenError::Replayed => self.counters.replayed += 1,
            _ => self.counters.forged += 1,
        }
    }
}
