//! Bodies of fuzz targets that need what is not public.
//!
//! Not for use; see `fuzz/` of the repository.

use crate::carrier::shared::ring::{Layout, Memory, Reader, Writer};
use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;

const WORDS: u64 = 32;
const SIZE: usize = Layout::total(WORDS);
const ROOM: usize = 200;

/// Memory of a peer that writes what it likes, also between two reads of one word.
struct Hostile<'a> {
    words: Vec<Cell<u64>>,
    script: RefCell<&'a [u8]>,
}

impl Hostile<'_> {
    fn next<const N: usize>(&self) -> Option<[u8; N]> {
        let mut script = self.script.borrow_mut();
        let (bytes, rest) = script.split_first_chunk::<N>()?;
        *script = rest;
        Some(*bytes)
    }

    /// A word of the peer's: small, at an edge, or anything.
    fn value(&self, near: u64) -> Option<u64> {
        let [kind, by] = self.next()?;
        let by = u64::from(by);
        Some(match kind % 5 {
            0 => by,
            1 => near.wrapping_add(by),
            2 => near.wrapping_sub(by),
            3 => u64::MAX - by,
            _ => u64::from_le_bytes(self.next()?),
        })
    }
}

impl Memory for Hostile<'_> {
    fn load(&self, at: usize, _: Ordering) -> u64 {
        // Before the first ring and behind the second lies what is not the ring's.
        assert!((1..=2 * SIZE).contains(&at), "word {at} is outside the rings");
        let word = &self.words[at];
        if let Some([0..=31]) = self.next() {
            word.set(self.value(word.get()).unwrap_or(0));
        }
        word.get()
    }

    fn store(&self, at: usize, value: u64, _: Ordering) {
        assert!((1..=2 * SIZE).contains(&at), "word {at} is outside the rings");
        self.words[at].set(value);
    }

    fn fence(&self) {}
}

/// Both ends of rings whose other ends are the input: each byte is a step of ours, and the
/// peer changes memory whenever we look.
///
/// # Panics
///
/// If a place outside the rings is touched, or a record is longer than its room: findings.
pub fn hostile_ring(data: &[u8]) {
    let memory = Hostile {
        words: (0..2 * SIZE + 2).map(|_| Cell::new(0)).collect(),
        script: RefCell::new(data),
    };
    let mut writer = Writer::new(Layout::new(1, WORDS));
    let mut reader = Reader::new(Layout::new(1 + SIZE, WORDS));
    let mut room = [0; ROOM];
    while let Some([step, length]) = memory.next() {
        // Any refusal ends a carrier; here the attack goes on.
        match step % 6 {
            0 => drop(writer.push(&memory, &[step; ROOM + 80][..usize::from(length)])),
            1 => drop(writer.publish(&memory)),
            2 => {
                if let Ok(Some(length)) = reader.pop(&memory, &mut room) {
                    assert!((1..=ROOM).contains(&length));
                }
            }
            3 => reader.release(&memory),
            4 => drop(reader.may_sleep(&memory)),
            _ => {
                let at = 1 + usize::from(length) % (2 * SIZE);
                let word = memory.words[at].get();
                memory.words[at].set(memory.value(word).unwrap_or(0));
            }
        }
    }
}
