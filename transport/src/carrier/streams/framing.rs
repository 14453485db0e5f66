//! Datagrams on a byte stream: a length before each, and nothing else.
//!
//! ```text
//! │ length u32 LE │ datagram │ length u32 LE │ datagram │ …
//! ```
//!
//! Invariants: a length outside [`MIN_PACKET`]`..=`[`LONGEST`] ends the stream, before memory
//! is taken for it; what is held never exceeds [`MOST_IN`] and [`MOST_OUT`] bytes; a
//! datagram that has no room is dropped whole, so the stream stays in step.

use conet_wire::session::{MIN_PACKET, RECORD_PREFIX};

/// Longest datagram on a stream, bytes: what UDP carries over IPv4.
pub(crate) const LONGEST: usize = 65_507;
/// Most bytes that have come and not been taken.
pub(crate) const MOST_IN: usize = 2 * (RECORD_PREFIX + LONGEST);
/// Most bytes that wait to go: a full window of large payloads, and calls beside it.
pub(crate) const MOST_OUT: usize = 4 * 1024 * 1024;
/// Bytes kept allocated in an idle buffer.
const KEPT: usize = 256 * 1024;

/// No datagram is that long, or that short; the peer's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("datagram of {0} bytes is outside {MIN_PACKET}..={LONGEST}")]
pub(crate) struct BadLength(pub(crate) usize);

/// What has come from a stream.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    from: usize,
    to: usize,
}

impl Inbox {
    /// Room for what comes next; never empty.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        if self.from > 0 {
            self.bytes.copy_within(self.from..self.to, 0);
            self.to -= self.from;
            self.from = 0;
        }
        if self.bytes.is_empty() {
            self.bytes.resize(MOST_IN, 0);
        }
        self.bytes.get_mut(self.to..).unwrap_or_default()
    }

    /// So many bytes of the room are filled.
    pub(crate) fn on_filled(&mut self, length: usize) {
        self.to = (self.to + length).min(self.bytes.len());
    }

    fn next_length(&self) -> Result<Option<usize>, BadLength> {
        let held = self.bytes.get(self.from..self.to).unwrap_or_default();
        let Some(prefix) = held.first_chunk::<RECORD_PREFIX>() else { return Ok(None) };
        let length = u32::from_le_bytes(*prefix) as usize;
        if (MIN_PACKET..=LONGEST).contains(&length) {
            Ok((held.len() >= RECORD_PREFIX + length).then_some(length))
        } else {
            Err(BadLength(length))
        }
    }

    /// Whether [`next`](Self::next) has something to give or to complain about.
    pub(crate) fn has_next(&self) -> bool {
        !matches!(self.next_length(), Ok(None))
    }

    /// The next datagram that has come whole.
    pub(crate) fn next(&mut self) -> Result<Option<&mut [u8]>, BadLength> {
        let Some(length) = self.next_length()? else { return Ok(None) };
        let start = self.from + RECORD_PREFIX;
        self.from = start + length;
        Ok(self.bytes.get_mut(start..start + length))
    }
}

/// What waits to go onto a stream.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    from: usize,
}

impl Outbox {
    /// Puts a datagram at the end; says whether there was room.
    pub(crate) fn push(&mut self, datagram: &[u8]) -> bool {
        let fits = (MIN_PACKET..=LONGEST).contains(&datagram.len())
            && self.bytes.len() - self.from + RECORD_PREFIX + datagram.len() <= MOST_OUT;
        if !fits {
            return false;
        }
        let Ok(length) = u32::try_from(datagram.len()) else { return false };
        if self.from > KEPT {
            // Else what is sent and what waits would grow side by side.
            self.bytes.drain(..self.from);
            self.from = 0;
        }
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(datagram);
        true
    }

    /// What is to be written next.
    pub(crate) fn waiting(&self) -> &[u8] {
        self.bytes.get(self.from..).unwrap_or_default()
    }

    /// So many bytes were written.
    pub(crate) fn on_written(&mut self, length: usize) {
        self.from = (self.from + length).min(self.bytes.len());
        if self.from == self.bytes.len() {
            self.bytes.clear();
            self.bytes.shrink_to(KEPT);
            self.from = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use conet_testkit::random::Random;

    #[test]
    fn datagrams_come_out_as_they_went_in_however_the_stream_is_cut() {
        for seed in 0..50 {
            let mut random = Random::new(seed);
            let (mut out, mut inbox) = (Outbox::default(), Inbox::default());
            let (mut sent, mut got) = (Vec::new(), Vec::new());
            while got.len() < 200 {
                if sent.len() < 200 {
                    let most = if random.chance(100) { LONGEST } else { 200 };
                    let length = MIN_PACKET as u64 + random.below((most - MIN_PACKET) as u64 + 1);
                    let mut bytes = vec![0; usize::try_from(length).expect("small")];
                    random.fill(&mut bytes);
                    if out.push(&bytes) {
                        sent.push(bytes);
                    }
                }
                let room = inbox.room();
                let most = room.len().min(out.waiting().len()) as u64;
                let cut = usize::try_from(random.below(most + 1)).expect("small");
                room[..cut].copy_from_slice(&out.waiting()[..cut]);
                out.on_written(cut);
                inbox.on_filled(cut);
                while let Some(datagram) = inbox.next().expect("good lengths") {
                    got.push(datagram.to_vec());
                }
                assert!(!inbox.has_next());
            }
            assert!(got == sent, "seed {seed}");
        }
    }

    #[test]
    fn a_hostile_length_is_refused() {
        for length in [0, 1, MIN_PACKET - 1, LONGEST + 1, u32::MAX as usize] {
            let mut inbox = Inbox::default();
            let prefix = u32::try_from(length).expect("fits").to_le_bytes();
            inbox.room()[..4].copy_from_slice(&prefix);
            inbox.on_filled(4);
            assert!(inbox.has_next());
            assert_eq!(inbox.next(), Err(BadLength(length)));
        }
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut out = Outbox::default();
        let mut taken = 0;
        while out.push(&[7; 1000]) {
            taken += 1;
        }
        assert_eq!(taken, MOST_OUT / 1004);
        let written = out.waiting().len() / 2;
        out.on_written(written);
        while out.push(&[7; 1000]) {}
        assert!(out.bytes.len() <= MOST_OUT + KEPT);
        out.on_written(usize::MAX / 2);
        assert!(out.waiting().is_empty() && out.bytes.capacity() <= KEPT);
        assert!(!out.push(&[0; MIN_PACKET - 1]) && !out.push(&[0; LONGEST + 1]));
    }

    #[test]
    fn there_is_always_room_for_more() {
        let mut inbox = Inbox::default();
        loop {
            let room = inbox.room();
            assert!(!room.is_empty());
            let length = room.len();
            for datagram in room.chunks_exact_mut(4 + LONGEST) {
                datagram[..4].copy_from_slice(&u32::try_from(LONGEST).expect("fits").to_le_bytes());
            }
            inbox.on_filled(length);
            let mut taken = 0;
            while inbox.next().expect("good").is_some() {
                taken += 1;
            }
            if taken == 2 {
                break;
            }
        }
        assert!(!inbox.room().is_empty());
    }
}
