//! IPv4 and IPv6 headers as tunnels need them: read, mark, wrap.
//!
//! A [`IpView`] checks a packet once (version, header length, total length);
//! after that no accessor can fail or panic. It is not a stack: no options are
//! interpreted, no IPv6 extension header is walked, the IPv4 header checksum is
//! not verified (the sending kernel made it, the receiving kernel checks it).
//!
//! ```text
//! IPv4 0       1       2               4               IPv6
//!      ver|ihl tos|ecn total length    identification  ver|class|flow label
//!      flags|fragment  ttl|protocol    checksum        payload length|next|hops
//!      source          destination     options...      source(16) destination(16)
//! ```
//!
//! Sources: RFC 791 §3.1, RFC 8200 §3, RFC 1071 and RFC 1624 for checksums,
//! RFC 6040 for ECN in tunnels, RFC 792 and RFC 4443 for the errors.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bytes of an IPv4 header without options.
pub const IPV4_HEADER: usize = 20;
/// Bytes of an IPv6 header.
pub const IPV6_HEADER: usize = 40;
/// Protocol number of IPv4 in IP (RFC 2003).
pub const PROTO_IPV4: u8 = 4;
/// Protocol number of IPv6 in IP (RFC 4213).
pub const PROTO_IPV6: u8 = 41;
/// Protocol number of ICMP.
pub const PROTO_ICMP: u8 = 1;
/// Protocol number of ICMPv6.
pub const PROTO_ICMPV6: u8 = 58;
/// IPv6 next-header value of a fragment header.
const PROTO_IPV6_FRAGMENT: u8 = 44;

const FLAG_DONT_FRAGMENT: u8 = 0x40;

/// Why bytes are no IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpError {
    /// Fewer bytes than the header says or than a header has.
    Truncated,
    /// Neither version 4 nor version 6.
    Version,
    /// A length field contradicts another.
    Length,
}

/// Explicit congestion notification codepoint (RFC 3168 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Ecn {
    /// The transport does not take part.
    #[default]
    NotEct = 0,
    /// Capable, second codepoint.
    Ect1 = 1,
    /// Capable, first codepoint.
    Ect0 = 2,
    /// Congestion experienced.
    Ce = 3,
}

impl Ecn {
    /// The codepoint in the two low bits.
    pub fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Ecn::NotEct,
            1 => Ecn::Ect1,
            2 => Ecn::Ect0,
            _ => Ecn::Ce,
        }
    }

    /// What the inner header shall bear after decapsulation, or `None` when the
    /// packet must be dropped (RFC 6040 §4.2, figure 4).
    ///
    /// `self` is the inner codepoint as it arrived.
    #[must_use]
    pub fn decapsulated_under(self, outer: Ecn) -> Option<Ecn> {
        match (self, outer) {
            (Ecn::NotEct, Ecn::Ce) => None,
            (Ecn::NotEct, _) => Some(Ecn::NotEct),
            (_, Ecn::Ce) => Some(Ecn::Ce),
            (Ecn::Ect0, Ecn::Ect1) => Some(Ecn::Ect1),
            (inner, _) => Some(inner),
        }
    }
}

/// A packet whose lengths have been checked.
///
/// Invariant: the bytes hold a whole header and exactly `total length` bytes, or, of a
/// packet that is quoted, any number.
#[derive(Debug, Clone, Copy)]
pub struct IpView<T> {
    bytes: T,
    v6: bool,
}

impl<T: AsRef<[u8]>> IpView<T> {
    /// Checks `bytes`, which must be exactly one packet.
    ///
    /// # Errors
    /// [`IpError`] when the header lies about its lengths; trailing bytes count
    /// as such a lie.
    pub fn new(bytes: T) -> Result<Self, IpError> {
        let packet = bytes.as_ref();
        let total = packet_length(packet)?;
        if packet.len() > total {
            return Err(IpError::Length);
        }
        let v6 = packet[0] >> 4 == 6;
        Ok(Self { bytes, v6 })
    }

