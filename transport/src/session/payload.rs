//! A payload on its way in pieces: which parts went, arrived or were lost.
//!
//! Pieces begin at multiples of [`UNIT`] and are multiples of it long, but for the
//! last, so that one bit per unit says everything: 2 KiB for 1 MiB, however
//! cleverly a peer cuts its pieces.
//!
//! A sender may send the first [`UNASKED`] bytes at once and the rest when the receiver
//! has granted it (as in Homa: Montazeri et al., SIGCOMM 2018, §3.3). The receiver grants
//! a payload when it has memory for it, the shortest first.
//!
//! Invariants: an [`Assembly`] is complete when every byte was written, and each
//! byte keeps its first value; an [`Outgoing`] never gives out an acknowledged
//! unit again.

use super::budget::Taken;
use super::image::{ImageError, Reader, Writer};
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Granularity of pieces, bytes; part of the protocol.
pub(crate) const UNIT: usize = 64;

/// Bytes of a payload that may be sent before the receiver has granted them: about what
/// a 10 Gbit/s link carries in a round trip of a LAN.
pub(crate) const UNASKED: usize = 64 * 1024;

/// Which units of a payload are marked.
#[derive(Debug)]
struct Units {
    words: Vec<u64>,
    missing: usize,
}

impl Units {
    fn new(bytes: usize) -> Self {
        let units = bytes.div_ceil(UNIT);
        Self { words: vec![0; units.div_ceil(64)], missing: units }
    }

    fn is_marked(&self, unit: usize) -> bool {
        self.words.get(unit / 64).is_some_and(|word| word >> (unit % 64) & 1 == 1)
    }

    /// Marks units; says how many were not marked before.
    fn mark(&mut self, units: Range<usize>) -> usize {
        let mut marked = 0;
        for (at, mask) in masks(units) {
            let Some(word) = self.words.get_mut(at) else { break };
            marked += (mask & !*word).count_ones() as usize;
            *word |= mask;
        }
        self.missing -= marked;
        marked
    }

    /// The first of `units` that is marked, or that is not.
    fn find(&self, units: Range<usize>, marked: bool) -> Option<usize> {
        for (at, mask) in masks(units) {
            let word = *self.words.get(at)?;
            let found = mask & if marked { word } else { !word };
            if found != 0 {
                return Some(at * 64 + found.trailing_zeros() as usize);
            }
        }
        None
    }
}

/// Words, and which of their bits belong to `units`.
fn masks(units: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let words = if units.is_empty() { 0..0 } else { units.start / 64..units.end.div_ceil(64) };
    words.map(move |at| {
        let from = units.start.saturating_sub(at * 64);
        let beyond = (at * 64 + 64).saturating_sub(units.end);
        (at, u64::MAX << from & u64::MAX >> beyond)
    })
}

impl Units {
    fn freeze(&self, out: &mut Writer) {
        out.words(&self.words);
    }

    fn thaw(bytes: usize, from: &mut Reader<'_>) -> Result<Self, ImageError> {
        let words = from.words()?;
        let units = bytes.div_ceil(UNIT);
        let beyond =
            words.last().is_some_and(|last| !units.is_multiple_of(64) && last >> (units % 64) != 0);
        let marked: usize = words.iter().map(|word| word.count_ones() as usize).sum();
        if words.len() != units.div_ceil(64) || beyond {
            return Err(ImageError::Malformed);
        }
        Ok(Self { words, missing: units - marked })
    }

    /// Bytes of the marked units of a payload.
    fn marked_bytes(&self, bytes: usize) -> usize {
        let marked = (0..bytes.div_ceil(UNIT)).filter(|&unit| self.is_marked(unit));
        marked.map(|unit| UNIT.min(bytes - unit * UNIT)).sum()
    }
}

/// A piece lies outside its payload or off the units; the peer's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct BadPiece;

/// What has come of a piece.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Data<'a> {
    /// These bytes.
    Here(&'a [u8]),
    /// So many, which stand in [`Assembly::room`] already.
    InPlace(usize),
}

impl Data<'_> {
    pub(crate) const fn len(&self) -> usize {
        match self {
            Self::Here(bytes) => bytes.len(),
            Self::InPlace(length) => *length,
        }
    }
}

