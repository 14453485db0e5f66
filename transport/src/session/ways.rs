//! Addresses of streams, and the choice between datagrams and a stream.
//!
//! ```text
//! Datagrams ──nothing comes back for a while──► Dialling ──► Stream ──proved──► Datagrams
//!     ▲                                            │           │ probes, 1 s … 30 s
//!     └────────────── something came ──────────────┘           └─ it broke ► Dialling
//! ```
//!
//! To a session a stream is one more place where its peer may be: it has an address of
//! its own, and going over to it is a move as any other. So slots, keys and replies stay,
//! and both ends prove the new way before they rely on it (see `session::path`). The end
//! that has the peer's addresses chooses; the other follows.
//!
//! *Blocked* is what answers nothing: [`STEPS`] questions, each after [`PAUSE`] or two
//! round trips, while something is under way that a living peer answers at once. Half of
//! them start the stream, all of them choose it, so on a path below 50 ms a blocked one is
//! left after 160 ms and the time that connecting takes.
//!
//! Not here: connections, sockets, clocks. [`Ways`] says what it wants; a carrier does it.
//!
//! Invariants: one connection per peer at a time; no probe goes anywhere but to the
//! configured address; attempts grow rarer, to one in 30 s.

use super::handshake::PublicKey;
use super::hub::Hub;
use crate::time::Instant;
use alloc::collections::BTreeMap;
use core::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use core::time::Duration;

/// First half of the addresses of streams: the discard-only prefix `100::/64` (RFC 6666),
/// from which nothing comes over a network.
const PREFIX: u128 = 0x0100 << 112;

/// Unanswered questions after which a way counts as blocked.
pub const STEPS: u32 = 4;
/// Least pause between two of them.
pub const PAUSE: Duration = Duration::from_millis(40);
/// Longest pause between two of them: with it a blocked path is left within 500 ms.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// First pause between two attempts to go back to datagrams, or to connect again.
const RETRY: Duration = Duration::from_secs(1);
/// Longest such pause.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How long datagrams must have gone well for a new fall to begin with short pauses.
const GOOD: Duration = Duration::from_secs(60);
/// Silence after which a stream that is asked counts as broken.
const DEAD_STREAM: Duration = Duration::from_secs(2);
/// How long a stream is kept that nobody needs any more.
const LINGER: Duration = Duration::from_secs(5);

/// The address of stream number `number`.
#[must_use]
pub const fn stream_address(number: u64) -> SocketAddr {
    let ip = Ipv6Addr::from_bits(PREFIX | number as u128);
    SocketAddr::V6(SocketAddrV6::new(ip, 0, 0, 0))
}

/// The number of the stream that has this address, if it is one of a stream.
#[must_use]
pub const fn stream_number(address: SocketAddr) -> Option<u64> {
    let SocketAddr::V6(address) = address else { return None };
    let bits = address.ip().to_bits();
    if bits >> 64 == PREFIX >> 64 {
        // The upper half is the prefix.
        let [.., a, b, c, d, e, f, g, h] = bits.to_be_bytes();
        Some(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    } else {
        None
    }
}

/// What [`Ways`] wants done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Want {
    /// A stream to this peer; then [`Ways::on_connected`] or [`Ways::on_closed`].
    Dial(PublicKey),
    /// The stream to this peer is of no use any more.
    HangUp(PublicKey),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stream {
    None,
    Dialling,
    Standing(SocketAddr),
}

/// When to try again, ever more rarely.
#[derive(Clone, Copy, Debug)]
struct Retry {
    at: Instant,
    pause: Duration,
}

impl Retry {
    const fn new(now: Instant) -> Self {
        Self { at: now, pause: RETRY }
    }

    fn put_off(&mut self, now: Instant) {
        self.at = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_RETRY);
    }
}

/// The ways to one peer.
#[derive(Debug)]
struct Way {
    datagrams: SocketAddr,
    stream: Stream,
    /// Questions asked since the peer was heard, and when the next is due.
    asked: u32,
    ask_at: Option<Instant>,
    dial: Retry,
    probe: Retry,
    /// Since when datagrams go well.
    good_since: Option<Instant>,
}

/// The choice of ways to all peers that have two.
#[derive(Debug, Default)]
pub struct Ways {
    peers: BTreeMap<PublicKey, Way>,
}

impl Ways {
    /// A peer that takes streams beside datagrams at its address.
    pub fn add(&mut self, now: Instant, key: PublicKey, datagrams: SocketAddr) {
        let way = Way {
            datagrams,
            stream: Stream::None,
            asked: 0,
            ask_at: None,
            dial: Retry::new(now),
            probe: Retry::new(now),
            good_since: None,
        };
        self.peers.insert(key, way);
    }

    /// The peer has only one way any more.
    pub fn remove(&mut self, key: &PublicKey) {
        self.peers.remove(key);
    }

    /// The stream that was wanted stands, under this address.
    pub fn on_connected(&mut self, key: &PublicKey, stream: SocketAddr) {
        if let Some(way) = self.peers.get_mut(key) {
            way.stream = Stream::Standing(stream);
        }
    }

    /// The stream that was wanted could not be had.
    pub fn on_refused(&mut self, now: Instant, key: &PublicKey) {
        if let Some(way) = self.peers.get_mut(key) {
            way.stream = Stream::None;
            way.dial.put_off(now);
        }
    }

    /// A stream, whoever began it, is no more: whoever was on it is sent another way.
    pub fn on_closed(&mut self, now: Instant, stream: SocketAddr, hub: &mut Hub) {
        for (key, way) in &mut self.peers {
            if way.stream == Stream::Standing(stream) {
                way.stream = Stream::None;
            }
            if hub.address_of(key) == Some(stream) {
                way.leave_stream(now, key, hub);
            }
        }
    }

