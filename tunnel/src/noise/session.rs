//! The keys of one handshake: packets sealed and opened in place.
//!
//! ```text
//! 0      4         8        16                16+n   32+n
//! | 4,0,0,0 | receiver | counter | packet, padded | tag |
//! ```
//!
//! Source: whitepaper §5.4.6, RFC 6479 for the window.

use std::time::Instant;

use ring::aead::{Aad, LessSafeKey};

use super::crypto::{Key, aead_key, nonce};
use super::{
    DATA_HEADER, NoiseError, REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES,
    REKEY_AFTER_TIME, TAG,
};

pub(super) struct Session {
    /// Our number of it, by which the peer addresses it.
    pub(super) local: u32,
    remote: u32,
    sender: LessSafeKey,
    receiver: LessSafeKey,
    sent: u64,
    window: Window,
    pub(super) born: Instant,
    pub(super) initiator: bool,
}

impl Session {
    pub(super) fn new(
        [local, remote]: [u32; 2],
        [sending, receiving]: [&Key; 2],
        born: Instant,
        initiator: bool,
    ) -> Self {
        Self {
            local,
            remote,
            sender: aead_key(sending),
            receiver: aead_key(receiving),
            sent: 0,
            window: Window::default(),
            born,
            initiator,
        }
    }

    /// Whether it may still carry packets.
    pub(super) fn is_alive(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.born) < REJECT_AFTER_TIME
    }

    /// Whether it may seal one more packet.
    pub(super) fn may_send(&self, now: Instant) -> bool {
        self.is_alive(now) && self.sent < REJECT_AFTER_MESSAGES
    }

    /// Whether sending should make a new one.
    pub(super) fn is_stale(&self, now: Instant) -> bool {
        let old = now.saturating_duration_since(self.born) >= REKEY_AFTER_TIME;
        self.sent >= REKEY_AFTER_MESSAGES || self.initiator && old
    }

    /// Seals the packet of `len` bytes at `DATA_HEADER` in `space`, which has room
    /// for the tag behind it. Gives the datagram's length.
    pub(super) fn seal(&mut self, space: &mut [u8], len: usize) -> Result<usize, NoiseError> {
        let counter = self.sent;
        if counter >= REJECT_AFTER_MESSAGES {
            return Err(NoiseError::NoSession);
        }
        self.sent += 1;
        let (head, rest) = space.split_at_mut(DATA_HEADER);
        let (text, rest) = rest.split_at_mut(len);
        head[..4].copy_from_slice(&[4, 0, 0, 0]);
        head[4..8].copy_from_slice(&self.remote.to_le_bytes());
        head[8..].copy_from_slice(&counter.to_le_bytes());
        let tag = self.sender.seal_in_place_separate_tag(nonce(counter), Aad::empty(), text);
        let Ok(tag) = tag else { unreachable!("no packet is near the cipher's limit") };
        rest[..TAG].copy_from_slice(tag.as_ref());
        Ok(DATA_HEADER + len + TAG)
    }

    /// Opens a data message in place; gives the length of the packet, which is at
    /// `DATA_HEADER`.
    pub(super) fn open(
        &mut self,
        now: Instant,
        counter: u64,
        datagram: &mut [u8],
    ) -> Result<usize, NoiseError> {
        if !self.is_alive(now) {
            return Err(NoiseError::NoSession);
        }
        // A replay costs no decryption.
        if counter >= REJECT_AFTER_MESSAGES || !self.window.is_new(counter) {
            return Err(NoiseError::Replay);
        }
        let text = datagram.get_mut(DATA_HEADER..).ok_or(NoiseError::Tag)?;
        let plain = self.receiver.open_in_place(nonce(counter), Aad::empty(), text);
        let len = plain.map_err(|_| NoiseError::Tag)?.len();
        self.window.mark(counter);
        Ok(len)
    }

    /// Makes the counters of a session near its end, for tests of that end.
    #[cfg(test)]
    pub(super) fn set_sent(&mut self, sent: u64) {
        self.sent = sent;
    }
}

/// Counters behind the highest that are told apart (Linux COUNTER_WINDOW_SIZE).
pub(super) const WINDOW: u64 = 8192;
/// One word more than the window, so that the word being cleared is not in it.
const WORDS: usize = 129;
const _: () = assert!(WORDS as u64 == WINDOW / 64 + 1);

/// Which counters were used.
struct Window {
    /// One more than the highest that was used.
    next: u64,
    words: [u64; WORDS],
}

impl Default for Window {
    fn default() -> Self {
        Self { next: 0, words: [0; WORDS] }
    }
}

impl Window {
    fn word(&mut self, number: u64) -> &mut u64 {
        #[allow(clippy::cast_possible_truncation, reason = "less than WORDS")]
        let index = (number % WORDS as u64) as usize;
        &mut self.words[index]
    }

    /// Whether `counter` is within or above the window and was not used.
    fn is_new(&mut self, counter: u64) -> bool {
        let used = *self.word(counter / 64) & 1 << (counter % 64) != 0;
        counter >= self.next || self.next - counter <= WINDOW && !used
    }

    /// Uses a counter for which [`Window::is_new`] holds.
    fn mark(&mut self, counter: u64) {
        if counter >= self.next {
            // The highest word in use. Beyond as many as there are, all are clear.
            let newest = self.next.checked_sub(1).map_or(0, |highest| highest / 64);
            for number in newest + 1..=(counter / 64).min(newest + WORDS as u64) {
                *self.word(number) = 0;
            }
            self.next = counter + 1;
        }
        *self.word(counter / 64) |= 1 << (counter % 64);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use conet_testkit::random::Random;

    use super::*;

    /// What the window should say, without economy.
    #[derive(Default)]
    struct Model {
        used: BTreeSet<u64>,
    }

    impl Model {
        fn take(&mut self, counter: u64) -> bool {
            let next = self.used.last().map_or(0, |highest| highest + 1);
            counter + WINDOW >= next && self.used.insert(counter)
        }
    }

    #[test]
    fn the_window_is_8192_wide_and_agrees_with_a_model() {
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let (mut window, mut model) = (Window::default(), Model::default());
            let mut highest = 0;
            for _ in 0..400 {
                let counter = match random.below(6) {
                    0 => highest + random.below(20_000),
                    1 => highest.saturating_sub(WINDOW - 3) + random.below(6),
                    2 => random.below(highest + 1),
                    3 => highest,
                    _ => highest + random.below(70),
                };
                highest = highest.max(counter);
                let new = window.is_new(counter);
                if new {
                    window.mark(counter);
                }
                assert_eq!(new, model.take(counter), "seed {seed}, counter {counter}");
            }
        }
    }

    #[test]
    fn every_counter_of_the_window_is_taken_once() {
        let mut window = Window::default();
        let top = 3 * WINDOW + 17;
        window.mark(top);
        assert!(!window.is_new(top - WINDOW));
        for counter in (top - WINDOW + 1..top).rev() {
            assert!(window.is_new(counter), "{counter}");
            window.mark(counter);
            assert!(!window.is_new(counter), "{counter}");
        }
        assert!(!window.is_new(top));
    }
}
