//! Loss recovery and congestion control for tracked packets.
//!
//! RFC 9002 §6 with LAN constants: packet threshold 3, time threshold 9/8 of a
//! round trip, probe timeouts; §7 for the window, which starts at 32 packets,
//! grows as NewReno's and is capped. Only packets whose loss nobody else notices are
//! tracked: pieces of large payloads, and replies to calls that waited. Small
//! calls are repeated by the client instead, and their reply is the
//! acknowledgement.
//!
//! A congestion mark (RFC 3168) shrinks the window as a loss does, once per round trip,
//! but by less (RFC 8511 §3: 0.8). It stops growing while the latest round trip is so
//! much longer than the shortest one that a queue must be standing.
//!
//! Invariants: every tracked packet ends as acknowledged or lost, once; bytes in
//! flight are the sum of the packets that have not ended; memory is bounded by
//! the window's cap.

use super::rtt::Rtt;
use crate::time::Instant;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use conet_wire::session::frame::{Direction, SEEN_WORDS, Seen};
use core::ops::Range;
use core::time::Duration;

/// Later packets acknowledged before an earlier one counts as lost.
const PACKET_THRESHOLD: u64 = 3;
/// First window, packets. QUIC takes 10 for the Internet; on a LAN 32 full packets
/// are 36 µs of a 10 Gbit/s link.
const INITIAL_PACKETS: usize = 32;
const LEAST_PACKETS: usize = 4;
/// Cap, packets: below the 256 numbers that one ACK can tell about, and within
/// Linux's default receive buffer twice over.
const MOST_PACKETS: usize = 128;
/// The same where the peer sends SEEN, which tells about 1,024 numbers.
const MOST_PACKETS_WIDE: usize = 768;
/// Packets of one probe (RFC 9002 §6.2.4).
const PROBES: usize = 2;
/// Probe timeouts in a row after which everything counts as lost (RFC 9002 §7.6.1: 3).
const PERSISTENT: u32 = 3;
/// Least probe timeout where more than [`FEW`] bytes are on their way: a peer that shares
/// its processor answers after two slices of the scheduler (as Linux's tail loss probe).
const LEAST_PROBE: Duration = Duration::from_millis(10);
/// So few bytes are sent once too often sooner than waited for.
const FEW: usize = 24 * 1024;
/// Queueing delay that is no reason to stop growing: a scheduler's tick costs as much.
const QUEUE_TARGET: Duration = Duration::from_millis(2);

/// What a tracked packet carries.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Tracked {
    /// A piece of a payload.
    Piece { direction: Direction, slot: u16, sequence: u64, range: Range<usize> },
    /// A whole reply to a call that was told to wait.
    Reply { slot: u16, sequence: u64 },
}

#[derive(Debug)]
struct Sent {
    number: u64,
    /// Counts tracked packets only: others share the packet numbers.
    order: u64,
    at: Instant,
    bytes: usize,
    what: Tracked,
    by_bulk: bool,
}

/// By which ways packets went that have arrived.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Arrived {
    pub(crate) by_calls: bool,
    pub(crate) by_bulk: bool,
}

/// Tracked packets that ended, and whether each arrived.
pub(crate) type Fates = Vec<(Tracked, bool)>;

/// The sending side of tracked packets.
#[derive(Debug)]
pub(crate) struct Flow {
    sent: VecDeque<Sent>,
    in_flight: usize,
    window: usize,
    threshold: usize,
    packet: usize,
    next_order: u64,
    /// One more than the highest acknowledged order.
    acked_order: u64,
    /// Losses below this order belong to a reduction that has happened.
    recovery_order: u64,
    probes: u32,
    probe_from: Instant,
    /// Packets that may go though the window is full: a probe that waits for room in the
    /// window would wait for the acknowledgement that it is to bring.
    credit: usize,
    most: usize,
    /// Congestion marks that the peer has counted.
    marked: u32,
    shortest: Option<Duration>,
    /// Bytes that the peer's socket holds.
    buffer: usize,
}

