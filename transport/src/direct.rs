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
//! that only keeps it from answering: each spin that brought nothing quarters the next, and
//! one in which the processor was taken away ends spinning for a long while. Sleeps that
//! took what waking another processor takes count towards trying again, the more the oftener
//! that was in vain. One that took less is as good as spinning: who answered shares our
//! processor (`examples/waiting.rs` measures all of this).
//!
//! Who does not spin sleeps in the kernel's receive: one system call instead of two. Its
//! time limit is as coarse as the kernel's tick (some milliseconds), which matters only
//! for what is repeated because it was lost; so as soon as a wait was in vain, the next ones
//! are exact.
//!
//! *Bulk* goes a batch at a time, and comes a batch at a time, by sockets of its own; calls
//! get a look between any two.
//!
//! Invariants: what [`Direct::turn`] does is bounded by some batches of datagrams; a
//! carrier's error is the caller's to see, a datagram that cannot go is as good as lost.

use crate::carrier::{Carrier, Incoming, Udp, receive_placed, with_parts};
use crate::clock::Clock;
use crate::session::{BATCH_BUFFER, Hub, HubConfig, Transmit, handshake::HandshakeError};
use crate::time::Instant;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

/// Longest time that the carrier is asked before the thread sleeps: more than a call on one
/// machine takes (4 µs) and a wake-up costs (50), or two that once slept would go on waking
/// each other.
const SPIN: Duration = Duration::from_micros(100);
/// Shorter than that it is no use.
const LEAST_SPIN: Duration = Duration::from_micros(5);
/// Looks between two at the clock, which costs a tenth of one.
const LOOKS: usize = 8;
/// Time between two looks at the clock after which somebody else has had the processor: an interrupt
/// takes less, a context switch and what follows it more.
const GAP: Duration = Duration::from_micros(15);
/// What a sleep in the kernel's receive is rounded up to.
const TICK: Duration = Duration::from_millis(4);
/// Sleeps in a row that brought what was waited for, before a short one may be inexact.
const CALM: u32 = 64;
/// Batches for bulk that are taken before they are acknowledged.
const BATCHES: usize = 4;
/// Short sleeps in a row after which spinning is tried again.
const PATIENCE: u32 = 64;
/// The same where that was tried in vain again and again: on one processor every sleep is
/// short, and every spin lost.
const MOST_PATIENCE: u32 = 16 * 1024;
/// How many times more patience there is after somebody else has had the processor.
const SHARED: u32 = 8;
/// A sleep below this cost no wake-up of another processor (19 to 50 µs): who answered was
/// waiting for ours, and spinning would only have kept it.
const WORTH: Duration = Duration::from_micros(15);

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
    clock: Clock,
    /// When the carrier wants to look at its ways again.
    steer_at: Option<Instant>,
    out: Vec<u8>,
    /// What stands around payloads that are received where they belong.
    around: Vec<u8>,
    wait: Wait,
    spin: Duration,
    short_sleeps: u32,
    patience: u32,
    /// Sleeps since one in which what was waited for did not come.
    calm: u32,
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
        let mut hub = Hub::new(config)?;
        hub.set_bulk(carrier.bulk());
        Ok(Self {
            hub,
            carrier,
            clock: Clock::new(),
            steer_at: None,
            out: vec![0; BATCH_BUFFER],
            around: Vec::new(),
            wait,
            spin: SPIN,
            short_sleeps: 0,
            patience: PATIENCE,
            calm: 0,
        })
    }

    /// Time as the hub sees it.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.clock.now()
    }

    /// Sends what there is to send.
    ///
    /// # Errors
    ///
    /// Those of the carrier.
    pub fn flush(&mut self) -> io::Result<()> {
        let now = self.now();
        self.flush_at(now, self.batch())
    }

    /// Datagrams of a batch for bulk; none without a way for it.
    fn batch(&self) -> Option<usize> {
        Some(self.carrier.bulk_batch()).filter(|batch| *batch > 0)
    }

    /// Sends what there is to send by the calls' way, and one batch by the way for bulk: then
    /// calls get a look again.
    fn flush_at(&mut self, now: Instant, batch: Option<usize>) -> io::Result<()> {
        let gathers = self.carrier.gathers();
        loop {
            let polled = if gathers {
                self.hub.poll_parts(now, &mut self.out, batch)
            } else {
                self.hub.poll_batch(now, &mut self.out, batch)
            };
            let Some(transmit) = polled else { break };
            let Transmit { to, length, segment, is_bulk, in_parts } = transmit;
            if in_parts {
                self.send_parts(&transmit)?;
                break;
            }
            let Some(bytes) = self.out.get(..length) else { break };
            if !is_bulk {
                self.carrier.send(to, bytes, segment)?;
                continue;
            }
            if !self.carrier.send_bulk(to, bytes, segment)? {
                self.hub.handle_too_long(&transmit);
            }
            break;
        }
        self.carrier.flush()
    }

    /// Sends what the hub has left where it is.
    fn send_parts(&mut self, transmit: &Transmit) -> io::Result<()> {
        let fits = with_parts(&self.hub, transmit, &self.out, |parts| {
            self.carrier.send_parts(transmit.to, parts, transmit.segment)
        })?;
        if !fits {
            self.hub.handle_too_long(transmit);
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
        let (mut now, batch) = (self.now(), self.batch());
        self.flush_at(now, batch)?;
        // What comes may bring other deadlines; they are looked at in the next turn.
        let deadline = match (self.hub.poll_timeout(now), self.steer_at) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        if wait.is_zero() {
            self.receive(&mut now)?;
        } else {
            let end = now + wait;
            now = self.wait_for(now, deadline.map_or(end, |at| end.min(at)))?;
        }
        if deadline.is_some_and(|at| at <= now) {
            self.hub.handle_timeout(now);
        }
        self.steer_at = self.carrier.steer(now, &mut self.hub);
        if self.hub.has_event() {
            // What the caller says to it goes in the same datagram.
            return Ok(());
        }
        // Bulk goes at the beginning of a turn: between two batches is a look for calls.
        self.flush_at(now, batch.map(|_| 0))
    }

    /// Takes datagrams; says whether there was one, and sets `now` if so.
    fn receive(&mut self, now: &mut Instant) -> io::Result<bool> {
        if self.receive_calls(now)? {
            return Ok(true);
        }
        if self.hub.bulk_expected() <= *now {
            return Ok(false);
        }
        let mut any = false;
        for _ in 0..BATCHES {
            let (hub, clock, mut first) = (&mut self.hub, &self.clock, true);
            if self.carrier.scatters() {
                let (carrier, around) = (&mut self.carrier, &mut self.around);
                let taken = receive_placed(
                    hub,
                    around,
                    |parts| carrier.receive_parts(parts),
                    || {
                        *now = clock.now();
                        *now
                    },
                )?;
                if let Some(taken) = taken {
                    any |= taken > 0;
                    if taken == 0 || self.receive_calls(now)? {
                        break;
                    }
                    continue;
                }
            }
            let taken = self.carrier.receive_bulk(|incoming| {
                if first {
                    *now = clock.now();
                    first = false;
                }
                hub.handle_marked_datagram(*now, incoming.from, incoming.bytes, incoming.marked);
            })?;
            any |= taken > 0;
            if taken == 0 || self.receive_calls(now)? {
                break;
            }
        }
        Ok(any)
    }

    fn receive_calls(&mut self, now: &mut Instant) -> io::Result<bool> {
        let taken = self.carrier.receive(taker(&mut self.hub, &self.clock, now))?;
        Ok(taken > 0)
    }

    /// Waits until datagrams have been taken or `end` has come; gives the time.
    fn wait_for(&mut self, begun: Instant, end: Instant) -> io::Result<Instant> {
        let mut now = begun;
        let spin = match self.wait {
            Wait::Spin => end,
            Wait::Block => begun,
            Wait::Adaptive => end.min(begun + self.spin),
        };
        let spins = spin > begun;
        if (spins || end <= begun) && self.spin_until(&mut now, spin, spins)? {
            return Ok(now);
        }
        if end <= now {
            return Ok(now);
        }
        self.sleep(now, end.since(now))
    }

    /// Asks again and again; says whether something came.
    fn spin_until(&mut self, now: &mut Instant, end: Instant, spins: bool) -> io::Result<bool> {
        loop {
            for _ in 0..LOOKS {
                if self.receive(now)? {
                    if !self.spin.is_zero() {
                        self.spin = (self.spin * 2).min(SPIN);
                        self.patience = (self.patience / 2).max(PATIENCE);
                    }
                    return Ok(true);
                }
                if !spins {
                    break;
                }
            }
            let before = core::mem::replace(now, self.now());
            if *now >= end {
                break;
            }
            if self.wait == Wait::Adaptive && now.since(before) > GAP {
                // Another program has had this processor: it may be who is waited for, and who
                // spins is the first to lose it again.
                self.spin = Duration::ZERO;
                self.patience = (self.patience * SHARED).min(MOST_PATIENCE);
                return Ok(false);
            }
            core::hint::spin_loop();
        }
        if spins {
            self.spin /= 4;
            if self.spin < LEAST_SPIN {
                self.spin = Duration::ZERO;
                self.patience = (self.patience * 2).min(MOST_PATIENCE);
            }
        }
        Ok(false)
    }

    /// Sleeps until something comes, which is taken; gives the time.
    fn sleep(&mut self, slept: Instant, left: Duration) -> io::Result<Instant> {
        let mut now = slept;
        let is_exact = left < TICK && self.calm < CALM;
        let came = if self.hub.bulk_expected() > slept {
            self.carrier.wait_for_either(left)? && self.receive(&mut now)?
        } else if is_exact || (self.wait == Wait::Adaptive && !self.spin.is_zero()) {
            self.carrier.wait(left)? && self.receive(&mut now)?
        } else {
            let take = taker(&mut self.hub, &self.clock, &mut now);
            self.carrier.receive_sleeping(left, take)? > 0
        };
        if !came {
            now = self.now();
            if left < TICK {
                // Something was waited for in vain: from now on be exact.
                self.calm = 0;
            }
            return Ok(now);
        }
        self.calm = self.calm.saturating_add(1);
        // Short enough for spinning, had the other processor been at it.
        let worth = (WORTH..SPIN * 2).contains(&now.since(slept));
        self.short_sleeps = if worth { self.short_sleeps + 1 } else { 0 };
        if self.short_sleeps >= self.patience && self.spin.is_zero() {
            self.short_sleeps = 0;
            self.spin = SPIN;
        }
        Ok(now)
    }
}

/// Gives datagrams to `hub`, and the time of the first to `now`. What the caller has to see
/// seldom comes with others: it is answered before more are looked for.
fn taker(hub: &mut Hub, clock: &Clock, now: &mut Instant) -> impl FnMut(Incoming<'_>) -> bool {
    let mut first = true;
    move |incoming| {
        if first {
            *now = clock.now();
        }
        first = false;
        hub.handle_marked_datagram(*now, incoming.from, incoming.bytes, incoming.marked);
        !hub.has_event()
    }
}
