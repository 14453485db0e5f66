//! Why a packet was not forwarded, and how often.

use std::fmt;
use std::ops::{Index, IndexMut};

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident => $text:literal,)+) => {
        /// Why a packet was dropped. Fieldless: it indexes a counter.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl DropReason {
            /// All reasons, in the order of the counters.
            pub const ALL: &[DropReason] = &[$(DropReason::$name,)+];

            /// A short name for tables and JSON, lower case with underscores.
            pub fn as_str(self) -> &'static str {
                match self { $(DropReason::$name => $text,)+ }
            }
        }
    };
}

reasons! {
    /// No IP packet, or one whose lengths contradict each other.
    Malformed => "malformed",
    /// No peer has the destination among its addresses.
    NoRoute => "no_route",
    /// The peer has no endpoint to send to yet.
    NoEndpoint => "no_endpoint",
    /// From the network: nobody we know, or a session that is not there.
    UnknownPeer => "unknown_peer",
    /// It waited for a session that did not come, or behind too many others.
    NoSession => "no_session",
    /// From a peer, but not in the mode configured for it.
    WrongMode => "wrong_mode",
    /// A handshake that does not know our key, or cannot be followed.
    BadHandshake => "bad_handshake",
    /// Handshakes came too fast; a cookie was asked for.
    RateLimited => "rate_limited",
    /// The authentication tag is wrong.
    BadTag => "bad_tag",
    /// The counter was used before or is too old.
    Replay => "replay",
    /// The inner source is not among the addresses that this peer may use.
    SourceNotAllowed => "source_not_allowed",
    /// The inner source or destination is multicast, broadcast, loopback or
    /// unspecified.
    NotUnicast => "not_unicast",
    /// The packet would travel inside its own tunnel: its source is our end or
    /// its destination the peer's end.
    Loop => "loop",
    /// A tunnel inside an IP-in-IP tunnel.
    Nested => "nested",
    /// A fragment of an outer packet.
    OuterFragment => "outer_fragment",
    /// No hop left.
    NoHops => "no_hops",
    /// Congestion was marked on a packet that cannot say so (RFC 6040 §4.2).
    Congestion => "congestion",
    /// Does not fit the path to the peer; its sender was told if that is allowed.
    TooBig => "too_big",
    /// Longer than any buffer.
    TooLong => "too_long",
    /// An error of ICMP about a packet that we cannot have sent to this peer.
    BadError => "bad_error",
    /// Faster than its guest may send or receive.
    GuestRate => "guest_rate",
    /// Its guest is held, and as many wait for it as may.
    HoldFull => "hold_full",
    /// The device refused it.
    Device => "device",
    /// The network refused it, or its queue stayed full.
    Network => "network",
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How often each [`DropReason`] occurred.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DropCounts([u64; DropReason::ALL.len()]);

impl Default for DropCounts {
    fn default() -> Self {
        Self([0; DropReason::ALL.len()])
    }
}

impl DropCounts {
    /// Counts one packet.
    pub fn count(&mut self, reason: DropReason) {
        self[reason] += 1;
    }

    /// Packets dropped for any reason.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The reasons that occurred, with their counts.
    pub fn nonzero(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|&r| (r, self[r])).filter(|&(_, n)| n > 0)
    }
}

impl Index<DropReason> for DropCounts {
    type Output = u64;

    fn index(&self, reason: DropReason) -> &u64 {
        &self.0[reason as usize]
    }
}

impl IndexMut<DropReason> for DropCounts {
    fn index_mut(&mut self, reason: DropReason) -> &mut u64 {
        &mut self.0[reason as usize]
    }
}

impl fmt::Debug for DropCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.nonzero()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_counter_and_name() {
        let mut counts = DropCounts::default();
        for (i, &reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason as usize, i);
            counts.count(reason);
            assert_eq!(counts[reason], 1);
        }
        assert_eq!(counts.total(), DropReason::ALL.len() as u64);
        let mut names: Vec<_> = DropReason::ALL.iter().map(|r| r.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::ALL.len());
    }
}
