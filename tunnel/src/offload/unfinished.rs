//! Packets that somebody has left unfinished, since they never were on a wire.
//!
//! Where sender and receiver share a machine (veth, virtio), and by its source where the
//! receiver's kernel has joined what came (GRO), a raw socket is given what a device would be given:
//! up to 64 KiB of a flow in one packet, and in place of the checksum the sum of the
//! pseudo-header only. A device is told so by a header before the packet; a raw socket is
//! not. It shows all the same: a checksum field that holds exactly that sum is one that
//! nobody has finished, or by a chance of one in 65,536 a finished one, which stays right
//! when it is taken for the other. A spoilt packet passes for one as rarely as its
//! checksum would be right by chance.
//!
//! How long the segments are, no header of the packet says. For TCP any length will do.
//! The programs in the kernel (`netsys/bpf/ipip.bpf.c`) write it to the identification of
//! the outer header, which means nothing beside Don't Fragment (RFC 6864 §4.1).
//!
//! Sources: Linux `include/linux/skbuff.h` (CHECKSUM_PARTIAL), `tcp4_gro_complete`,
//! `udp_send_skb`.

use super::checksum::pseudo;
use super::join::Kind;
use super::{HEADER, Header, NEEDS_CHECKSUM, TCP_V4, TCP_V6, UDP, u16_at};

/// What is to be done with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unfinished {
    /// Nothing: it is finished, or not understood here.
    No,
    /// It goes behind this virtio-net header.
    Behind([u8; HEADER]),
    /// It is many datagrams in one, and nobody says where each ends.
    Lost,
}

/// `segment` is what the outer header may tell of the payload of each of many, in bytes; 0
/// is nothing. A packet longer than `mtu` is many.
pub(crate) fn unfinished(packet: &[u8], segment: u16, mtu: u16) -> Unfinished {
    let Some(kind) = Kind::of(packet) else { return Unfinished::No };
    let (is_tcp, is_v6) = (kind.is_tcp, kind.is_v6);
    let at = if is_tcp { 16 } else { 6 };
    // No longer than its length field says, which has 16 bits.
    let Ok(own_len) = u16::try_from(packet.len() - kind.transport) else { return Unfinished::No };
    let sum = pseudo(packet, is_v6, kind.protocol(), own_len).folded();
    if u16_at(packet, kind.transport + at) != sum {
        return Unfinished::No;
    }
    let small = |len: usize| u16::try_from(len).unwrap_or(u16::MAX);
    let mut header = Header {
        flags: NEEDS_CHECKSUM,
        checksum_from: small(kind.transport),
        checksum_at: small(at),
        header_len: small(kind.headers),
        ..Header::default()
    };
    let payload = usize::from(mtu).saturating_sub(kind.headers);
    if packet.len() > usize::from(mtu) && payload > 0 {
        let is_told = (1..=payload).contains(&usize::from(segment));
        header.size = match (is_told, is_tcp) {
            (true, _) => segment,
            (false, true) => small(payload),
            (false, false) => return Unfinished::Lost,
        };
        header.kind = match (is_tcp, is_v6) {
            (true, false) => TCP_V4,
            (true, true) => TCP_V6,
            (false, _) => UDP,
        };
    }
    Unfinished::Behind(header.emit())
}