    /// Checks the header of a packet that an ICMP error quotes: what follows it may be
    /// cut short, so that the lengths of the header and of the bytes differ.
    ///
    /// # Errors
    /// [`IpError`] when there is no whole header.
    pub fn quoted(bytes: T) -> Result<Self, IpError> {
        let packet = bytes.as_ref();
        let v6 = match packet.first().map(|first| first >> 4) {
            None => return Err(IpError::Truncated),
            Some(4) if usize::from(packet[0] & 0xf) * 4 < IPV4_HEADER => {
                return Err(IpError::Length);
            }
            Some(4) => false,
            Some(6) => true,
            Some(_) => return Err(IpError::Version),
        };
        let header = if v6 { IPV6_HEADER } else { usize::from(packet[0] & 0xf) * 4 };
        if packet.len() < header { Err(IpError::Truncated) } else { Ok(Self { bytes, v6 }) }
    }

    /// Whether it is IPv6.
    pub fn is_v6(&self) -> bool {
        self.v6
    }

    /// The whole packet.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// Source address.
    pub fn source(&self) -> IpAddr {
        if self.v6 { v6_at(self.bytes(), 8) } else { v4_at(self.bytes(), 12) }
    }

    /// Destination address.
    pub fn destination(&self) -> IpAddr {
        if self.v6 { v6_at(self.bytes(), 24) } else { v4_at(self.bytes(), 16) }
    }

    /// Congestion codepoint.
    pub fn ecn(&self) -> Ecn {
        let b = self.bytes();
        Ecn::from_bits(if self.v6 { b[1] >> 4 } else { b[1] })
    }

    /// Hops left (TTL, hop limit).
    pub fn hops(&self) -> u8 {
        self.bytes()[if self.v6 { 7 } else { 8 }]
    }

    /// Protocol of the payload; for IPv6 the first next-header value.
    pub fn protocol(&self) -> u8 {
        self.bytes()[if self.v6 { 6 } else { 9 }]
    }

    /// Whether routers may not fragment it; always so for IPv6.
    pub fn dont_fragment(&self) -> bool {
        self.v6 || self.bytes()[6] & FLAG_DONT_FRAGMENT != 0
    }

    /// Whether it is a part of a larger packet. For IPv6 only a fragment header
    /// that comes first is seen.
    pub fn is_fragment(&self) -> bool {
        let b = self.bytes();
        if self.v6 {
            self.protocol() == PROTO_IPV6_FRAGMENT
        } else {
            u16::from_be_bytes([b[6], b[7]]) & 0x3fff != 0
        }
    }

    /// Whether it is a part other than the first.
    fn is_later_fragment(&self) -> bool {
        let b = self.bytes();
        if self.v6 {
            // Fragment header: next, reserved, offset in the upper 13 bits.
            self.is_fragment()
                && b.get(IPV6_HEADER + 2..IPV6_HEADER + 4)
                    .is_none_or(|o| u16::from_be_bytes([o[0], o[1]]) & 0xfff8 != 0)
        } else {
            u16::from_be_bytes([b[6], b[7]]) & 0x1fff != 0
        }
    }

    /// Bytes of the header with its options, without IPv6 extensions.
    pub fn header_len(&self) -> usize {
        if self.v6 { IPV6_HEADER } else { usize::from(self.bytes()[0] & 0xf) * 4 }
    }

    /// What follows the header.
    pub fn payload(&self) -> &[u8] {
        &self.bytes()[self.header_len()..]
    }

