//! What lies in maps, byte by byte as in `bpf/ipip.bpf.c`.

#![allow(unsafe_code, reason = "aya takes a type for plain bytes on our word only")]

use super::IpipDrop;

/// `struct peer`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RawPeer {
    pub(super) remote: [u8; 4],
    pub(super) local: [u8; 4],
    pub(super) link: u32,
    pub(super) device: u32,
    pub(super) mtu: u32,
}

/// What the programs have counted for a peer (`struct counters`); inner packets and
/// their bytes, whatever number of them travelled in one piece.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IpipCounters {
    /// Sent to it.
    pub out_packets: u64,
    /// Their bytes.
    pub out_bytes: u64,
    /// Received from it and passed on.
    pub in_packets: u64,
    /// Their bytes.
    pub in_bytes: u64,
    /// Dropped, in the order of [`IpipDrop::ALL`].
    pub drops: [u64; IpipDrop::ALL.len()],
}

const _: () = assert!(size_of::<RawPeer>() == 20 && size_of::<IpipCounters>() == 88);

// SAFETY: five fields of four bytes each, as the assertion above says without padding, and
// any bytes are a value of each.
unsafe impl aya::Pod for RawPeer {}
// SAFETY: eleven numbers of eight bytes each, as the assertion above says without padding,
// and any bytes are a value of each.
unsafe impl aya::Pod for IpipCounters {}

impl IpipCounters {
    pub(super) fn plus(self, other: &Self) -> Self {
        self.each(other, u64::wrapping_add)
    }

    /// What was counted since `before`.
    #[must_use]
    pub fn since(self, before: &Self) -> Self {
        self.each(before, u64::wrapping_sub)
    }

    fn each(self, other: &Self, of: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            out_packets: of(self.out_packets, other.out_packets),
            out_bytes: of(self.out_bytes, other.out_bytes),
            in_packets: of(self.in_packets, other.in_packets),
            in_bytes: of(self.in_bytes, other.in_bytes),
            drops: std::array::from_fn(|i| of(self.drops[i], other.drops[i])),
        }
    }
}