/// A payload that arrives.
#[derive(Debug)]
pub(crate) struct Assembly {
    /// Unmarked units may hold anything.
    bytes: Vec<u8>,
    total: usize,
    have: Units,
    /// Bytes that may come; the caller has set memory aside for so many.
    granted: usize,
    received: usize,
    /// Room for it until it is answered.
    pub(crate) taken: Option<Taken>,
    /// Nothing behind it is marked.
    reached: usize,
    /// What [`Self::room`] gave last: only there may bytes stand already.
    given: Range<usize>,
    /// All of it was granted at the beginning, as to a sender that waits for no grant; what the
    /// keys in use allow may have changed since.
    pub(crate) is_whole: bool,
}

impl Assembly {
    /// For `total` bytes, the first `granted` of which may come; the caller has checked
    /// its budget for these.
    ///
    /// `bytes` is a buffer that was used before, or none.
    pub(crate) fn new(total: usize, granted: usize, mut bytes: Vec<u8>) -> Self {
        let granted = granted.min(total);
        bytes.truncate(total);
        Self {
            bytes,
            total,
            have: Units::new(total),
            granted,
            received: 0,
            reached: 0,
            given: 0..0,
            is_whole: false,
            taken: None,
        }
    }

    pub(crate) const fn total(&self) -> usize {
        self.total
    }

    pub(crate) const fn granted(&self) -> usize {
        self.granted
    }

    pub(crate) const fn grant(&mut self) {
        self.granted = self.total;
    }

    /// Writes a piece where nothing was written yet.
    pub(crate) fn insert(&mut self, offset: usize, piece: Data<'_>) -> Result<(), BadPiece> {
        let end = offset.checked_add(piece.len()).ok_or(BadPiece)?;
        let aligned =
            offset.is_multiple_of(UNIT) && (piece.len().is_multiple_of(UNIT) || end == self.total);
        if !aligned || end > self.granted {
            return Err(BadPiece);
        }
        let units = offset / UNIT..end.div_ceil(UNIT);
        let piece = match piece {
            Data::Here(bytes) => bytes,
            Data::InPlace(length) => {
                let is_given = self.given.start <= offset && end <= self.given.end;
                if !is_given || self.have.find(units.clone(), true).is_some() {
                    return Err(BadPiece);
                }
                self.have.mark(units);
                self.received += length;
                self.reached = self.reached.max(end);
                return Ok(());
            }
        };
        self.reached = self.reached.max(end);
        if self.bytes.capacity() < end {
            // In one step, once the rest is granted.
            self.bytes.reserve_exact(self.granted - self.bytes.len());
        }
        if self.have.find(units.clone(), true).is_none() {
            self.have.mark(units);
            self.received += piece.len();
            return self.write(offset, piece);
        }
        for (unit, from) in units.zip(piece.chunks(UNIT)) {
            if self.have.mark(unit..unit + 1) > 0 {
                self.received += from.len();
                self.write(unit * UNIT, from)?;
            }
        }
        Ok(())
    }

    /// Writes bytes that have room.
    fn write(&mut self, offset: usize, piece: &[u8]) -> Result<(), BadPiece> {
        if offset == self.bytes.len() {
            self.bytes.extend_from_slice(piece);
            return Ok(());
        }
        let end = offset + piece.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes.get_mut(offset..end).ok_or(BadPiece)?.copy_from_slice(piece);
        Ok(())
    }

    /// Where bytes from `offset` on belong, up to `most` of them, as far as nothing has come
    /// there and it is granted.
    pub(crate) fn room(&mut self, offset: usize, most: usize) -> Option<&mut [u8]> {
        let end = offset.checked_add(most)?.min(self.granted);
        if !offset.is_multiple_of(UNIT) || offset >= end {
            return None;
        }
        let end = match self.have.find(offset / UNIT..end.div_ceil(UNIT), true) {
            Some(unit) => unit * UNIT,
            None => end,
        };
        if self.bytes.len() < end {
            if self.bytes.capacity() < end {
                self.bytes.reserve_exact(self.granted - self.bytes.len());
            }
            self.bytes.resize(end, 0);
        }
        self.given = offset..end;
        self.bytes.get_mut(offset..end).filter(|room| !room.is_empty())
    }

    pub(crate) const fn is_complete(&self) -> bool {
        self.have.missing == 0
    }

    pub(crate) fn freeze(&self, out: &mut Writer) {
        out.count(self.total);
        out.count(self.granted);
        self.have.freeze(out);
        out.bytes(self.bytes.get(..self.reached).unwrap_or(&self.bytes));
    }