    /// Whether an ICMP error may be sent about it: no errors about errors, about
    /// later fragments, about multicast (RFC 1122 §3.2.2, RFC 4443 §2.4(e)).
    pub fn may_cause_error(&self) -> bool {
        let about_error = match (self.v6, self.protocol(), self.payload().first()) {
            // Types that are questions or answers, not errors.
            (false, PROTO_ICMP, Some(kind)) => !matches!(kind, 0 | 8 | 13 | 14),
            (true, PROTO_ICMPV6, Some(kind)) => *kind < 128,
            (false, PROTO_ICMP, None) | (true, PROTO_ICMPV6, None) => true,
            _ => false,
        };
        !about_error
            && !self.is_later_fragment()
            && is_unicast(self.source())
            && is_unicast(self.destination())
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> IpView<T> {
    /// Changes the congestion codepoint, and the IPv4 checksum with it
    /// (RFC 1624 equation 3).
    pub fn set_ecn(&mut self, ecn: Ecn) {
        let v6 = self.v6;
        let b = self.bytes.as_mut();
        if v6 {
            b[1] = b[1] & 0xcf | (ecn as u8) << 4;
            return;
        }
        let old = u16::from_be_bytes([b[0], b[1]]);
        b[1] = b[1] & 0xfc | ecn as u8;
        let new = u16::from_be_bytes([b[0], b[1]]);
        let sum = u16::from_be_bytes([b[10], b[11]]);
        let sum = fold(u32::from(!sum) + u32::from(!old) + u32::from(new));
        b[10..12].copy_from_slice(&(!sum).to_be_bytes());
    }
}

/// Total length in bytes that the header states, checked against `bytes`, which
/// may be longer.
///
/// # Errors
/// As [`stated_length`], and where there are fewer bytes than stated.
pub fn packet_length(bytes: &[u8]) -> Result<usize, IpError> {
    let total = stated_length(bytes)?;
    if bytes.len() < total { Err(IpError::Truncated) } else { Ok(total) }
}

/// Total length in bytes that the header states, however many `bytes` there are behind it.
///
/// # Errors
/// [`IpError`] when the header is cut short or contradicts itself. IPv6 jumbo
/// payloads (RFC 2675) are refused: no tunnel here carries them.
pub fn stated_length(bytes: &[u8]) -> Result<usize, IpError> {
    let total = match bytes.first().map(|b| b >> 4) {
        None => return Err(IpError::Truncated),
        Some(4) if bytes.len() < IPV4_HEADER => return Err(IpError::Truncated),
        Some(4) => {
            let header = usize::from(bytes[0] & 0xf) * 4;
            let total = usize::from(u16::from_be_bytes([bytes[2], bytes[3]]));
            if header < IPV4_HEADER || total < header {
                return Err(IpError::Length);
            }
            total
        }
        Some(6) if bytes.len() < IPV6_HEADER => return Err(IpError::Truncated),
        Some(6) => {
            let payload = usize::from(u16::from_be_bytes([bytes[4], bytes[5]]));
            if payload == 0 && bytes[6] == 0 {
                return Err(IpError::Length);
            }
            IPV6_HEADER + payload
        }
        Some(_) => return Err(IpError::Version),
    };
    Ok(total)
}

/// Whether an address names one interface somewhere: not multicast, broadcast,
/// loopback or unspecified.
pub fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            !(a.is_multicast() || a.is_broadcast() || a.is_loopback() || a.octets()[0] == 0)
        }
        IpAddr::V6(a) => !(a.is_multicast() || a.is_loopback() || a.is_unspecified()),
    }
}

/// An outer IPv4 header for a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OuterV4 {
    /// Source; 0.0.0.0 lets the kernel choose (`raw(7)`, IP_HDRINCL).
    pub source: Ipv4Addr,
    /// Destination.
    pub destination: Ipv4Addr,
    /// [`PROTO_IPV4`] or [`PROTO_IPV6`].
    pub protocol: u8,
    /// Hops.
    pub ttl: u8,
    /// Congestion codepoint.
    pub ecn: Ecn,
    /// Routers may not fragment it.
    pub dont_fragment: bool,
    /// Bytes of header and payload.
    pub total_len: u16,
}

