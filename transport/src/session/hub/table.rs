//! Session indices: one array access from a packet's header to its peer.
//!
//! An index is a place in the array and, above it, bits by chance, so that the index of
//! a session that has gone does not soon name another.

use crate::session::handshake::Entropy;
use alloc::vec::Vec;

/// Bits of an index that are its place: 2^20 sessions.
const PLACE: u32 = 20;

/// Which peer has which index.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// The whole index, zero where the place is free, and the peer's number.
    places: Vec<(u32, usize)>,
    free: Vec<usize>,
}

impl Table {
    pub(super) fn get(&self, index: u32) -> Option<usize> {
        let (there, peer) = *self.places.get((index & ((1 << PLACE) - 1)) as usize)?;
        (there == index && index != 0).then_some(peer)
    }

    /// A new index for a peer; `None` without randomness or places.
    pub(super) fn insert(&mut self, peer: usize, entropy: &mut dyn Entropy) -> Option<u32> {
        let mut bytes = [0; 4];
        entropy.fill(&mut bytes).ok()?;
        let at = self.free.pop().unwrap_or(self.places.len());
        let place = u32::try_from(at).ok().filter(|at| *at < 1 << PLACE)?;
        // Never zero: the lowest of the random bits is set.
        let index = (u32::from_le_bytes(bytes) | 1) << PLACE | place;
        if at == self.places.len() {
            self.places.push((0, 0));
        }
        *self.places.get_mut(at)? = (index, peer);
        Some(index)
    }

    pub(super) fn remove(&mut self, index: u32) {
        let at = (index & ((1 << PLACE) - 1)) as usize;
        if let Some(place) = self.places.get_mut(at)
            && place.0 == index
            && index != 0
        {
            place.0 = 0;
            self.free.push(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::handshake::EntropyFailed;

    struct Ones;

    impl Entropy for Ones {
        fn fill(&mut self, bytes: &mut [u8]) -> Result<(), EntropyFailed> {
            bytes.fill(0xff);
            Ok(())
        }
    }

    #[test]
    fn indices_find_their_peers_until_they_are_removed() {
        let mut table = Table::default();
        let (one, two) =
            (table.insert(7, &mut Ones).expect("room"), table.insert(8, &mut Ones).expect("room"));
        assert_eq!((table.get(one), table.get(two), table.get(0)), (Some(7), Some(8), None));
        assert_eq!(table.get(one ^ 1 << 31), None);
        table.remove(one);
        table.remove(one);
        assert_eq!((table.get(one), table.free.len()), (None, 1));
        let three = table.insert(9, &mut Ones).expect("room");
        assert_eq!((table.get(three), table.places.len()), (Some(9), 2));
    }
}
