//! The way of large payloads: a socket beside the one for calls, and how long a datagram
//! may be there.
//!
//! ```text
//! first pieces by the calls' way ─► acknowledged, with BULK ─► CHALLENGE there ─► PROOF
//!      ▲                                                                            │
//!      └── a probe timeout, and then nothing by it: forgotten ◄──── pieces there ◄───┘
//!                                                     longer and longer ones are tried
//! ```
//!
//! A call never waits behind a bulk in a socket's buffer, because they have two. Who
//! receives says where by BULK whenever pieces come by the calls' way; who sends proves
//! that way before it uses it, and probes by the other one when nothing arrives: a NAT, a
//! firewall or a moved peer costs one probe timeout. What is sent over it carries
//! [`FLAG_BULK`](conet_wire::session::FLAG_BULK) and so is no sign of where a peer is.
//!
//! Each burst begins by the calls' way, so that a receiver may sleep on that socket alone
//! while there is no bulk.
//!
//! *Path MTU* (RFC 8899): packets with Don't Fragment, padded to a size that is not known
//! to pass, are answered like challenges. Their loss is no sign of congestion, no message
//! of the network is believed, and sizes are tried from the longest down, because where
//! one is too long for the device itself that is known at once.
//!
//! Invariants: nothing but challenges goes to a port that has proved nothing, one for each
//! BULK; a size is used only after a packet of that size was answered.

use super::flow::Arrived;
use super::rtt::Rtt;
use crate::time::Instant;
use core::net::SocketAddr;
use core::time::Duration;

/// Sizes of datagrams to try, bytes of UDP payload: loopback and shared devices, jumbo
/// frames (9000 and 4096 less IPv6 and UDP headers), Ethernet over IPv4 and IPv6.
const SIZES: [u16; 6] = [65_000, 32_000, 8952, 4048, 1472, 1452];
/// Probes of one size before it counts as too long (RFC 8899 §5.1.2: 3, for paths with more
/// loss than an Ethernet).
const TRIES: u8 = 2;
/// Pause until longer sizes are tried again (RFC 8899 §5.1.1: `PMTU_RAISE_TIMER`).
const RAISE: Duration = Duration::from_secs(600);
/// A burst has ended when nothing was acknowledged for so long. Less than a receiver goes on
/// looking at its socket for bulk ([`EXPECTED`]) by far.
const BURST: Duration = Duration::from_millis(100);
/// How long a receiver looks at its socket for bulk after the last piece.
pub(crate) const EXPECTED: Duration = Duration::from_secs(1);

/// Where this end takes large payloads.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BulkPort {
    /// UDP port, at the address that everything else goes to.
    pub port: u16,
    /// Bytes that its socket holds until somebody takes them.
    pub buffer: u32,
}

/// The probing of sizes.
#[derive(Clone, Copy, Debug)]
struct Mtu {
    /// What passes.
    size: usize,
    /// The next of [`SIZES`] to try.
    next: usize,
    tries: u8,
    /// Until when the last one may be answered.
    until: Option<Instant>,
    raise: Option<Instant>,
}

/// Where the peer takes large payloads.
#[derive(Clone, Copy, Debug)]
struct Way {
    port: BulkPort,
    /// Unpredictable; 0 before there is one.
    token: u64,
    challenge: bool,
    is_proved: bool,
    /// Nothing has arrived for a probe timeout, and nothing by this way since.
    is_suspect: bool,
    mtu: Mtu,
}

/// Both directions' ways.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bulk {
    pub(crate) ours: Option<BulkPort>,
    /// The peer sends pieces by the calls' way: it is to be told of ours.
    tell: bool,
    way: Option<Way>,
    acked: Option<Instant>,
}

/// What goes by the peer's way now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Probe {
    /// A challenge.
    Small(u64),
    /// One of so many bytes.
    Padded(u64, usize),
}

impl Bulk {
    /// A tracked packet came by the calls' way.
    pub(crate) const fn on_piece_aside(&mut self) {
        self.tell = self.ours.is_some();
    }

    /// The BULK to say.
    pub(crate) const fn take_tell(&mut self) -> Option<BulkPort> {
        if self.tell {
            self.tell = false;
            return self.ours;
        }
        None
    }

    /// The peer takes large payloads there.
    pub(crate) fn on_port(&mut self, port: BulkPort, least: usize) {
        match &mut self.way {
            _ if port.port == 0 => self.way = None,
            Some(way) if way.port.port == port.port => {
                way.port = port;
                way.challenge = !way.is_proved;
            }
            way => {
                let mtu = Mtu { size: least, next: 0, tries: 0, until: None, raise: None };
                *way = Some(Way {
                    port,
                    token: 0,
                    challenge: true,
                    is_proved: false,
                    is_suspect: false,
                    mtu,
                });
            }
        }
    }

    /// Whether a challenge waits for a number.
    pub(crate) fn wants_token(&self) -> bool {
        self.way.as_ref().is_some_and(|way| way.challenge && way.token == 0)
    }

