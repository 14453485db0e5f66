//! What carries a session's datagrams: the port under [`Direct`](crate::direct).
//!
//! ```text
//! Hub ── datagrams, addresses ──► Carrier ─┬─ Udp       one socket
//!                                          ├─ Streams   TCP, unix
//!                                          ├─ Fallback  the one where the other is blocked
//!                                          └─ Shared    rings in memory, on one host
//! ```
//!
//! *Why so little.* The session repairs loss, order and repetition itself, and proves
//! addresses itself. So a carrier may lose whatever it likes, and everything above is the
//! same over all of them; what one guarantees beyond that ([`Guarantees`]) only makes
//! repairs rarer. A carrier knows no calls, and no peers but where it must choose a way.
//!
//! *Waiting* is two things: [`Carrier::receive`] never sleeps, [`Carrier::wait`] does
//! nothing else. Who spins and who sleeps is the driver's choice.
//!
//! Invariants of every carrier: what comes from outside is bounded before memory is taken
//! for it; a datagram comes out whole or not at all; an error is one of the carrier and
//! not of a datagram or a peer.

mod fallback;
pub mod shared;
pub mod streams;
pub mod udp;

use crate::session::{BulkPort, Hub, MOST_AROUND, MOST_PARTS, Scattered, Transmit};
use crate::time::Instant;
use core::net::SocketAddr;
use std::io::{self, IoSlice, IoSliceMut};
use std::time::Duration;

pub(crate) use fallback::Detour;
pub use fallback::Fallback;
pub use shared::Shared;
pub use streams::{StreamTarget, Streams};
pub use udp::Udp;

/// What a carrier promises beyond doing its best.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Guarantees {
    /// Longest datagram that it takes, bytes.
    pub datagram: usize,
    /// What there was room for arrives in order and once, or the connection ends.
    pub reliable: bool,
}

/// A way for datagrams.
pub trait Carrier {
    /// What it promises.
    fn guarantees(&self) -> Guarantees;

    /// Takes the datagrams that lie behind one another in `datagrams`, each `segment`
    /// bytes long and the last one perhaps shorter (the layout of `UDP_SEGMENT`, `man 7
    /// udp`), to send them at once or at the next [`flush`](Self::flush). What has no room is
    /// lost.
    ///
    /// # Errors
    ///
    /// Those of the carrier itself, after which it carries nothing any more.
    fn send(&mut self, to: SocketAddr, datagrams: &[u8], segment: usize) -> io::Result<()>;

    /// Sends what [`send`](Self::send) has gathered.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Gives datagrams that are there to `take`, until it says that it wants no more or a
    /// batch of the carrier's choice is full; says how many there were. Does not sleep.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn receive(&mut self, take: impl FnMut(Incoming<'_>) -> bool) -> io::Result<usize>;

    /// Sleeps until there may be something to receive, `most` at the longest; says whether
    /// there may be.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn wait(&mut self, most: Duration) -> io::Result<bool>;

    /// Where there is more than one way to a peer, chooses; gives when to be asked again.
    /// The driver asks at each of its turns.
    fn steer(&mut self, now: Instant, hub: &mut Hub) -> Option<Instant> {
        let _ = (now, hub);
        None
    }

    /// Sleeps until there is something to receive, `most` at the longest, and receives it:
    /// as [`wait`](Self::wait) and [`receive`](Self::receive), in fewer system calls where
    /// that can be, and then as exact as the kernel's tick (some milliseconds).
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn receive_sleeping(
        &mut self,
        most: Duration,
        take: impl FnMut(Incoming<'_>) -> bool,
    ) -> io::Result<usize> {
        if self.wait(most)? { self.receive(take) } else { Ok(0) }
    }

    /// Where it takes large payloads apart from everything else, if it does.
    fn bulk(&self) -> Option<BulkPort> {
        None
    }

    /// Datagrams that [`send_bulk`](Self::send_bulk) takes at once; 0 if it has no such way.
    fn bulk_batch(&self) -> usize {
        0
    }

    /// As [`send`](Self::send), by the way for bulk, never cut in pieces by the network; says
    /// whether the datagrams were short enough for the device.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn send_bulk(&mut self, to: SocketAddr, datagrams: &[u8], segment: usize) -> io::Result<bool> {
        self.send(to, datagrams, segment).map(|()| true)
    }

    /// Whether [`send_parts`](Self::send_parts) is better than a copy.
    fn gathers(&self) -> bool {
        false
    }

    /// As [`send_bulk`](Self::send_bulk), of datagrams that lie in parts in several places.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn send_parts(
        &mut self,
        to: SocketAddr,
        parts: &[IoSlice<'_>],
        segment: usize,
    ) -> io::Result<bool> {
        let datagrams: Vec<u8> = parts.iter().flat_map(|part| part.iter()).copied().collect();
        self.send_bulk(to, &datagrams, segment)
    }

    /// As [`receive`](Self::receive), by the way for bulk: one batch.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn receive_bulk(&mut self, _: impl FnMut(Incoming<'_>)) -> io::Result<usize> {
        Ok(0)
    }

    /// Whether [`receive_parts`](Self::receive_parts) is better than a copy.
    fn scatters(&self) -> bool {
        false
    }

    /// As [`receive_bulk`](Self::receive_bulk), one batch, into several places: one after the
    /// other is filled.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn receive_parts(&mut self, _: &mut [IoSliceMut<'_>]) -> io::Result<Option<Scattered>> {
        Ok(None)
    }

    /// As [`wait`](Self::wait), for either way.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn wait_for_either(&mut self, most: Duration) -> io::Result<bool> {
        self.wait(most)
    }
}

/// Gives `send` the parts of what is to be sent.
#[inline(never)]
pub(crate) fn with_parts<T>(
    hub: &Hub,
    transmit: &Transmit,
    buf: &[u8],
    send: impl FnOnce(&[IoSlice<'_>]) -> T,
) -> T {
    let (mut parts, mut count) = ([IoSlice::new(&[]); MOST_PARTS], 0);
    hub.parts(transmit, buf, |part| {
        if let Some(place) = parts.get_mut(count) {
            *place = IoSlice::new(part);
            count += 1;
        }
    });
    send(parts.get(..count).unwrap_or_default())
}

/// Takes one batch by the way for bulk, the payload straight to where it belongs if `hub` knows
/// where; gives how many datagrams there were.
#[inline(never)]
pub(crate) fn receive_placed(
    hub: &mut Hub,
    around: &mut Vec<u8>,
    receive: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<Option<Scattered>>,
    now: impl FnOnce() -> Instant,
) -> io::Result<Option<usize>> {
    let Some(place) = hub.place() else { return Ok(None) };
    around.resize(MOST_AROUND, 0);
    let mut parts: [_; MOST_PARTS] = core::array::from_fn(|_| IoSliceMut::new(&mut []));
    let mut count = 0;
    place.parts(around, |part| {
        if let Some(place) = parts.get_mut(count) {
            *place = IoSliceMut::new(part);
            count += 1;
        }
    });
    match receive(parts.get_mut(..count).unwrap_or_default())? {
        Some(scattered) => Ok(Some(hub.handle_scattered(now(), &scattered, around))),
        None => Ok(Some(0)),
    }
}

/// A datagram that has arrived.
#[derive(Debug)]
pub struct Incoming<'a> {
    /// Where it came from.
    pub from: SocketAddr,
    /// What it holds; the session decrypts it in place.
    pub bytes: &'a mut [u8],
    /// The network has put a congestion mark on it (ECN CE, RFC 3168 §5).
    pub marked: bool,
}