impl OuterV4 {
    /// Writes the header with its checksum. The identification is 0, which is
    /// right for packets that are never fragmented (RFC 6864 §4.1) and which a
    /// Linux raw socket replaces otherwise (`raw(7)`).
    pub fn emit(&self, out: &mut [u8; IPV4_HEADER]) {
        *out = [0; IPV4_HEADER];
        out[0] = 0x45;
        out[1] = self.ecn as u8;
        out[2..4].copy_from_slice(&self.total_len.to_be_bytes());
        out[6] = if self.dont_fragment { FLAG_DONT_FRAGMENT } else { 0 };
        out[8] = self.ttl;
        out[9] = self.protocol;
        out[12..16].copy_from_slice(&self.source.octets());
        out[16..20].copy_from_slice(&self.destination.octets());
        let sum = checksum(&out[..], 0);
        out[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Most bytes of an error that [`error`] writes: 576 for IPv4 (RFC 1812
/// §4.3.2.3), 1280 for IPv6 (RFC 4443 §2.4(c)).
pub const ICMP_ERROR_MAX: usize = 1280;

/// What a sender is told about its packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IcmpError {
    /// Send at most so many bytes: Fragmentation Needed (RFC 1191 §4), Packet Too Big
    /// (RFC 4443 §3.2).
    TooBig(u16),
    /// Host Unreachable (RFC 792), Address Unreachable (RFC 4443 §3.1).
    Unreachable,
}

/// As [`error`] with [`IcmpError::TooBig`].
pub fn too_big<T: AsRef<[u8]>>(
    packet: &IpView<T>,
    from: IpAddr,
    mtu: u16,
    out: &mut [u8; ICMP_ERROR_MAX],
) -> Option<usize> {
    error(packet, from, IcmpError::TooBig(mtu), out)
}

/// Writes the error that tells the sender of `packet` what became of it. Gives its
/// length, or `None` when no error may be sent about the packet or when `from` is of
/// the other family.
pub fn error<T: AsRef<[u8]>>(
    packet: &IpView<T>,
    from: IpAddr,
    what: IcmpError,
    out: &mut [u8; ICMP_ERROR_MAX],
) -> Option<usize> {
    if !packet.may_cause_error() {
        return None;
    }
    match (from, packet.source()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let quoted = packet.bytes().len().min(576 - IPV4_HEADER - 8);
            let total = IPV4_HEADER + 8 + quoted;
            let header = OuterV4 {
                source: from,
                destination: to,
                protocol: PROTO_ICMP,
                ttl: 64,
                ecn: Ecn::NotEct,
                dont_fragment: false,
                total_len: u16::try_from(total).ok()?,
            };
            header.emit(out.first_chunk_mut()?);
            let icmp = &mut out[IPV4_HEADER..total];
            let (code, mtu) = match what {
                IcmpError::TooBig(mtu) => (4, mtu),
                IcmpError::Unreachable => (1, 0),
            };
            icmp[..8].copy_from_slice(&[3, code, 0, 0, 0, 0, 0, 0]);
            icmp[6..8].copy_from_slice(&mtu.to_be_bytes());
            icmp[8..].copy_from_slice(&packet.bytes()[..quoted]);
            let sum = checksum(icmp, 0);
            icmp[2..4].copy_from_slice(&sum.to_be_bytes());
            Some(total)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let quoted = packet.bytes().len().min(ICMP_ERROR_MAX - IPV6_HEADER - 8);
            let length = 8 + quoted;
            let total = IPV6_HEADER + length;
            out[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, PROTO_ICMPV6, 64]);
            out[4..6].copy_from_slice(&u16::try_from(length).ok()?.to_be_bytes());
            out[8..24].copy_from_slice(&from.octets());
            out[24..40].copy_from_slice(&to.octets());
            // The pseudo-header of RFC 8200 §8.1: both addresses, length, next header.
            let pseudo =
                sum_of(&out[8..40]) + u32::try_from(length).ok()? + u32::from(PROTO_ICMPV6);
            let icmp = &mut out[IPV6_HEADER..total];
            let (kind, code, mtu) = match what {
                IcmpError::TooBig(mtu) => (2, 0, mtu),
                IcmpError::Unreachable => (1, 3, 0),
            };
            icmp[..8].copy_from_slice(&[kind, code, 0, 0, 0, 0, 0, 0]);
            icmp[4..8].copy_from_slice(&u32::from(mtu).to_be_bytes());
            icmp[8..].copy_from_slice(&packet.bytes()[..quoted]);
            let sum = checksum(icmp, pseudo);
            icmp[2..4].copy_from_slice(&sum.to_be_bytes());
            Some(total)
        }
        _ => None,
    }
}

/// Internet checksum of `bytes`, begun with `initial` (RFC 1071).
pub fn checksum(bytes: &[u8], initial: u32) -> u16 {
    !fold(sum_of(bytes) + initial)
}

fn sum_of(bytes: &[u8]) -> u32 {
    let mut pairs = bytes.chunks_exact(2);
    let mut sum: u32 = 0;
    for pair in &mut pairs {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    match pairs.remainder() {
        [last] => sum + u32::from(u16::from_be_bytes([*last, 0])),
        _ => sum,
    }
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // The loop ends at a value of 16 bits.
    u16::try_from(sum).unwrap_or(u16::MAX)
}

fn v4_at(bytes: &[u8], at: usize) -> IpAddr {
    let mut octets = [0; 4];
    octets.copy_from_slice(&bytes[at..at + 4]);
    IpAddr::V4(Ipv4Addr::from(octets))
}

fn v6_at(bytes: &[u8], at: usize) -> IpAddr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[at..at + 16]);
    IpAddr::V6(Ipv6Addr::from(octets))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use pnet_packet::{icmp, icmpv6, ipv4, ipv6};
    use std::vec;
    use std::vec::Vec;