    /// Looks at all peers, sends them where they can be reached; gives the next thing that
    /// has to be done outside. Call until `None`.
    pub fn poll(&mut self, now: Instant, hub: &mut Hub) -> Option<Want> {
        self.peers.iter_mut().find_map(|(key, way)| way.poll(now, key, hub))
    }

    /// When to call [`poll`](Self::poll) next, if nothing else happens.
    #[must_use]
    pub fn poll_timeout(&self, now: Instant, hub: &Hub) -> Option<Instant> {
        self.peers.iter().filter_map(|(key, way)| way.timeout(now, key, hub)).min()
    }
}

impl Way {
    fn poll(&mut self, now: Instant, key: &PublicKey, hub: &mut Hub) -> Option<Want> {
        let at = hub.address_of(key)?;
        if stream_number(at).is_some() {
            return self.on_stream(now, key, hub, at);
        }
        let Some(since) = hub.unanswered(key) else {
            (self.asked, self.ask_at) = (0, None);
            return self.go_well(now, key, hub.is_up(key));
        };
        let pause = pause(key, hub);
        if now >= *self.ask_at.get_or_insert(since + pause) && self.asked < STEPS {
            self.asked += 1;
            self.good_since = None;
            self.ask_at = Some(now + pause);
            hub.ask_whether_there(key);
        }
        match self.stream {
            Stream::Standing(stream) if self.asked >= STEPS => {
                (self.asked, self.ask_at) = (0, None);
                self.probe.put_off(now);
                hub.redirect(now, key, stream);
                None
            }
            Stream::None if now >= self.dial.at && self.asked >= patience(key, hub) => {
                self.stream = Stream::Dialling;
                Some(Want::Dial(*key))
            }
            _ => None,
        }
    }

    /// Datagrams are answered.
    fn go_well(&mut self, now: Instant, key: &PublicKey, is_up: bool) -> Option<Want> {
        let since = *self.good_since.get_or_insert(now);
        if !is_up || matches!(self.stream, Stream::Dialling) {
            return None;
        }
        if now.since(since) >= GOOD {
            self.dial.pause = RETRY;
            self.probe.pause = RETRY;
        }
        if now.since(since) >= LINGER && self.stream != Stream::None {
            self.stream = Stream::None;
            return Some(Want::HangUp(*key));
        }
        None
    }

    /// The peer is on a stream: see that it stands, and whether datagrams go again.
    fn on_stream(
        &mut self,
        now: Instant,
        key: &PublicKey,
        hub: &mut Hub,
        at: SocketAddr,
    ) -> Option<Want> {
        (self.asked, self.ask_at, self.good_since) = (0, None, None);
        let is_other = matches!(self.stream, Stream::Standing(ours) if ours != at);
        if is_other && hub.public_key() > *key {
            // Both ends have begun one, and each would follow the other for ever.
            self.stream = Stream::None;
            return Some(Want::HangUp(*key));
        }
        if hub.unanswered(key).is_some_and(|since| now.since(since) >= DEAD_STREAM) {
            self.leave_stream(now, key, hub);
            let had = matches!(self.stream, Stream::Standing(_));
            self.stream = Stream::None;
            return had.then_some(Want::HangUp(*key));
        }
        if now >= self.probe.at {
            self.probe.put_off(now);
            hub.probe(now, key, self.datagrams);
        }
        None
    }

    fn leave_stream(&mut self, now: Instant, key: &PublicKey, hub: &mut Hub) {
        (self.asked, self.ask_at) = (0, None);
        self.dial.put_off(now);
        hub.redirect(now, key, self.datagrams);
    }

    fn timeout(&self, now: Instant, key: &PublicKey, hub: &Hub) -> Option<Instant> {
        let (at, unanswered) = (hub.address_of(key)?, hub.unanswered(key));
        if stream_number(at).is_some() {
            let dead = unanswered.map(|since| since + DEAD_STREAM);
            return dead.into_iter().chain([self.probe.at]).min();
        }
        let Some(since) = unanswered else {
            let since = self.good_since.unwrap_or(now);
            let lingers = matches!(self.stream, Stream::Standing(_));
            return lingers.then_some(since + LINGER);
        };
        if self.asked < STEPS {
            return Some(self.ask_at.unwrap_or(since + pause(key, hub)));
        }
        (self.stream == Stream::None).then_some(self.dial.at)
    }
}

fn pause(key: &PublicKey, hub: &Hub) -> Duration {
    hub.rtt_of(key).map_or(PAUSE, |rtt| (rtt * 2).clamp(PAUSE, LONGEST_PAUSE))
}

/// Questions before a stream is begun. Where both ends ask, one of them is to be first.
fn patience(key: &PublicKey, hub: &Hub) -> u32 {
    if hub.public_key() < *key { STEPS / 2 } else { STEPS }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_have_addresses_that_nothing_else_has() {
        for number in [0, 1, 77, u64::MAX] {
            assert_eq!(stream_number(stream_address(number)), Some(number));
        }
        for other in ["192.0.2.1:0", "[::1]:0", "[100:0:0:1::1]:0", "[2001:db8::1]:9"] {
            let other = other.parse::<SocketAddr>().expect("an address");
            assert_eq!(stream_number(other), None, "{other}");
        }
    }

    #[test]
    fn attempts_grow_rare() {
        let mut retry = Retry::new(Instant::START);
        for _ in 0..10 {
            retry.put_off(Instant::START);
        }
        assert_eq!(retry.at, Instant::START + LONGEST_RETRY);
    }
}
