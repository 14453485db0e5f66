//! The header before every frame, as card and device have it: checksums and segments.
//!
//! ```text
//! flags 1, kind of segments 1, length of headers 2, size of a segment 2,
//! checksum from 2, to 2, [buffers 2: the card's alone]     little-endian
//! ```
//!
//! Both are the same ten bytes but for where places count from: the card's from the Ethernet
//! header, the device's (TUN) from the packet.
//!
//! Sources: virtio 1.3 §5.1.6; Linux `Documentation/networking/tuntap.rst`.

use crate::segment::ETHERNET;

/// The card's header, with `num_buffers` (virtio 1.3 §5.1.6).
pub(super) const HEADER: usize = 12;
/// The device's, without.
pub(super) const DEVICE_HEADER: usize = 10;
/// Where the packet lies in a frame's buffer.
pub(super) const PACKET: usize = HEADER + ETHERNET;
/// Where the device's header lies, right before the packet.
pub(super) const DEVICE: usize = PACKET - DEVICE_HEADER;
/// Longest packet.
pub(super) const LONGEST: usize = 65_535;

/// [`ETHERNET`], as headers count.
const ETH: u16 = 14;
const _: () = assert!(ETH as usize == ETHERNET);
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
pub(super) const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_…`.
pub(super) const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// A header as virtio and TUN share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

/// How many packets a frame of the guest's becomes.
pub(super) fn parts(frame: &[u8], len: usize) -> usize {
    header_of(frame).map_or(1, |header| parts_of(header, len))
}

pub(super) fn parts_of(header: Header, len: usize) -> usize {
    match (header.gso_type, header.gso_size) {
        (GSO_NONE, _) | (_, 0) => 1,
        (_, size) => len.saturating_sub(PACKET).div_ceil(usize::from(size)),
    }
}

pub(super) fn header_of(bytes: &[u8]) -> Option<Header> {
    let &[flags, gso_type, a, b, c, d, e, f, g, h] = bytes.first_chunk()?;
    Some(Header {
        flags,
        gso_type,
        hdr_len: u16::from_le_bytes([a, b]),
        gso_size: u16::from_le_bytes([c, d]),
        csum_start: u16::from_le_bytes([e, f]),
        csum_offset: u16::from_le_bytes([g, h]),
    })
}

impl Header {
    /// As the device has it: places count from the packet. None where they are before it,
    /// or the guest asks for what it was not offered.
    pub(super) fn to_device(self) -> Option<Self> {
        let is_known = matches!(self.gso_type & !GSO_ECN, GSO_NONE | GSO_TCPV4 | GSO_TCPV6);
        // A checksum that the guest says is good is for the host to believe or not.
        let flags = self.flags & NEEDS_CSUM;
        let (csum_start, csum_offset) =
            if flags == 0 { (0, 0) } else { (self.csum_start.checked_sub(ETH)?, self.csum_offset) };
        let is_gso = self.gso_type != GSO_NONE;
        is_known.then_some(Self {
            flags,
            gso_type: self.gso_type,
            // A hint, which some guests leave out.
            hdr_len: if is_gso { self.hdr_len.saturating_sub(ETH) } else { 0 },
            gso_size: if is_gso { self.gso_size } else { 0 },
            csum_start,
            csum_offset,
        })
    }

    /// As the card has it: places count from the Ethernet header.
    pub(super) fn to_card(self) -> Self {
        let csum_start =
            if self.flags & NEEDS_CSUM == 0 { 0 } else { self.csum_start.saturating_add(ETH) };
        let hdr_len = if self.gso_type == GSO_NONE { 0 } else { self.hdr_len.saturating_add(ETH) };
        Self { hdr_len, csum_start, ..self }
    }

    /// The opposite of [`Header::to_card`].
    pub(super) fn card_to_device(self) -> Self {
        let back = |place: u16| place.saturating_sub(ETH);
        Self { hdr_len: back(self.hdr_len), csum_start: back(self.csum_start), ..self }
    }

    pub(super) fn write(self, into: &mut [u8]) {
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        let bytes = [self.flags, self.gso_type].into_iter();
        let bytes = bytes.chain(words.into_iter().flat_map(u16::to_le_bytes));
        into.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp_segments() -> Header {
        let [flags, gso_type] = [NEEDS_CSUM, GSO_TCPV4];
        Header { flags, gso_type, hdr_len: 54, gso_size: 1380, csum_start: 34, csum_offset: 16 }
    }

    #[test]
    fn places_count_from_the_packet_and_back() {
        let device = tcp_segments().to_device().unwrap();
        assert_eq!((device.hdr_len, device.csum_start, device.csum_offset), (40, 20, 16));
        assert_eq!(device.to_card(), tcp_segments());
        let mut bytes = [0; HEADER];
        device.write(&mut bytes);
        assert_eq!(header_of(&bytes), Some(device));
        assert_eq!(header_of(&bytes[..9]), None);
    }

    #[test]
    fn what_was_not_offered_is_refused() {
        assert_eq!(Header { csum_start: 13, ..tcp_segments() }.to_device(), None);
        // UDP fragments, UDP segments, and what does not exist.
        for gso_type in [3, 5, 2, 0x7f] {
            assert_eq!(Header { gso_type, ..tcp_segments() }.to_device(), None);
        }
        // A plain packet asks for nothing, whatever else its header says.
        let plain = Header { flags: 2, gso_type: GSO_NONE, ..tcp_segments() };
        let none =
            Header { flags: 0, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0, ..plain };
        assert_eq!(plain.to_device(), Some(none));
    }
}
