//! A hub and its carrier in the caller's own thread: the shortest way of a call.
//!
//! ```text
//! turn(wait) ─► receive what is there ─► timers ─► send what there is
//!      └─ nothing came: spin a while, then sleep until a datagram or a deadline
//! ```
//!
//! No thread, no channel, no wake-up but the carrier's. [`Endpoint`](crate::endpoint) has
//! all of these, and is for programs whose threads call each other's peers; this one is
//! for who has one thread to give and counts microseconds.
//!
//! *Waiting.* Waking a sleeping processor costs more than the call (19 to 50 µs on the
//! reference machine, where a whole call takes 4), so the carrier is asked again and again
//! for up to `SPIN` before the thread sleeps. Where the peer needs the same processor
//! that only keeps it from answering: each spin that brought nothing halves the next, to
//! none, and each sleep that was short enough to have been spun through counts towards
//! trying again, the more the oftener that was in vain.
//!
//! Invariants: what [`Direct::turn`] does is bounded by one batch of datagrams; a carrier's
//! error is the caller's to see, a datagram that cannot go is as good as lost.

use crate::carrier::{Carrier, Udp};
use crate::session::{Hub, HubConfig, handshake::HandshakeError};
use crate::time::Instant;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

/// Longest time that the socket is asked before the thread sleeps: more than a call on one
/// machine takes (4 µs), less than a wake-up costs.
const SPIN: Duration = Duration::from_micros(20);
/// Short sleeps in a row after which spinning is tried again.
const PATIENCE: u32 = 64;
/// The same where that was tried in vain again and again: on one processor every sleep is
/// short, and every spin lost.
const MOST_PATIENCE: u32 = 16 * 1024;
/// Datagrams below this come one by one, bytes.
const SMALL: usize = 1000;

/// How a thread waits for a datagram.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wait {
    /// Ask a while, then sleep; how long a while, experience shows.
    Adaptive,
    /// Ask until something comes. For a processor that has nothing else to do.
    Spin,
    /// Sleep at once.
    Block,
}

/// A hub on a carrier of its own, driven by whoever calls [`turn`](Self::turn).
#[derive(Debug)]
pub struct Direct<C = Udp> {
    /// The core: calls go in, events come out. After a change call [`Direct::flush`] or
    /// [`Direct::turn`].
    pub hub: Hub,
    /// What carries its datagrams.
    pub carrier: C,
    started: std::time::Instant,
    out: Vec<u8>,
    wait: Wait,
    spin: Duration,
    short_sleeps: u32,
    patience: u32,
}

impl Direct {
    /// Serves `socket`, which is bound.
    ///
    /// # Errors
    ///
    /// [`HandshakeError::Entropy`] without randomness.
    pub fn new(socket: UdpSocket, config: HubConfig, wait: Wait) -> Result<Self, HandshakeError> {
        Self::over(Udp::new(socket), config, wait)
    }

    /// Connects the socket to its only peer; see [`Udp::connect`].
    ///
    /// # Errors
    ///
    /// `connect(2)`.
    pub fn connect(&mut self, address: SocketAddr) -> io::Result<()> {
        self.carrier.connect(address)
    }

    /// Where the socket is bound.
    ///
    /// # Errors
    ///
    /// `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.carrier.local_addr()
    }
}

impl<C: Carrier> Direct<C> {
    /// Serves `carrier`. No datagram is longer than the carrier takes.
    ///
    /// # Errors
    ///
    /// [`HandshakeError::Entropy`] without randomness.
    pub fn over(carrier: C, mut config: HubConfig, wait: Wait) -> Result<Self, HandshakeError> {
        config.limits.datagram = config.limits.datagram.min(carrier.guarantees().datagram);
        Ok(Self {
            hub: Hub::new(config)?,
            carrier,
            started: std::time::Instant::now(),
            out: Vec::new(),
            wait,
            spin: SPIN,
            short_sleeps: 0,
            patience: PATIENCE,
        })
    }

    /// Time as the hub sees it.
    #[must_use]
    pub fn now(&self) -> Instant {
        Instant::from_start(self.started.elapsed())
    }

    /// Sends what there is to send.
    ///
    /// # Errors
    ///
    /// Those of the carrier.
    pub fn flush(&mut self) -> io::Result<()> {
        let now = self.now();
        self.flush_at(now)
    }

    fn flush_at(&mut self, now: Instant) -> io::Result<()> {
        while let Some(to) = self.hub.poll_transmit(now, &mut self.out) {
            self.carrier.send(to, &self.out, self.out.len())?;
        }
        Ok(())
    }

    /// Takes the datagrams that are there, does what is due, sends what there is to send;
    /// waits for `wait` at most if there is nothing.
    ///
    /// # Errors
    ///
    /// Those of the carrier.
    pub fn turn(&mut self, wait: Duration) -> io::Result<()> {
        let mut now = self.now();
        self.flush_at(now)?;
        if wait.is_zero() {
            self.receive(&mut now)?;
        } else {
            now = self.wait_for(now, wait)?;
        }
        if self.hub.poll_timeout(now).is_some_and(|at| at <= now) {
            self.hub.handle_timeout(now);
        }
        self.flush_at(now)
    }

    /// Takes a batch of datagrams; says whether there was one, and sets `now` if so.
    fn receive(&mut self, now: &mut Instant) -> io::Result<bool> {
        let (hub, started, mut first) = (&mut self.hub, self.started, true);
        let taken = self.carrier.receive(|incoming| {
            if first {
                *now = Instant::from_start(started.elapsed());
            }
            // A small one seldom comes with others: answer it before looking again.
            let more = !first || incoming.bytes.len() >= SMALL;
            first = false;
            hub.handle_marked_datagram(*now, incoming.from, incoming.bytes, incoming.marked);
            more
        })?;
        Ok(taken > 0)
    }

    /// Waits until datagrams have been taken, the hub's deadline or `most` has passed;
    /// gives the time.
    fn wait_for(&mut self, begun: Instant, most: Duration) -> io::Result<Instant> {
        let most = self.hub.poll_timeout(begun).map_or(most, |at| at.since(begun).min(most));
        let mut now = begun;
        let spin = match self.wait {
            Wait::Spin => most,
            Wait::Block => Duration::ZERO,
            Wait::Adaptive => self.spin.min(most),
        };
        if most.is_zero() || !spin.is_zero() {
            loop {
                if self.receive(&mut now)? {
                    if !self.spin.is_zero() {
                        self.spin = (self.spin * 2).min(SPIN);
                        self.patience = PATIENCE;
                    }
                    return Ok(now);
                }
                now = self.now();
                if now.since(begun) >= spin {
                    break;
                }
                core::hint::spin_loop();
            }
            self.spin /= 2;
            if self.spin < Duration::from_micros(2) {
                self.spin = Duration::ZERO;
                self.patience = (self.patience * 2).min(MOST_PATIENCE);
            }
        }
        let slept = now;
        let left = most.saturating_sub(slept.since(begun));
        if left.is_zero() {
            return Ok(now);
        }
        if !self.carrier.wait(left)? {
            return Ok(self.now());
        }
        if !self.receive(&mut now)? {
            now = self.now();
        }
        // Short enough for spinning, had the other processor been at it.
        let short = now.since(slept) < SPIN * 2;
        self.short_sleeps = if short { self.short_sleeps + 1 } else { 0 };
        if self.short_sleeps >= self.patience && self.spin.is_zero() {
            self.short_sleeps = 0;
            self.spin = SPIN;
        }
        Ok(now)
    }
}
