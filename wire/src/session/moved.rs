//! What a node says of a session that has gone from it: where it is now.
//!
//! ```text
//! moved    header, kind MOVED, the receiver's session │ sealed │ tag
//!   sealed epoch u64 │ family u16 │ port u16 │ zero u32 │ address 16
//! ```
//!
//! Sealed under a key that both ends of the session derive from their common secret, so
//! nobody else can send a session elsewhere. It is a hint all the same: the session goes
//! on only after a handshake with whoever is there.
//!
//! Not here: keys, and how long an old node says it.

use super::{HEADER, TAG};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes that are sealed.
pub const MOVED_SECRET: usize = 32;
/// Bytes of an address and port.
pub(crate) const PLACE: usize = 24;
/// Bytes of a MOVED packet.
pub const MOVED: usize = HEADER + MOVED_SECRET + TAG;

/// What a MOVED packet says under seal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Moved {
    /// The epoch that the session has there, or a lower bound of it.
    pub epoch: u64,
    /// Where it is.
    pub address: SocketAddr,
}

impl Moved {
    /// Reads the opened payload; `None` if it is malformed; the peer's fault.
    #[must_use]
    pub fn parse(bytes: &[u8; MOVED_SECRET]) -> Option<Self> {
        let (epoch, place) = bytes.split_first_chunk()?;
        let address = parse_place(place.first_chunk()?)?;
        Some(Self { epoch: u64::from_le_bytes(*epoch), address })
    }

    /// The payload to seal. An IPv6 scope is left out: it means something on one host.
    #[must_use]
    pub fn emit(&self) -> [u8; MOVED_SECRET] {
        let mut bytes = [0; MOVED_SECRET];
        bytes[..8].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[8..].copy_from_slice(&emit_place(self.address));
        bytes
    }
}

/// An address and port: `family u16 │ port u16 │ zero u32 │ address 16`.
pub(crate) fn parse_place(bytes: &[u8; PLACE]) -> Option<SocketAddr> {
    let (&[f0, f1, p0, p1, 0, 0, 0, 0], address) = bytes.split_first_chunk::<8>()? else {
        return None;
    };
    let address: [u8; 16] = *address.first_chunk()?;
    let ip = match u16::from_le_bytes([f0, f1]) {
        4 => {
            let [a, b, c, d, zero @ ..] = address;
            (zero == [0; 12]).then_some(IpAddr::V4(Ipv4Addr::new(a, b, c, d)))?
        }
        6 => IpAddr::V6(Ipv6Addr::from(address)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_le_bytes([p0, p1])))
}

/// The reverse of [`parse_place`]. An IPv6 scope is left out.
pub(crate) fn emit_place(place: SocketAddr) -> [u8; PLACE] {
    let mut bytes = [0; PLACE];
    let (family, address): (u16, [u8; 16]) = match place.ip() {
        IpAddr::V4(ip) => {
            let mut address = [0; 16];
            address[..4].copy_from_slice(&ip.octets());
            (4, address)
        }
        IpAddr::V6(ip) => (6, ip.octets()),
    };
    bytes[..2].copy_from_slice(&family.to_le_bytes());
    bytes[2..4].copy_from_slice(&place.port().to_le_bytes());
    bytes[8..].copy_from_slice(&address);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_vector() {
        let moved = Moved { epoch: 3, address: SocketAddr::from(([192, 0, 2, 1], 0x0102)) };
        let mut golden = [0; MOVED_SECRET];
        golden[..12].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 2, 1]);
        golden[16..20].copy_from_slice(&[192, 0, 2, 1]);
        assert_eq!(moved.emit(), golden);
        assert_eq!(Moved::parse(&golden), Some(moved));
        for (at, _) in golden.iter().enumerate().skip(12).filter(|(at, _)| !(16..20).contains(at)) {
            let mut bad = golden;
            bad[at] = 1;
            assert_eq!(Moved::parse(&bad), None, "byte {at}");
        }
    }

    #[test]
    fn golden_vector_of_ipv6() {
        let address = SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], 0x0102));
        let mut golden = [0; MOVED_SECRET];
        golden[..12].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 6, 0, 2, 1]);
        golden[16..20].copy_from_slice(&[0x20, 1, 0x0d, 0xb8]);
        golden[31] = 1;
        let moved = Moved { epoch: 3, address };
        assert_eq!((moved.emit(), MOVED), (golden, 64));
        assert_eq!(Moved::parse(&golden), Some(moved));
    }

    proptest! {
        #[test]
        fn whatever_parses_emits_to_the_same(bytes: [u8; MOVED_SECRET], family in 0u8..8) {
            let mut bytes = bytes;
            bytes[8..10].copy_from_slice(&[family, 0]);
            bytes[12..16].fill(0);
            if let Some(moved) = Moved::parse(&bytes) {
                prop_assert_eq!(moved.emit(), bytes);
            }
        }
    }
}
