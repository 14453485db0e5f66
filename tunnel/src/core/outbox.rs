//! Outer datagrams on their way to the network, gathered into batches.
//!
//! A datagram is written straight into the newest batch of its destination, so
//! nothing is copied between encryption and the send call. A batch is a run of
//! datagrams of one length, of which the last may be shorter: what UDP GSO can
//! send in one call (`udp(7)`, UDP_SEGMENT).
//!
//! ```text
//! reserve(to, ecn, expected) ── write ── commit(len)
//!     len = segment     extends the batch
//!     len < segment     extends and closes it
//!     len > segment     begins a new batch (moved there; rare)
//! ```
//!
//! Invariant: datagrams to one destination leave in the order of their commits.

use std::net::{Ipv4Addr, SocketAddr};

use conet_wire::ip::Ecn;

/// Most bytes in a batch: the largest UDP payload over IPv4 (65,507), kept
/// below what a GSO send of the kernel accepts.
const BATCH_BYTES: usize = 65_000;
/// Buffer of a batch; a single datagram may use all of it.
const BUFFER_BYTES: usize = 65_536;
/// Most datagrams in a batch: UDP_MAX_SEGMENTS of kernels before 6.9.
const BATCH_SEGMENTS: usize = 64;
/// Batches after which the engine should send before it encapsulates more.
const BATCHES: usize = 32;
/// Bytes after which it should: what waits shall still be in the processor's cache.
const FULL_BYTES: usize = 128 << 10;

/// Where a batch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// UDP datagrams to an address; the payload is given.
    Udp(SocketAddr),
    /// IPv4 packets to an address; their header is included.
    Ip(Ipv4Addr),
}

/// Where a datagram goes, and how its outer header is marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) to: Destination,
    /// Congestion codepoint; IP packets bear it already.
    pub(crate) ecn: Ecn,
    /// It may be fragmented outside, because its packet may not be dropped.
    pub(crate) may_fragment: bool,
}

impl Way {
    /// To be dropped where it does not fit.
    pub(crate) fn new(to: Destination, ecn: Ecn) -> Self {
        Self { to, ecn, may_fragment: false }
    }
}

/// A batch of datagrams to one destination.
#[derive(Debug)]
pub struct Transmit {
    way: Way,
    segment: usize,
    count: usize,
    closed: bool,
    used: usize,
    buffer: Box<[u8]>,
}

impl Transmit {
    fn new(way: Way) -> Self {
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        Self { way, segment: 0, count: 0, closed: false, used: 0, buffer }
    }

    /// Where it goes.
    pub fn to(&self) -> Destination {
        self.way.to
    }

    /// Whether the datagrams may be fragmented on the way: no DF for UDP; IP packets
    /// have their own.
    pub fn may_fragment(&self) -> bool {
        self.way.may_fragment
    }

    /// Congestion codepoint for the outer header; IP packets bear it already.
    pub fn ecn(&self) -> Ecn {
        self.way.ecn
    }

    /// Length of each datagram but the last, in bytes; at least 1.
    pub fn segment(&self) -> usize {
        self.segment.max(1)
    }

    /// The datagrams, one after the other.
    pub fn contents(&self) -> &[u8] {
        &self.buffer[..self.used]
    }

    /// The datagrams one by one.
    pub fn datagrams(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.contents().chunks(self.segment())
    }
}

/// All batches that wait to be sent.
#[derive(Debug, Default)]
pub struct Outbox {
    // The first `used` are live, in order; the rest are spare buffers.
    transmits: Vec<Transmit>,
    used: usize,
    // Batch and offset of the reservation in progress.
    reserved: (usize, usize),
    bytes: usize,
}

impl Outbox {
    /// An empty outbox; it allocates buffers as they are first needed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Space of `space` bytes for a datagram that goes `way`, probably `expected` long.
    /// `space` is at most 65,536; [`Outbox::commit`] follows, or another
    /// reservation that takes this one's place.
    pub(crate) fn reserve(&mut self, way: Way, expected: usize, space: usize) -> &mut [u8] {
        let newest = self.transmits[..self.used].iter().rposition(|t| t.way.to == way.to);
        let fitting = newest.filter(|&i| {
            let t = &self.transmits[i];
            // An abandoned reservation left it empty: it takes anything.
            t.count == 0
                || (!t.closed
                    && t.way == way
                    && expected <= t.segment
                    && t.count < BATCH_SEGMENTS
                    && t.used + space <= BATCH_BYTES)
        });
        let index = match fitting {
            Some(index) => index,
            None => self.begin(way),
        };
        let offset = self.transmits[index].used;
        self.transmits[index].way = way;
        self.reserved = (index, offset);
        &mut self.transmits[index].buffer[offset..offset + space]
    }