    pub(crate) fn thaw(from: &mut Reader<'_>) -> Result<Self, ImageError> {
        let (total, granted) = (from.u32()? as usize, from.u32()? as usize);
        let have = Units::thaw(total, from)?;
        let bytes = from.bytes()?.to_vec();
        let received = have.marked_bytes(total);
        let good = granted <= total
            && bytes.len() <= granted
            && (bytes.len().div_ceil(UNIT)..total.div_ceil(UNIT)).all(|unit| !have.is_marked(unit));
        if good {
            let reached = bytes.len();
            let (given, is_whole, taken) = (0..0, false, None);
            Ok(Self { bytes, total, have, granted, received, reached, given, is_whole, taken })
        } else {
            Err(ImageError::Malformed)
        }
    }

    /// The payload, whole or not.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// A payload that leaves.
#[derive(Debug)]
pub(crate) struct Outgoing {
    bytes: Vec<u8>,
    acked: Units,
    /// Where unsent bytes begin; a multiple of [`UNIT`], or the end.
    next: usize,
    lost: VecDeque<Range<usize>>,
    granted: usize,
    acked_bytes: usize,
    /// Room for it as long as it is kept.
    pub(crate) taken: Option<Taken>,
}

impl Outgoing {
    /// `granted` bytes may be sent now.
    pub(crate) fn new(bytes: Vec<u8>, granted: usize) -> Self {
        let acked = Units::new(bytes.len());
        let lost = VecDeque::new();
        Self { bytes, acked, next: 0, lost, granted, acked_bytes: 0, taken: None }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    pub(crate) fn freeze(&self, out: &mut Writer) {
        out.bytes(&self.bytes);
        self.acked.freeze(out);
        out.u64(self.granted as u64);
    }

    /// As it was, but that nothing is on its way.
    pub(crate) fn thaw(from: &mut Reader<'_>) -> Result<Self, ImageError> {
        let bytes = from.bytes()?.to_vec();
        let acked = Units::thaw(bytes.len(), from)?;
        let granted = usize::try_from(from.u64()?).map_err(|_| ImageError::Malformed)?;
        let acked_bytes = acked.marked_bytes(bytes.len());
        let lost = VecDeque::new();
        Ok(Self { bytes, acked, next: 0, lost, granted, acked_bytes, taken: None })
    }

    /// More may be sent; says whether that was new.
    pub(crate) fn on_grant(&mut self, upto: usize) -> bool {
        let more = upto > self.granted;
        self.granted = self.granted.max(upto);
        more
    }

    /// Whether a piece waits to be sent, for the first time or again.
    pub(crate) fn has_piece(&self) -> bool {
        !self.lost.is_empty() || self.next < self.end()
    }

    /// Whether all that may be sent has arrived, and there is more.
    pub(crate) const fn waits_for_grant(&self) -> bool {
        self.acked.missing > 0
            && self.granted < self.bytes.len()
            && self.acked_bytes >= self.granted - self.granted % UNIT
    }

    fn end(&self) -> usize {
        let granted = self.granted.min(self.bytes.len());
        if granted == self.bytes.len() { granted } else { granted - granted % UNIT }
    }

    /// Bytes that have not arrived.
    pub(crate) const fn remaining(&self) -> usize {
        self.bytes.len() - self.acked_bytes
    }

    pub(crate) const fn is_acked(&self) -> bool {
        self.acked.missing == 0
    }

    /// Takes the next piece of `room` bytes at most; lost ones first.
    pub(crate) fn take_piece(&mut self, room: usize) -> Option<Range<usize>> {
        let room = room - room % UNIT;
        if room == 0 {
            return None;
        }
        while let Some(lost) = self.lost.pop_front() {
            if let Some(piece) = self.unacked(lost.clone(), room) {
                if piece.end < lost.end {
                    self.lost.push_front(piece.end..lost.end);
                }
                return Some(piece);
            }
        }
        let end = self.end();
        let piece = self.unacked(self.next.min(end)..end, room);
        self.next = self.next.max(piece.as_ref().map_or(end, |piece| piece.end));
        piece
    }

    /// The first run of unacknowledged units in `within`, `room` bytes at most.
    fn unacked(&self, within: Range<usize>, room: usize) -> Option<Range<usize>> {
        let units = within.start / UNIT..within.end.div_ceil(UNIT);
        let first = self.acked.find(units.clone(), false)?;
        let most = units.end.min(first + room / UNIT);
        let end = self.acked.find(first..most, true).unwrap_or(most);
        Some(first * UNIT..(end * UNIT).min(self.bytes.len()))
    }

    pub(crate) fn on_acked(&mut self, piece: Range<usize>) {
        let units = piece.start / UNIT..piece.end.div_ceil(UNIT);
        // The last unit of a payload may be a short one.
        let last = self.bytes.len() / UNIT;
        let missing = if self.bytes.len().is_multiple_of(UNIT)
            || !units.contains(&last)
            || self.acked.is_marked(last)
        {
            0
        } else {
            UNIT - self.bytes.len() % UNIT
        };
        self.acked_bytes += self.acked.mark(units) * UNIT - missing;
    }

    pub(crate) fn on_lost(&mut self, piece: Range<usize>) {
        self.lost.push_back(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pieces_off_the_units_or_behind_the_end_are_refused() {
        let mut assembly = Assembly::new(200, 200, Vec::new());
        for (offset, length, good) in [
            (1, 64, false),
            (64, 63, false),
            (192, 9, false),
            (192, 8, true),
            (256, 0, false),
            (usize::MAX, 64, false),
            (0, 64, true),
            (64, 136, true),
        ] {
            assert_eq!(
                assembly.insert(offset, Data::Here(&vec![1; length])).is_ok(),
                good,
                "{offset}+{length}"
            );
        }
        assert!(!assembly.is_complete() || assembly.bytes.iter().all(|&byte| byte == 1));
    }

    #[test]
    fn what_was_not_granted_is_not_taken_and_takes_no_memory() {
        let mut assembly = Assembly::new(1 << 30, 128, Vec::new());
        assert!(assembly.insert(0, Data::Here(&[1; 128])).is_ok());
        assert_eq!(assembly.insert(128, Data::Here(&[1; 64])), Err(BadPiece));
        assert!(assembly.bytes.capacity() <= 256);
        assembly.grant();
        assert_eq!(assembly.granted(), assembly.total());
    }

    #[test]
    fn masks_cover_exactly_their_units() {
        for (start, end) in [(0, 0), (0, 1), (0, 64), (63, 65), (5, 200), (64, 128), (130, 131)] {
            let units: Vec<usize> = masks(start..end)
                .flat_map(|(at, mask)| {
                    (0..64).filter(move |bit| mask >> bit & 1 == 1).map(move |bit| at * 64 + bit)
                })
                .collect();
            assert_eq!(units, (start..end).collect::<Vec<_>>(), "{start}..{end}");
        }
    }

    #[test]
    fn an_empty_payload_is_complete_at_once() {
        assert!(Assembly::new(0, 0, Vec::new()).is_complete());
        assert!(Outgoing::new(Vec::new(), 0).is_acked());
        assert!(!Outgoing::new(Vec::new(), 0).has_piece());
    }

    #[test]
    fn bytes_keep_their_first_value() {
        let mut assembly = Assembly::new(64, 64, Vec::new());
        assembly.insert(0, Data::Here(&[1; 64])).expect("fits");
        assembly.insert(0, Data::Here(&[2; 64])).expect("fits");
        assert_eq!(assembly.into_bytes(), [1; 64]);
    }

    proptest! {
        #[test]
        fn everything_arrives_whatever_is_lost(
            length in 0usize..20_000,
            room in 64usize..3000,
            granted in 0usize..20_000,
            fates in prop::collection::vec(0u8..4, 2000),
        ) {
            let payload: Vec<u8> = (0..=250).cycle().take(length).collect();
            let mut outgoing = Outgoing::new(payload.clone(), granted);
            let mut assembly = Assembly::new(length, length, Vec::new());
            let mut fates = fates.into_iter().chain(core::iter::repeat(3));
            loop {
                let Some(piece) = outgoing.take_piece(room) else {
                    prop_assert_eq!(outgoing.is_acked(), !outgoing.waits_for_grant());
                    if outgoing.is_acked() {
                        break;
                    }
                    prop_assert!(outgoing.on_grant(length));
                    continue;
                };
                prop_assert!(piece.len() <= room && !piece.is_empty());
                match fates.next() {
                    Some(0) => outgoing.on_lost(piece),
                    // Arrived, but the acknowledgement is lost.
                    Some(1) => {
                        prop_assert!(assembly.insert(piece.start, Data::Here(&payload[piece.clone()])).is_ok());
                        outgoing.on_lost(piece);
                    }
                    _ => {
                        prop_assert!(assembly.insert(piece.start, Data::Here(&payload[piece.clone()])).is_ok());
                        outgoing.on_acked(piece);
                    }
                }
            }
            prop_assert!(outgoing.is_acked() && assembly.is_complete());
            prop_assert_eq!((outgoing.remaining(), assembly.received), (0, length));
            prop_assert_eq!(assembly.into_bytes(), payload);
        }
    }
}
