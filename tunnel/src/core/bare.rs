//! IPv4 and IPv6 in IPv4, and in UDP, without encryption or key.
//!
//! In IP the outer header has TTL 64, copies DF and the congestion mark, and is left
//! to the kernel where the kernel knows better (source, identification, checksum). In
//! UDP the payload is the packet. Inward, the peer is known by the outer source alone:
//! its address in ipip mode, its address and port in ip-udp mode.
//!
//! Sources: RFC 2003 (IPv4 in IPv4), RFC 4213 (IPv6 in IPv4), RFC 6040 (ECN); Linux
//! `net/ipv4/fou_core.c` (GUE variant 1: an IP header directly behind UDP's).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use conet_dataplane::DropReason;
use conet_wire::ip::{Ecn, IPV4_HEADER, IpView, OuterV4, PROTO_IPV4, PROTO_IPV6, packet_length};

use super::peer::Peer;
use super::routes::Slot;
use super::{Core, Destination, Outbox, Replies};
use crate::{Inner, Mode, Outgoing};

/// Hops of an outer packet (RFC 2003 §3.1 asks for the default; RFC 1700: 64).
const OUTER_TTL: u8 = 64;

/// Puts an outer header before each packet, in the outbox.
pub(crate) fn over_ip(
    peer: &mut Peer,
    packet: &Outgoing<'_>,
    out: &mut Outbox,
) -> Result<(), DropReason> {
    let destination = peer.ipip_endpoint().ok_or(DropReason::NoEndpoint)?;
    let view = packet.view();
    if is_tunnel(view) {
        return Err(DropReason::Nested);
    }
    let mut header = OuterV4 {
        source: Ipv4Addr::UNSPECIFIED,
        destination,
        protocol: if view.is_v6() { PROTO_IPV6 } else { PROTO_IPV4 },
        ttl: OUTER_TTL,
        ecn: view.ecn(),
        dont_fragment: view.dont_fragment(),
        total_len: 0,
    };
    for index in 0..packet.count() {
        let len = packet.len_of(index);
        let total = IPV4_HEADER + len;
        header.total_len = u16::try_from(total).map_err(|_| DropReason::TooLong)?;
        let space = out.reserve(Destination::Ip(destination), Ecn::NotEct, total, total);
        let Some((outer, inner)) = space.split_first_chunk_mut::<IPV4_HEADER>() else {
            return Err(DropReason::TooLong);
        };
        header.emit(outer);
        packet.write(index, inner);
        out.commit(total);
        peer.tx.count(1, len);
    }
    Ok(())
}

/// Makes each packet a datagram, in the outbox.
pub(crate) fn over_udp(
    peer: &mut Peer,
    packet: &Outgoing<'_>,
    out: &mut Outbox,
) -> Result<(), DropReason> {
    let endpoint = peer.endpoint.ok_or(DropReason::NoEndpoint)?;
    let view = packet.view();
    if is_tunnel(view) {
        return Err(DropReason::Nested);
    }
    for index in 0..packet.count() {
        let len = packet.len_of(index);
        packet.write(index, out.reserve(Destination::Udp(endpoint), view.ecn(), len, len));
        out.commit(len);
        peer.tx.count(1, len);
    }
    Ok(())
}

impl Core {
    /// An IPv4 packet of protocol 4 or 41 from the network, with its header. Gives
    /// where the packet inside is, if it may go to the device.
    pub fn handle_ip(&mut self, datagram: &mut [u8], _back: &mut Replies) -> Option<Inner> {
        match self.find_sender(datagram) {
            Ok(slot) => {
                let inner = self.unwrap_ip(slot, datagram);
                inner.map_err(|reason| self.drop_from(slot, reason)).ok()
            }
            Err(reason) => {
                self.drops.count(reason);
                None
            }
        }
    }

    /// A datagram that begins as an IP packet does.
    pub(super) fn handle_bare(
        &mut self,
        from: SocketAddr,
        ecn: Ecn,
        datagram: &mut [u8],
    ) -> Option<Inner> {
        let found = self.by_endpoint.get(&from).copied();
        // Tell a peer in another mode from a stranger: the remedies differ.
        let other = || self.position(|peer| peer.endpoint == Some(from));
        let Some(slot) = found.or_else(other) else {
            self.drops.count(DropReason::UnknownPeer);
            return None;
        };
        let inner = match found {
            // The kernel has verified the outer checksum, which covers the packet.
            Some(slot) => self.unwrap_packet(slot, ecn, datagram, true),
            None => Err(DropReason::WrongMode),
        };
        inner.map_err(|reason| self.drop_from(slot, reason)).ok()
    }

    fn position(&self, is_it: impl Fn(&Peer) -> bool) -> Option<Slot> {
        let found = self.peers.iter().position(|peer| peer.as_ref().is_some_and(&is_it));
        found.and_then(|slot| Slot::try_from(slot).ok())
    }

    fn find_sender(&self, datagram: &[u8]) -> Result<Slot, DropReason> {
        let outer = IpView::new(datagram).map_err(|_| DropReason::Malformed)?;
        let IpAddr::V4(source) = outer.source() else { return Err(DropReason::Malformed) };
        let found = self.by_address.get(&source).copied();
        found
            .or_else(|| self.position(|peer| peer.ipip_endpoint() == Some(source)))
            .ok_or(DropReason::UnknownPeer)
    }

    fn unwrap_ip(&mut self, slot: Slot, datagram: &mut [u8]) -> Result<Inner, DropReason> {
        let mode = self.peer_mut(slot).map(|peer| peer.mode);
        if mode != Some(Mode::IpIp) {
            return Err(DropReason::WrongMode);
        }
        let outer = IpView::new(&*datagram).map_err(|_| DropReason::Malformed)?;
        if outer.is_fragment() {
            return Err(DropReason::OuterFragment);
        }
        let (ecn, protocol, header) = (outer.ecn(), outer.protocol(), outer.header_len());
        let packet = &mut datagram[header..];
        match (protocol, packet.first().map(|first| first >> 4)) {
            (PROTO_IPV4, Some(4)) | (PROTO_IPV6, Some(6)) => {}
            _ => return Err(DropReason::Malformed),
        }
        let Inner { at, trusted } = self.unwrap_packet(slot, ecn, packet, false)?;
        Ok(Inner { at: header + at.start..header + at.end, trusted })
    }

    /// Checks the packet that came bare, with whatever padding some link has put
    /// behind it, and marks it.
    fn unwrap_packet(
        &mut self,
        slot: Slot,
        ecn: Ecn,
        bytes: &mut [u8],
        trusted: bool,
    ) -> Result<Inner, DropReason> {
        let len = packet_length(bytes).map_err(|_| DropReason::Malformed)?;
        let mut inner = IpView::new(&mut bytes[..len]).map_err(|_| DropReason::Malformed)?;
        if is_tunnel(&inner) {
            return Err(DropReason::Nested);
        }
        self.check_inner(slot, &inner)?;
        let before = inner.ecn();
        let marked = before.decapsulated_under(ecn).ok_or(DropReason::Congestion)?;
        if marked != before {
            inner.set_ecn(marked);
        }
        if let Some(peer) = self.peer_mut(slot) {
            peer.rx.count(1, len);
        }
        Ok(Inner { at: 0..len, trusted })
    }
}

fn is_tunnel<T: AsRef<[u8]>>(view: &IpView<T>) -> bool {
    matches!(view.protocol(), PROTO_IPV4 | PROTO_IPV6)
}