    /// Makes the first `len` bytes of the reserved space a datagram.
    pub(crate) fn commit(&mut self, len: usize) {
        let (index, offset) = self.reserved;
        self.bytes += len;
        let batch = &mut self.transmits[index];
        if batch.count > 0 && len > batch.segment {
            // The guess was too low: it cannot join this batch.
            let way = batch.way;
            let new = self.begin(way);
            let (old, rest) = self.transmits.split_at_mut(new);
            rest[0].buffer[..len].copy_from_slice(&old[index].buffer[offset..offset + len]);
            rest[0].append(len);
        } else {
            batch.append(len);
        }
    }

    /// The batches, oldest first. One that was reserved but never committed is
    /// empty and left out.
    pub fn transmits(&self) -> impl Iterator<Item = &Transmit> {
        self.transmits[..self.used].iter().filter(|t| t.count > 0)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.transmits().next().is_none()
    }

    /// Whether it is time to send.
    pub fn is_full(&self) -> bool {
        self.used >= BATCHES || self.bytes >= FULL_BYTES
    }

    /// Forgets all batches and keeps their buffers.
    pub fn clear(&mut self) {
        (self.used, self.bytes) = (0, 0);
        self.transmits.truncate(BATCHES);
    }

    fn begin(&mut self, way: Way) -> usize {
        let index = self.used;
        match self.transmits.get_mut(index) {
            Some(spare) => {
                (spare.way, spare.closed) = (way, false);
                (spare.segment, spare.count, spare.used) = (0, 0, 0);
            }
            None => self.transmits.push(Transmit::new(way)),
        }
        self.used += 1;
        index
    }
}

impl Transmit {
    fn append(&mut self, len: usize) {
        if self.count == 0 {
            self.segment = len;
        }
        self.closed |= len < self.segment;
        self.used += len;
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp(port: u16) -> Destination {
        Destination::Udp(SocketAddr::from(([192, 0, 2, 1], port)))
    }

    fn put(out: &mut Outbox, to: Destination, guess: usize, bytes: &[u8]) {
        let space = out.reserve(Way::new(to, Ecn::NotEct), guess, bytes.len().max(148));
        space[..bytes.len()].copy_from_slice(bytes);
        out.commit(bytes.len());
    }

    fn shape(out: &Outbox) -> Vec<(Destination, Vec<usize>)> {
        out.transmits().map(|t| (t.to(), t.datagrams().map(<[u8]>::len).collect())).collect()
    }

    #[test]
    fn equal_lengths_share_a_batch_and_a_shorter_one_closes_it() {
        let mut out = Outbox::new();
        for len in [100, 100, 60, 60] {
            put(&mut out, udp(1), len, &vec![7; len]);
        }
        assert_eq!(shape(&out), [(udp(1), vec![100, 100, 60]), (udp(1), vec![60])]);
        out.clear();
        assert!(out.is_empty());
        put(&mut out, udp(2), 9, b"nine byte");
        assert_eq!(shape(&out), [(udp(2), vec![9])]);
    }

    #[test]
    fn a_wrong_guess_moves_to_a_batch_of_its_own() {
        let mut out = Outbox::new();
        put(&mut out, udp(1), 60, &[1; 60]);
        put(&mut out, udp(1), 0, &[2; 148]);
        put(&mut out, udp(1), 148, &[3; 148]);
        assert_eq!(shape(&out), [(udp(1), vec![60]), (udp(1), vec![148, 148])]);
        let all: Vec<u8> = out.transmits().flat_map(|t| t.contents().to_vec()).collect();
        assert_eq!((all[59], all[60], all[208]), (1, 2, 3));
    }

    #[test]
    fn destinations_and_marks_do_not_mix_and_abandoned_space_is_not_sent() {
        let mut out = Outbox::new();
        put(&mut out, udp(1), 60, &[1; 60]);
        put(&mut out, udp(2), 60, &[1; 60]);
        put(&mut out, udp(1), 60, &[1; 60]);
        out.reserve(Way::new(udp(1), Ecn::Ce), 60, 148)[..60].fill(1);
        out.commit(60);
        out.reserve(Way::new(udp(3), Ecn::NotEct), 60, 148).fill(9);
        assert_eq!(shape(&out), [(udp(1), vec![60, 60]), (udp(2), vec![60]), (udp(1), vec![60])]);
    }

    #[test]
    fn a_batch_stays_within_what_one_send_takes() {
        let mut out = Outbox::new();
        for _ in 0..100 {
            put(&mut out, udp(1), 1452, &[5; 1452]);
        }
        for batch in out.transmits() {
            assert!(batch.contents().len() <= BATCH_BYTES);
            assert!(batch.datagrams().len() <= BATCH_SEGMENTS);
        }
        assert_eq!(out.transmits().map(|t| t.datagrams().len()).sum::<usize>(), 100);
    }
}
