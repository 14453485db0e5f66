//! A payload on its way in pieces: which parts went, arrived or were lost.
//!
//! Pieces begin at multiples of [`UNIT`] and are multiples of it long, but for the
//! last, so that one bit per unit says everything: 2 KiB for 1 MiB, however
//! cleverly a peer cuts its pieces.
//!
//! Invariants: an [`Assembly`] is complete when every byte was written, and each
//! byte keeps its first value; an [`Outgoing`] never gives out an acknowledged
//! unit again.

use std::collections::VecDeque;
use std::ops::Range;

/// Granularity of pieces, bytes; part of the protocol.
pub(crate) const UNIT: usize = 64;

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

    /// Marks a unit; says whether it was not marked before.
    fn mark(&mut self, unit: usize) -> bool {
        let Some(word) = self.words.get_mut(unit / 64) else { return false };
        let bit = 1 << (unit % 64);
        let new = *word & bit == 0;
        if new {
            *word |= bit;
            self.missing -= 1;
        }
        new
    }
}

/// A piece lies outside its payload or off the units; the peer's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct BadPiece;

/// A payload that arrives.
#[derive(Debug)]
pub(crate) struct Assembly {
    bytes: Vec<u8>,
    have: Units,
}

impl Assembly {
    /// For `total` bytes; the caller has checked its budget.
    pub(crate) fn new(total: usize) -> Self {
        Self { bytes: vec![0; total], have: Units::new(total) }
    }

    pub(crate) fn total(&self) -> usize {
        self.bytes.len()
    }

    /// Writes a piece where nothing was written yet.
    pub(crate) fn insert(&mut self, offset: usize, piece: &[u8]) -> Result<(), BadPiece> {
        let end = offset.checked_add(piece.len()).ok_or(BadPiece)?;
        let aligned = offset.is_multiple_of(UNIT)
            && (piece.len().is_multiple_of(UNIT) || end == self.bytes.len());
        let target = self.bytes.get_mut(offset..end).filter(|_| aligned).ok_or(BadPiece)?;
        for (n, (to, from)) in target.chunks_mut(UNIT).zip(piece.chunks(UNIT)).enumerate() {
            if self.have.mark(offset / UNIT + n) {
                to.copy_from_slice(from);
            }
        }
        Ok(())
    }

    pub(crate) const fn is_complete(&self) -> bool {
        self.have.missing == 0
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
}

impl Outgoing {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let acked = Units::new(bytes.len());
        Self { bytes, acked, next: 0, lost: VecDeque::new() }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Whether a piece waits to be sent, for the first time or again.
    pub(crate) fn has_piece(&self) -> bool {
        !self.lost.is_empty() || self.next < self.bytes.len()
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
        let piece = self.unacked(self.next..self.bytes.len(), room);
        self.next = piece.as_ref().map_or(self.bytes.len(), |piece| piece.end);
        piece
    }

    /// The first run of unacknowledged units in `within`, `room` bytes at most.
    fn unacked(&self, within: Range<usize>, room: usize) -> Option<Range<usize>> {
        let units = within.start / UNIT..within.end.div_ceil(UNIT);
        let first = units.clone().find(|&unit| !self.acked.is_marked(unit))?;
        let last = (first..units.end.min(first + room / UNIT))
            .take_while(|&unit| !self.acked.is_marked(unit))
            .last()?;
        Some(first * UNIT..((last + 1) * UNIT).min(self.bytes.len()))
    }

    pub(crate) fn on_acked(&mut self, piece: Range<usize>) {
        for unit in piece.start / UNIT..piece.end.div_ceil(UNIT) {
            self.acked.mark(unit);
        }
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
        let mut assembly = Assembly::new(200);
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
                assembly.insert(offset, &vec![1; length]).is_ok(),
                good,
                "{offset}+{length}"
            );
        }
        assert!(!assembly.is_complete() || assembly.bytes.iter().all(|&byte| byte == 1));
    }

    #[test]
    fn an_empty_payload_is_complete_at_once() {
        assert!(Assembly::new(0).is_complete());
        assert!(Outgoing::new(Vec::new()).is_acked());
        assert!(!Outgoing::new(Vec::new()).has_piece());
    }

    #[test]
    fn bytes_keep_their_first_value() {
        let mut assembly = Assembly::new(64);
        assembly.insert(0, &[1; 64]).expect("fits");
        assembly.insert(0, &[2; 64]).expect("fits");
        assert_eq!(assembly.into_bytes(), [1; 64]);
    }

    proptest! {
        #[test]
        fn everything_arrives_whatever_is_lost(
            length in 0usize..20_000,
            room in 64usize..3000,
            fates in prop::collection::vec(0u8..4, 2000),
        ) {
            let payload: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
            let mut outgoing = Outgoing::new(payload.clone());
            let mut assembly = Assembly::new(length);
            let mut fates = fates.into_iter().chain(core::iter::repeat(3));
            while let Some(piece) = outgoing.take_piece(room) {
                prop_assert!(piece.len() <= room && !piece.is_empty());
                match fates.next() {
                    Some(0) => outgoing.on_lost(piece),
                    // Arrived, but the acknowledgement is lost.
                    Some(1) => {
                        prop_assert!(assembly.insert(piece.start, &payload[piece.clone()]).is_ok());
                        outgoing.on_lost(piece);
                    }
                    _ => {
                        prop_assert!(assembly.insert(piece.start, &payload[piece.clone()]).is_ok());
                        outgoing.on_acked(piece);
                    }
                }
            }
            prop_assert!(outgoing.is_acked() && assembly.is_complete());
            prop_assert_eq!(assembly.into_bytes(), payload);
        }
    }
}