impl Flow {
    /// For packets of `packet` bytes at most.
    pub(crate) fn new(packet: usize) -> Self {
        Self {
            sent: VecDeque::new(),
            in_flight: 0,
            window: packet * INITIAL_PACKETS,
            threshold: usize::MAX,
            packet,
            next_order: 0,
            acked_order: 0,
            recovery_order: 0,
            probes: 0,
            probe_from: Instant::START,
            credit: 0,
            most: MOST_PACKETS,
            marked: 0,
            shortest: None,
            buffer: usize::MAX,
        }
    }

    /// Packets of `packet` bytes at most from now on, and no more of them on their way than
    /// the peer's socket holds.
    pub(crate) fn set_path(&mut self, packet: usize, buffer: usize) {
        if packet > self.packet {
            // A window of less than that would be none.
            self.window = self.window.max(packet * LEAST_PACKETS);
        }
        self.packet = packet;
        self.buffer = buffer.max(packet);
    }

    /// Whether everything that was sent has been answered of late: no probe timeout has
    /// passed since.
    pub(crate) const fn is_quiet(&self) -> bool {
        self.probes == 0
    }

    /// The peer acknowledges by SEEN.
    pub(crate) const fn widen(&mut self) {
        self.most = MOST_PACKETS_WIDE;
    }

    /// Whether the window has room for one more packet.
    pub(crate) fn may_send(&self) -> bool {
        (self.in_flight + self.packet <= self.window.min(self.buffer) || self.credit > 0)
            && self.sent.len() < self.most
    }

    /// `by_bulk`: by the way for bulk.
    pub(crate) fn on_sent(
        &mut self,
        now: Instant,
        number: u64,
        bytes: usize,
        what: Tracked,
        by_bulk: bool,
    ) {
        if self.sent.is_empty() {
            self.probe_from = now;
        }
        let order = self.next_order;
        self.sent.push_back(Sent { number, order, at: now, bytes, what, by_bulk });
        self.next_order += 1;
        self.in_flight += bytes;
        if self.in_flight > self.window {
            self.credit = self.credit.saturating_sub(1);
        }
    }

    /// Takes an acknowledgement; says by which ways what is new in it had gone.
    pub(crate) fn on_ack(
        &mut self,
        now: Instant,
        ack: &Seen,
        rtt: &mut Rtt,
        fates: &mut Fates,
    ) -> Arrived {
        let (mut grown, mut arrived) = (0, Arrived::default());
        let (acked_order, in_flight) = (&mut self.acked_order, &mut self.in_flight);
        let shortest = &mut self.shortest;
        self.sent.retain(|sent| {
            if !ack.covers(sent.number) {
                return true;
            }
            if sent.number == ack.largest {
                let delay = Duration::from_micros(ack.delay_us.into());
                let whole = now.since(sent.at);
                let sample = whole.saturating_sub(delay.min(whole / 2));
                rtt.on_sample(sample);
                *shortest = Some(shortest.map_or(sample, |shortest| shortest.min(sample)));
            }
            *acked_order = (*acked_order).max(sent.order + 1);
            *in_flight -= sent.bytes;
            grown += sent.bytes;
            *(if sent.by_bulk { &mut arrived.by_bulk } else { &mut arrived.by_calls }) = true;
            fates.push((sent.what.clone(), true));
            false
        });
        if grown > 0 {
            let new_marks = ack.marked.wrapping_sub(self.marked);
            // A count that went back belongs to an older frame.
            if new_marks != 0 && new_marks < u32::MAX / 2 {
                self.marked = ack.marked;
                self.shrink(self.acked_order.saturating_sub(1), 4, 5);
            } else if !self.is_queueing(rtt) {
                self.grow(grown);
            }
            self.probes = 0;
            self.probe_from = now;
            self.find_losses(now, rtt, fates);
        }
        arrived
    }

