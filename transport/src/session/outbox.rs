//! Slots that have a frame to send, lane by lane, each in the order in which they came.
//!
//! Invariant: a lane's bit is set while somebody waits in it, so that who looks for work
//! looks at one byte.

use alloc::vec::Vec;
use conet_wire::session::frame::Lane;

/// Lanes, one bit each.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Lanes(u8);

impl Lanes {
    #[inline]
    const fn bit(lane: Lane) -> u8 {
        1 << lane as u8
    }

    #[inline]
    pub(crate) const fn has(self, lane: Lane) -> bool {
        self.0 & Self::bit(lane) != 0
    }

    #[inline]
    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Takes the most urgent one out.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<Lane> {
        let lane = Lane::ALL.get(self.0.trailing_zeros() as usize)?;
        self.0 &= self.0 - 1;
        Some(*lane)
    }

    #[inline]
    pub(crate) const fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }
}

/// The slots.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    rows: [Vec<u16>; 4],
    lanes: Lanes,
}

impl Outbox {
    /// Lanes in which somebody waits.
    #[inline]
    pub(crate) const fn lanes(&self) -> Lanes {
        self.lanes
    }

    #[inline]
    pub(crate) fn push(&mut self, lane: Lane, slot: u16) {
        self.rows[lane as usize].push(slot);
        self.lanes.0 |= Lanes::bit(lane);
    }

    /// Takes all of a lane's; who has not said all gives the rest [`back`](Self::back).
    #[inline]
    pub(crate) fn take(&mut self, lane: Lane) -> Vec<u16> {
        self.lanes.0 &= !Lanes::bit(lane);
        core::mem::take(&mut self.rows[lane as usize])
    }

    /// Puts back what was taken, without the first `said`, before what has come since.
    #[inline]
    pub(crate) fn back(&mut self, lane: Lane, mut taken: Vec<u16>, said: usize) {
        if said >= taken.len() {
            taken.clear();
        } else {
            taken.drain(..said);
        }
        let row = &mut self.rows[lane as usize];
        taken.append(row);
        *row = taken;
        if !row.is_empty() {
            self.lanes.0 |= Lanes::bit(lane);
        }
    }

    /// Keeps those that `stays` says.
    pub(crate) fn retain(&mut self, mut stays: impl FnMut(Lane, u16) -> bool) {
        for lane in Lane::ALL {
            let row = &mut self.rows[lane as usize];
            row.retain(|slot| stays(lane, *slot));
            if row.is_empty() {
                self.lanes.0 &= !Lanes::bit(lane);
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.rows.iter().map(Vec::len).sum()
    }

    pub(crate) fn clear(&mut self) {
        self.retain(|_, _| false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_marked_while_somebody_waits_in_it() {
        let mut outbox = Outbox::default();
        for (lane, slot) in [(Lane::Calls, 1), (Lane::Bulk, 2), (Lane::Calls, 3)] {
            outbox.push(lane, slot);
        }
        assert!(outbox.lanes().has(Lane::Calls) && !outbox.lanes().has(Lane::Control));
        let taken = outbox.take(Lane::Calls);
        assert!(taken == [1, 3] && !outbox.lanes().has(Lane::Calls));
        outbox.push(Lane::Calls, 5);
        outbox.back(Lane::Calls, taken, 1);
        outbox.retain(|lane, slot| lane != Lane::Bulk && slot != 2);
        assert!(!outbox.lanes().has(Lane::Bulk));
        assert_eq!(outbox.take(Lane::Calls), [3, 5]);
        outbox.back(Lane::Calls, Vec::new(), 0);
        assert!(outbox.lanes().is_empty());
        outbox.push(Lane::Pages, 4);
        assert!(!outbox.lanes().and(Lanes::default()).is_empty());
        outbox.clear();
        assert!(outbox.lanes().is_empty());
    }
}
