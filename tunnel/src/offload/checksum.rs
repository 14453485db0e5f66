//! The internet checksum, at the speed of memory.
//!
//! Sums are kept in the byte order of the machine: one's complement sums do not mind
//! (RFC 1071 §2 B), and the result is swapped once.

use super::{PROTO_TCP, u16_at};

/// A one's complement sum of 16-bit words, not yet folded.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum(u64);

impl Sum {
    /// Adds bytes that begin at an even offset of what is summed.
    pub(super) fn add(self, bytes: &[u8]) -> Self {
        let mut lanes = [self.0, 0, 0, 0];
        let mut blocks = bytes.chunks_exact(32);
        for block in &mut blocks {
            for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
                *lane = carried(*lane, word_of(word));
            }
        }
        let mut rest = blocks.remainder().chunks_exact(8);
        for word in &mut rest {
            lanes[0] = carried(lanes[0], word_of(word));
        }
        // Zeros behind the end do not count.
        lanes[1] = carried(lanes[1], word_of(rest.remainder()));
        Self(lanes.into_iter().fold(0, carried))
    }

    /// Adds one word in network order.
    pub(super) fn add16(self, word: u16) -> Self {
        Self(carried(self.0, u16::from_ne_bytes(word.to_be_bytes()).into()))
    }

    /// The sum, in network order, not inverted: what a pseudo-header leaves behind.
    pub(super) fn folded(self) -> u16 {
        let mut sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        let sum = u16::try_from(sum).unwrap_or(u16::MAX);
        u16::from_be_bytes(sum.to_ne_bytes())
    }

    /// The checksum, in network order.
    pub(super) fn finish(self) -> u16 {
        !self.folded()
    }
}

fn carried(sum: u64, word: u64) -> u64 {
    let (sum, carry) = sum.overflowing_add(word);
    sum + u64::from(carry)
}

fn word_of(bytes: &[u8]) -> u64 {
    match bytes.first_chunk() {
        Some(word) => u64::from_ne_bytes(*word),
        None => {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_ne_bytes(word)
        }
    }
}

/// The pseudo-header of TCP or UDP over IPv4 (RFC 9293 §3.1) or IPv6 (RFC 8200 §8.1).
pub(super) fn pseudo(header: &[u8], is_v6: bool, protocol: u8, len: u16) -> Sum {
    let addresses = if is_v6 { &header[8..40] } else { &header[12..20] };
    Sum::default().add(addresses).add16(len).add16(u16::from(protocol))
}

/// Whether the checksum of a TCP or UDP packet is right; `at` is where its transport
/// header begins. UDP without one is not.
pub(super) fn is_right(packet: &[u8], is_v6: bool, protocol: u8, at: usize) -> bool {
    let Ok(len) = u16::try_from(packet.len() - at) else { return false };
    let unset = protocol != PROTO_TCP && u16_at(packet, at + 6) == 0;
    let sum = pseudo(packet, is_v6, protocol, len).add(&packet[at..]);
    !unset && sum.finish() == 0
}