    /// Whether the peer has said where it takes large payloads.
    pub(crate) const fn has_way(&self) -> bool {
        self.way.is_some()
    }

    pub(crate) const fn set_token(&mut self, token: u64) {
        if let Some(way) = &mut self.way {
            way.token = token;
        }
    }

    /// Tracked packets have arrived.
    pub(crate) fn on_arrived(&mut self, now: Instant, arrived: Arrived) {
        if arrived == Arrived::default() {
            return;
        }
        self.acked = Some(now);
        if arrived.by_bulk {
            if let Some(way) = &mut self.way {
                way.is_suspect = false;
            }
        } else if self.way.as_ref().is_some_and(|way| way.is_suspect) {
            // By the calls' way it arrives, by this one it did not: proved anew.
            self.way = None;
        }
    }

    /// The peer has answered.
    pub(crate) fn on_proof(&mut self, now: Instant, token: u64) -> bool {
        let Some(way) = &mut self.way else { return false };
        if way.token == 0 {
            return false;
        }
        if token == way.token {
            way.challenge = false;
            way.is_proved = true;
            return true;
        }
        // Numbers of sizes follow the challenge's.
        let at =
            token.wrapping_sub(way.token).checked_sub(1).and_then(|at| usize::try_from(at).ok());
        let size = at.and_then(|at| SIZES.get(at)).map(|size| usize::from(*size));
        match size {
            // Not of a size that is yet to be tried.
            Some(size) if at.is_some_and(|at| at <= way.mtu.next) && way.is_proved => {
                if size > way.mtu.size {
                    way.mtu.size = size;
                    way.mtu.next = SIZES.len();
                    way.mtu.until = None;
                    way.mtu.raise = Some(now + RAISE);
                }
                true
            }
            _ => false,
        }
    }

    /// The peer's address and size for pieces now; `quiet` says that no probe timeout has
    /// passed since the last acknowledgement.
    pub(crate) fn way(
        &self,
        now: Instant,
        at: SocketAddr,
        quiet: bool,
    ) -> Option<(SocketAddr, usize)> {
        let way = self.way.as_ref().filter(|way| way.is_proved && quiet)?;
        let is_burst = self.acked.is_some_and(|acked| now.since(acked) < BURST);
        is_burst.then(|| (SocketAddr::new(at.ip(), way.port.port), way.mtu.size))
    }

    /// Bytes that may be on their way to the peer.
    pub(crate) fn buffer(&self) -> Option<usize> {
        self.way.as_ref().filter(|way| way.is_proved).map(|way| way.port.buffer as usize)
    }

    /// What is to be sent by the peer's way, to learn about it.
    pub(crate) fn probe(
        &mut self,
        now: Instant,
        at: SocketAddr,
        rtt: &Rtt,
    ) -> Option<(SocketAddr, Probe)> {
        let way = self.way.as_mut()?;
        let to = SocketAddr::new(at.ip(), way.port.port);
        if way.challenge && way.token != 0 {
            way.challenge = false;
            return Some((to, Probe::Small(way.token)));
        }
        if !way.is_proved {
            return None;
        }
        let mtu = &mut way.mtu;
        if mtu.raise.is_some_and(|raise| raise <= now) {
            *mtu = Mtu { size: mtu.size, next: 0, tries: 0, until: None, raise: None };
        }
        if mtu.until.is_some_and(|until| until > now) {
            return None;
        }
        if mtu.until.take().is_some() && mtu.tries >= TRIES {
            (mtu.next, mtu.tries) = (mtu.next + 1, 0);
        }
        let size = SIZES.get(mtu.next).map_or(0, |size| usize::from(*size));
        if size <= mtu.size {
            mtu.next = SIZES.len();
            mtu.raise = mtu.raise.or(Some(now + RAISE));
            return None;
        }
        mtu.tries += 1;
        mtu.until = Some(now + rtt.probe_timeout() * 2);
        Some((to, Probe::Padded(way.token.wrapping_add(1 + mtu.next as u64), size)))
    }

    pub(crate) fn is_at(&self, port: u16) -> bool {
        self.way.as_ref().is_some_and(|way| way.port.port == port)
    }

    /// A datagram was too long for the device itself: a probe, or the device has changed.
    pub(crate) fn on_too_long(&mut self, length: usize, least: usize) {
        let Some(way) = &mut self.way else { return };
        if length > way.mtu.size {
            way.mtu.tries = TRIES;
            way.mtu.until = Some(Instant::START);
        } else {
            way.mtu = Mtu { size: least, next: 0, tries: 0, until: None, raise: None };
        }
    }

    /// Nothing has arrived for a probe timeout: what comes next shows whose fault it was.
    pub(crate) const fn on_silence(&mut self, least: usize) {
        if let Some(way) = &mut self.way {
            if way.is_suspect {
                // For the second time with this size: perhaps the path carries it no more.
                way.mtu.size = least;
            }
            way.is_suspect = true;
        }
    }

    /// Forgets the peer's way: it is elsewhere, or another one.
    pub(crate) const fn forget(&mut self) {
        self.way = None;
        self.acked = None;
    }
}
