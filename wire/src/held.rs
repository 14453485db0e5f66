//! Packets that were kept for a guest that is held, on their way to another host.
//!
//! ```text
//! "conet held 1\n" │ (length 4, virtio header 10, IP packet) … │ 0 0 0 0
//! ```
//!
//! Lengths are little-endian and count what follows of their packet; one of 0 ends them, so
//! that half of it is not taken for the whole. The header is that of virtio 1.3 §5.1.6, its
//! first ten bytes.
//!
//! What it is not: a claim of whose the packets are; whoever takes them looks where they go.

extern crate alloc;

use alloc::vec::Vec;
use core::net::IpAddr;

use thiserror::Error;

/// Most packets.
pub const MAX_PACKETS: usize = 4096;
/// Most bytes of all packets with their headers.
pub const MAX_BYTES: usize = 8 << 20;
/// Bytes of the header before each packet.
pub const HEADER: usize = 10;
/// Longest layout.
pub const MAX_LENGTH: usize = MAGIC.len() + MAX_BYTES + 4 * (MAX_PACKETS + 1);

const MAGIC: &[u8] = b"conet held 1\n";
/// An IPv4 header without options, the least that a packet is.
const LEAST: usize = HEADER + 20;
/// The longest IP packet with its header.
const MOST: usize = HEADER + 65_535;

/// Why bytes are no held packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HeldError {
    /// They begin otherwise.
    #[error("this is no file of held packets")]
    Other,
    /// They end early.
    #[error("the held packets are cut short")]
    Short,
    /// Something stands behind the end.
    #[error("there is something behind the held packets")]
    Behind,
    /// A length that no packet has, or no IP packet.
    #[error("held packet {0} is none")]
    Packet(usize),
    /// More than a host keeps.
    #[error("these are more packets than a host keeps ({MAX_PACKETS}, or {MAX_BYTES} bytes)")]
    TooMany,
}

/// Writes packets, each with its header before it.
#[must_use]
pub fn emit(packets: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for packet in packets {
        let length = u32::try_from(packet.len()).unwrap_or(u32::MAX);
        bytes.extend(length.to_le_bytes());
        bytes.extend(packet);
    }
    bytes.extend([0; 4]);
    bytes
}

/// Reads them back.
///
/// # Errors
///
/// [`HeldError`], for whatever bytes [`emit`] does not write of IP packets.
pub fn parse(bytes: &[u8]) -> Result<Vec<Vec<u8>>, HeldError> {
    let mut rest = bytes.strip_prefix(MAGIC).ok_or(HeldError::Other)?;
    let (mut packets, mut sum) = (Vec::new(), 0);
    loop {
        let (length, behind) = rest.split_first_chunk::<4>().ok_or(HeldError::Short)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if length == 0 {
            return if behind.is_empty() { Ok(packets) } else { Err(HeldError::Behind) };
        }
        let number = packets.len() + 1;
        if !(LEAST..=MOST).contains(&length) {
            return Err(HeldError::Packet(number));
        }
        let packet = behind.get(..length).ok_or(HeldError::Short)?;
        destination(packet).ok_or(HeldError::Packet(number))?;
        sum += length;
        if number > MAX_PACKETS || sum > MAX_BYTES {
            return Err(HeldError::TooMany);
        }
        packets.push(packet.to_vec());
        rest = behind.get(length..).unwrap_or_default();
    }
}

/// Where a packet with its header before it goes; none where it is no IP packet.
#[must_use]
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    let packet = packet.get(HEADER..)?;
    match packet.first()? >> 4 {
        4 => packet.get(16..20)?.first_chunk::<4>().copied().map(IpAddr::from),
        6 => packet.get(24..40)?.first_chunk::<16>().copied().map(IpAddr::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::*;

    use super::*;

    fn packet(last: u8, length: usize) -> Vec<u8> {
        let mut packet = vec![0; HEADER + length];
        packet[HEADER] = 0x45;
        packet[HEADER + 16..HEADER + 20].copy_from_slice(&[10, 77, 1, last]);
        packet
    }

    #[test]
    fn held_packets_go_round_and_half_of_them_are_none() {
        let mut six = vec![0; HEADER + 40];
        six[HEADER] = 0x60;
        six[HEADER + 39] = 1;
        let packets = vec![packet(2, 20), six, packet(2, 65_535)];
        let bytes = emit(&packets);
        assert_eq!(parse(&bytes), Ok(packets.clone()));
        assert_eq!(destination(&packets[0]), Some(IpAddr::from([10, 77, 1, 2])));
        assert_eq!(destination(&packets[1]), Some("::1".parse().unwrap()));
        assert_eq!(parse(&emit(&[])), Ok(vec![]));
        for cut in (0..MAGIC.len() + 200).chain(bytes.len() - 70..bytes.len()) {
            let expected = if cut < MAGIC.len() { HeldError::Other } else { HeldError::Short };
            assert_eq!(parse(&bytes[..cut]), Err(expected), "{cut}");
        }
        assert_eq!(parse(&[&bytes[..], &[0]].concat()), Err(HeldError::Behind));
    }

    #[test]
    fn what_no_host_keeps_is_refused() {
        for wrong in [vec![0; LEAST], packet(2, 20)[..LEAST - 1].to_vec(), packet(2, 65_536)] {
            assert_eq!(parse(&emit(&[packet(2, 20), wrong])), Err(HeldError::Packet(2)));
        }
        let most = vec![packet(2, 20); MAX_PACKETS];
        assert_eq!(parse(&emit(&most)).map(|packets| packets.len()), Ok(MAX_PACKETS));
        assert_eq!(parse(&emit(&[most, vec![packet(2, 20)]].concat())), Err(HeldError::TooMany));
        let long = vec![packet(2, 65_000); MAX_BYTES / 65_000 + 1];
        assert_eq!(parse(&emit(&long)), Err(HeldError::TooMany));
        assert!(emit(&long[1..]).len() <= MAX_LENGTH);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_go_round(tail in prop::collection::vec(any::<u8>(), 0..300)) {
            let bytes = [MAGIC, &tail].concat();
            if let Ok(packets) = parse(&bytes) {
                prop_assert_eq!(emit(&packets), bytes);
            }
        }
    }
}
