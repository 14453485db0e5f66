//! Sizes and times that bound a session.

use super::client::FIRST_SLOTS;
use core::time::Duration;

/// Most calls of one row: each takes the result of the one before.
pub const MOST_IN_ROW: usize = 8;

/// Shortest of the times in [`Limits`].
const LEAST_PAUSE: Duration = Duration::from_millis(10);

/// Bounds of one session. Both ends need not agree: calls that are longer than the peer takes
/// end as refused, and those whose reply is longer than this end takes as unknown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Longest datagram, bytes of UDP payload; at least [`Limits::LEAST_DATAGRAM`]. More than
    /// that is lost, or cut in pieces, where the path carries less. The way for bulk finds
    /// out by itself what it carries.
    pub datagram: usize,
    /// Calls in flight per direction, [`MOST_IN_ROW`]`..=`65,536. There are 64 at first, which
    /// every peer may use; more are granted while calls take long, so these bound the patient
    /// ones.
    pub slots: usize,
    /// Calls that wait for a slot.
    pub queued: usize,
    /// Longest payload of a call or reply, bytes; at most 1 GiB.
    pub payload: usize,
    /// Bytes of payloads that have arrived in part, per peer, calls and replies each; at
    /// least twice [`Limits::payload`]. What goes beyond is not granted yet.
    pub assembling: usize,
    /// Bytes of calls that do not fit a packet and were handed out and not answered, and of
    /// such replies that are kept for the peer, per peer and each; one payload always fits.
    /// Calls beyond it wait, and end as refused when none was answered for
    /// [`Limits::dead_after`]. While replies take half of it, the peer's calls are not taken
    /// but on [`Lane::Control`](super::Lane::Control): they come again. A reply beyond it ends as
    /// unknown.
    pub unanswered: usize,
    /// The same for all peers of a hub together, beside one payload for each.
    pub unanswered_by_all: usize,
    /// Silence after which a peer is asked whether it is there.
    pub keepalive: Duration,
    /// Silence after which a peer counts as gone.
    pub dead_after: Duration,
    /// Age at which the side that began a session renews its keys (WireGuard
    /// §6.1: 120 s).
    pub rekey_after: Duration,
    /// First pause between two attempts to connect; it doubles up to `dead_after`.
    pub handshake_retry: Duration,
}

impl Limits {
    /// Shortest permitted [`Limits::datagram`]: an IPv6 path's least MTU without
    /// the IP and UDP headers (RFC 8200 §5).
    pub const LEAST_DATAGRAM: usize = 1232;

    /// The nearest limits that make sense.
    #[must_use]
    pub fn clamped(self) -> Self {
        Self {
            datagram: self.datagram.clamp(Self::LEAST_DATAGRAM, 65_507),
            slots: self.slots.clamp(MOST_IN_ROW, 1 << 16),
            payload: self.payload.min(1 << 30),
            assembling: self.assembling.max(self.payload.min(1 << 30) * 2),
            // Without a pause a peer would be asked, and greeted, without end.
            keepalive: self.keepalive.max(LEAST_PAUSE),
            dead_after: self.dead_after.max(LEAST_PAUSE),
            rekey_after: self.rekey_after.max(LEAST_PAUSE),
            handshake_retry: self.handshake_retry.max(LEAST_PAUSE),
            ..self
        }
    }
}

impl Limits {
    /// As they bound the peer's calls: it knows of no fewer slots than the first ones.
    pub(crate) fn of_server(self) -> Self {
        Self { slots: self.slots.max(FIRST_SLOTS), ..self }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // What every path carries; pieces of large payloads go in longer ones where the
            // path is known to carry them.
            datagram: Self::LEAST_DATAGRAM,
            slots: 16 * 1024,
            queued: 1024,
            payload: 16 * 1024 * 1024,
            assembling: 64 * 1024 * 1024,
            unanswered: 256 * 1024 * 1024,
            unanswered_by_all: 1024 * 1024 * 1024,
            keepalive: Duration::from_secs(1),
            dead_after: Duration::from_secs(5),
            rekey_after: Duration::from_secs(120),
            handshake_retry: Duration::from_millis(250),
        }
    }
}