    fn is_queueing(&self, rtt: &Rtt) -> bool {
        self.shortest.is_some_and(|shortest| rtt.latest() > shortest * 2 + QUEUE_TARGET)
    }

    fn grow(&mut self, bytes: usize) {
        self.window +=
            if self.window < self.threshold { bytes } else { self.packet * bytes / self.window };
        self.window = self.window.min(self.packet * self.most);
    }

    /// Makes the window smaller for an event at `order`, unless that belongs to a
    /// reduction that has happened.
    fn shrink(&mut self, order: u64, numerator: usize, denominator: usize) {
        if order >= self.recovery_order {
            self.recovery_order = self.next_order;
            self.threshold =
                (self.window * numerator / denominator).max(self.packet * LEAST_PACKETS);
            self.window = self.threshold;
        }
    }

    fn find_losses(&mut self, now: Instant, rtt: &Rtt, fates: &mut Fates) {
        let delay = rtt.loss_delay();
        let (acked_order, in_flight) = (self.acked_order, &mut self.in_flight);
        let mut newest = None;
        self.sent.retain(|sent| {
            let late = sent.order < acked_order
                && (sent.order + PACKET_THRESHOLD < acked_order || now.since(sent.at) >= delay);
            if late {
                *in_flight -= sent.bytes;
                newest = Some(sent.order);
                fates.push((sent.what.clone(), false));
            }
            !late
        });
        if let Some(order) = newest {
            self.shrink(order, 1, 2);
        }
    }

    /// When [`handle_timeout`](Self::handle_timeout) has something to do.
    #[inline]
    pub(crate) fn deadline(&self, rtt: &Rtt) -> Option<Instant> {
        if self.sent.is_empty() { None } else { self.next_deadline(rtt) }
    }

    fn next_deadline(&self, rtt: &Rtt) -> Option<Instant> {
        let first = self.sent.front()?;
        let late = (first.order < self.acked_order).then(|| first.at + rtt.loss_delay());
        let least = if self.in_flight <= FEW { Duration::ZERO } else { LEAST_PROBE };
        let pause = rtt.probe_timeout().max(least) * 2u32.saturating_pow(self.probes.min(10));
        let probe = self.probe_from + pause.min(super::rtt::PROBE);
        Some(late.map_or(probe, |late| late.min(probe)))
    }

    /// Gives up packets that are late. Where nothing was heard for a probe timeout, gives
    /// up the oldest two, which may be sent again whatever the window says; and all of
    /// them at the third such time (RFC 9002 §7.6: persistent congestion).
    pub(crate) fn handle_timeout(&mut self, now: Instant, rtt: &Rtt, fates: &mut Fates) {
        if self.deadline(rtt).is_none_or(|deadline| deadline > now) {
            return;
        }
        let before = fates.len();
        self.find_losses(now, rtt, fates);
        if fates.len() == before {
            self.probes += 1;
            let most = if self.probes == PERSISTENT { self.sent.len() } else { PROBES };
            for sent in self.sent.drain(..self.sent.len().min(most)) {
                self.in_flight -= sent.bytes;
                fates.push((sent.what, false));
            }
            self.credit = PROBES;
            self.probe_from = now;
            if self.probes == PERSISTENT {
                self.threshold = (self.window / 2).max(self.packet * LEAST_PACKETS);
                self.window = self.packet * LEAST_PACKETS;
            }
        }
    }

    /// Forgets what was learned about the path, and everything in flight, which is
    /// given back as lost.
    pub(crate) fn restart(&mut self, fates: &mut Fates) {
        fates.extend(self.sent.drain(..).map(|sent| (sent.what, false)));
        let sent = core::mem::take(&mut self.sent);
        *self = Self { sent, most: self.most, ..Self::new(self.packet) };
    }
}