    fn v4(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; IPV4_HEADER + payload.len()];
        let header = OuterV4 {
            source: Ipv4Addr::new(10, 77, 1, 2),
            destination: Ipv4Addr::new(10, 77, 2, 2),
            protocol: 17,
            ttl: 63,
            ecn: Ecn::Ect0,
            dont_fragment: true,
            total_len: u16::try_from(bytes.len()).unwrap(),
        };
        header.emit(bytes.first_chunk_mut().unwrap());
        bytes[IPV4_HEADER..].copy_from_slice(payload);
        bytes
    }

    fn v6(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; IPV6_HEADER];
        bytes[0] = 0x60;
        bytes[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        bytes[6] = 17;
        bytes[7] = 63;
        bytes[8] = 0xfd;
        bytes[23] = 2;
        bytes[24] = 0xfd;
        bytes[39] = 3;
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn headers_agree_with_an_independent_parser() {
        let bytes = v4(b"payload");
        let theirs = ipv4::Ipv4Packet::new(&bytes).unwrap();
        let ours = IpView::new(&bytes).unwrap();
        assert_eq!(ours.source(), IpAddr::V4(theirs.get_source()));
        assert_eq!(ours.destination(), IpAddr::V4(theirs.get_destination()));
        assert_eq!(ours.hops(), theirs.get_ttl());
        assert_eq!(ours.protocol(), theirs.get_next_level_protocol().0);
        assert_eq!(ours.ecn() as u8, theirs.get_ecn());
        assert!(ours.dont_fragment() && !ours.is_fragment());
        assert_eq!(theirs.get_checksum(), ipv4::checksum(&theirs));
        assert_eq!(ours.payload(), b"payload");

        let bytes = v6(b"payload");
        let theirs = ipv6::Ipv6Packet::new(&bytes).unwrap();
        let ours = IpView::new(&bytes).unwrap();
        assert_eq!(ours.source(), IpAddr::V6(theirs.get_source()));
        assert_eq!(ours.destination(), IpAddr::V6(theirs.get_destination()));
        assert_eq!(ours.hops(), theirs.get_hop_limit());
        assert_eq!(ours.payload(), b"payload");
    }

    #[test]
    fn the_checksum_follows_the_mark() {
        for ecn in [Ecn::NotEct, Ecn::Ect1, Ecn::Ect0, Ecn::Ce] {
            let mut bytes = v4(b"x");
            IpView::new(&mut bytes).unwrap().set_ecn(ecn);
            assert_eq!(IpView::new(&bytes).unwrap().ecn(), ecn);
            let theirs = ipv4::Ipv4Packet::new(&bytes).unwrap();
            assert_eq!(theirs.get_checksum(), ipv4::checksum(&theirs), "{ecn:?}");
            let mut bytes = v6(b"x");
            IpView::new(&mut bytes).unwrap().set_ecn(ecn);
            assert_eq!(IpView::new(&bytes).unwrap().ecn(), ecn);
        }
    }

    /// RFC 6040 §4.2, figure 4, row by row (inner) and column by column (outer).
    #[test]
    fn ecn_decapsulates_as_the_table_says() {
        use Ecn::{Ce, Ect0, Ect1, NotEct};
        let outers = [NotEct, Ect0, Ect1, Ce];
        let table = [
            (NotEct, [Some(NotEct), Some(NotEct), Some(NotEct), None]),
            (Ect0, [Some(Ect0), Some(Ect0), Some(Ect1), Some(Ce)]),
            (Ect1, [Some(Ect1), Some(Ect1), Some(Ect1), Some(Ce)]),
            (Ce, [Some(Ce), Some(Ce), Some(Ce), Some(Ce)]),
        ];
        for (inner, row) in table {
            for (outer, expected) in outers.into_iter().zip(row) {
                assert_eq!(inner.decapsulated_under(outer), expected, "{inner:?} {outer:?}");
            }
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        assert_eq!(IpView::new(&[][..]).unwrap_err(), IpError::Truncated);
        assert_eq!(IpView::new(&[0x50; 60][..]).unwrap_err(), IpError::Version);
        let whole = v4(&[7; 100]);
        for n in 1..whole.len() {
            assert_eq!(IpView::new(&whole[..n]).unwrap_err(), IpError::Truncated, "{n}");
        }
        let mut longer = whole.clone();
        longer.push(0);
        assert_eq!(IpView::new(&longer).unwrap_err(), IpError::Length);
        assert_eq!(packet_length(&longer), Ok(whole.len()));
        let mut short_header = whole.clone();
        short_header[0] = 0x44;
        assert_eq!(IpView::new(&short_header).unwrap_err(), IpError::Length);
        let mut short_total = whole;
        short_total[2..4].copy_from_slice(&19u16.to_be_bytes());
        assert_eq!(IpView::new(&short_total).unwrap_err(), IpError::Length);
        let mut jumbo = v6(&[]);
        jumbo[6] = 0;
        assert_eq!(IpView::new(&jumbo).unwrap_err(), IpError::Length);
    }

    #[test]
    fn too_big_is_told_with_the_mtu_and_the_start_of_the_packet() {
        let mut out = [0; ICMP_ERROR_MAX];
        let packet = v4(&[9; 1400]);
        let from = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 1));
        let view = IpView::new(&packet).unwrap();
        let n = too_big(&view, from, 1380, &mut out).unwrap();
        assert_eq!(n, 576);
        let outer = ipv4::Ipv4Packet::new(&out[..n]).unwrap();
        assert_eq!(IpAddr::V4(outer.get_destination()), view.source());
        assert_eq!(outer.get_checksum(), ipv4::checksum(&outer));
        let icmp = icmp::IcmpPacket::new(&out[IPV4_HEADER..n]).unwrap();
        assert_eq!((icmp.get_icmp_type().0, icmp.get_icmp_code().0), (3, 4));
        assert_eq!(icmp.get_checksum(), icmp::checksum(&icmp));
        assert_eq!(out[26..28], 1380u16.to_be_bytes());
        assert_eq!(out[28..576], packet[..548]);
        assert_eq!(too_big(&view, IpAddr::V6(Ipv6Addr::LOCALHOST), 1380, &mut out), None);

        let packet = v6(&[9; 1400]);
        let view = IpView::new(&packet).unwrap();
        let from: Ipv6Addr = "fd00::1".parse().unwrap();
        let n = too_big(&view, IpAddr::V6(from), 1360, &mut out).unwrap();
        assert_eq!(n, 1280);
        let outer = ipv6::Ipv6Packet::new(&out[..n]).unwrap();
        let icmp = icmpv6::Icmpv6Packet::new(&out[IPV6_HEADER..n]).unwrap();
        assert_eq!(icmp.get_icmpv6_type().0, 2);
        let sum = icmpv6::checksum(&icmp, &outer.get_source(), &outer.get_destination());
        assert_eq!(icmp.get_checksum(), sum);

        // The error itself causes no further error.
        let error = IpView::new(&out[..n]).unwrap();
        assert!(!error.may_cause_error());
    }

    #[test]
    fn no_error_about_multicast_or_later_fragments() {
        let mut packet = v4(&[9; 40]);
        assert!(IpView::new(&packet).unwrap().may_cause_error());
        packet[7] = 1;
        assert!(IpView::new(&packet).unwrap().is_fragment());
        assert!(!IpView::new(&packet).unwrap().may_cause_error());
        let mut packet = v4(&[9; 40]);
        packet[16] = 224;
        assert!(!IpView::new(&packet).unwrap().may_cause_error());
    }
}
