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

    /// Who waits in a lane behind `before` others.
    #[inline]
    pub(crate) fn get(&self, lane: Lane, before: usize) -> Option<u16> {
        self.rows[lane as usize].get(before).copied()
    }

    /// Lets the first `said` of a lane go.
    #[inline]
    pub(crate) fn forget(&mut self, lane: Lane, said: usize) {
        let row = &mut self.rows[lane as usize];
        if said >= row.len() {
            row.clear();
            self.lanes.0 &= !Lanes::bit(lane);
        } else {
            row.drain(..said);
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
        assert_eq!([0, 1, 2].map(|n| outbox.get(Lane::Calls, n)), [Some(1), Some(3), None]);
        outbox.push(Lane::Calls, 5);
        outbox.forget(Lane::Calls, 1);
        outbox.retain(|lane, slot| lane != Lane::Bulk && slot != 2);
        assert!(!outbox.lanes().has(Lane::Bulk) && outbox.lanes().has(Lane::Calls));
        assert_eq!([0, 1, 2].map(|n| outbox.get(Lane::Calls, n)), [Some(3), Some(5), None]);
        outbox.forget(Lane::Calls, 2);
        assert!(outbox.lanes().is_empty());
        outbox.push(Lane::Pages, 4);
        assert!(!outbox.lanes().and(Lanes::default()).is_empty());
        outbox.clear();
        assert!(outbox.lanes().is_empty());
    }
}