/// The receiving side: which tracked packets have arrived.
#[derive(Debug, Default)]
pub(crate) struct Arrivals {
    ack: Seen,
    any: bool,
    /// Packets that have arrived since the last acknowledgement, and when the first did.
    due: u32,
    due_by_calls: bool,
    since: Instant,
    at: Instant,
}

/// Packets by the way for bulk that one acknowledgement tells of (RFC 9000 §13.2.2: 2); no
/// window is smaller. Others are one, or few, and somebody may wait for them.
const TOGETHER: u32 = 2;
/// The same beside calls, where it goes with an answer.
const TOGETHER_BESIDE_CALLS: u32 = 4;
/// How long it waits for these, or for an answer: some calls' time, a fraction of what a probe
/// waits for.
const MOST_DELAY: Duration = Duration::from_micros(50);

impl Arrivals {
    /// Tracked packet `number` arrived and was taken.
    pub(crate) fn on_tracked(&mut self, now: Instant, number: u64, marked: bool, by_bulk: bool) {
        if self.due == 0 {
            self.since = now;
        }
        self.due = self.due.saturating_add(1);
        self.due_by_calls |= !by_bulk;
        self.ack.marked = self.ack.marked.wrapping_add(marked.into());
        if !self.any {
            self.ack.largest = number;
            self.any = true;
            self.at = now;
        } else if let Some(ahead) = number.checked_sub(self.ack.largest).filter(|&n| n > 0) {
            self.ack.bitmap = shift(self.ack.bitmap, ahead);
            self.set(ahead - 1);
            self.ack.largest = number;
            self.at = now;
        } else if let Some(below) = self.ack.largest.checked_sub(number).filter(|&n| n > 0) {
            self.set(below - 1);
        }
    }

    fn set(&mut self, bit: u64) {
        let word = usize::try_from(bit / 64).ok().and_then(|at| self.ack.bitmap.get_mut(at));
        if let Some(word) = word {
            *word |= 1 << (bit % 64);
        }
    }

    /// Whether there is something to acknowledge.
    #[inline]
    pub(crate) const fn is_due(&self) -> bool {
        self.due > 0
    }

    /// When an acknowledgement goes by itself: before that it could go with an answer, or tell
    /// of more.
    pub(crate) fn alone_at(&self, beside_calls: bool) -> Instant {
        let together = match (beside_calls, self.due_by_calls) {
            (true, _) => TOGETHER_BESIDE_CALLS,
            (false, false) => TOGETHER,
            (false, true) => 0,
        };
        if self.due < together { self.since + MOST_DELAY } else { Instant::START }
    }

    /// The acknowledgement to send; none is due afterwards.
    pub(crate) fn take(&mut self, now: Instant) -> Seen {
        self.due = 0;
        self.due_by_calls = false;
        let delay = now.since(self.at).as_micros();
        Seen { delay_us: u32::try_from(delay).unwrap_or(u32::MAX), ..self.ack }
    }
}

/// The number `bitmap`, shifted left by `by`.
fn shift(bitmap: [u64; SEEN_WORDS], by: u64) -> [u64; SEEN_WORDS] {
    let mut shifted = [0; SEEN_WORDS];
    if let 1..64 = by {
        // Nearly always by one.
        let mut carried = 0;
        for (to, word) in shifted.iter_mut().zip(bitmap) {
            *to = word << by | carried;
            carried = word >> (64 - by);
        }
        return shifted;
    }
    let Ok(by) = usize::try_from(by) else { return shifted };
    let (words, bits) = (by / 64, by % 64);
    for (at, word) in shifted.iter_mut().enumerate() {
        let from = |at: Option<usize>| at.and_then(|at| bitmap.get(at)).copied().unwrap_or(0);
        let low = from(at.checked_sub(words));
        let high = from(at.checked_sub(words + 1));
        *word = low << bits | if bits == 0 { 0 } else { high >> (64 - bits) };
    }
    shifted
}

#[cfg(test)]
mod tests;
