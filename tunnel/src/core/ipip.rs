//! IPv4 and IPv6 in IPv4, without encryption or key.
//!
//! The outer header has TTL 64, copies DF and the congestion mark, and is left
//! to the kernel where the kernel knows better (source, identification,
//! checksum). Inward, the peer is known by the outer source alone.
//!
//! Sources: RFC 2003 (IPv4 in IPv4), RFC 4213 (IPv6 in IPv4), RFC 6040 (ECN).

use std::net::{IpAddr, Ipv4Addr};

use conet_dataplane::DropReason;
use conet_wire::ip::{Ecn, IPV4_HEADER, IpView, OuterV4, PROTO_IPV4, PROTO_IPV6, packet_length};

use super::peer::Peer;
use super::routes::Slot;
use super::{Core, Destination, Inbox, Outbox};
use crate::Mode;

/// Hops of an outer packet (RFC 2003 §3.1 asks for the default; RFC 1700: 64).
const OUTER_TTL: u8 = 64;

/// Puts an outer header before a packet, in the outbox.
pub(crate) fn encapsulate(
    peer: &mut Peer,
    view: &IpView<&[u8]>,
    out: &mut Outbox,
) -> Result<(), DropReason> {
    let destination = peer.ipip_endpoint().ok_or(DropReason::NoEndpoint)?;
    if is_tunnel(view) {
        return Err(DropReason::Nested);
    }
    let packet = view.bytes();
    let total = IPV4_HEADER + packet.len();
    let header = OuterV4 {
        source: Ipv4Addr::UNSPECIFIED,
        destination,
        protocol: if view.is_v6() { PROTO_IPV6 } else { PROTO_IPV4 },
        ttl: OUTER_TTL,
        ecn: view.ecn(),
        dont_fragment: view.dont_fragment(),
        total_len: u16::try_from(total).map_err(|_| DropReason::TooLong)?,
    };
    let space = out.reserve(Destination::Ip(destination), Ecn::NotEct, total, total);
    let Some((outer, inner)) = space.split_first_chunk_mut::<IPV4_HEADER>() else {
        return Err(DropReason::TooLong);
    };
    header.emit(outer);
    inner.copy_from_slice(packet);
    out.commit(total);
    peer.tx.count(packet.len());
    Ok(())
}

impl Core {
    /// An IPv4 packet of protocol 4 or 41 from the network, with its header.
    pub fn handle_ip(&mut self, datagram: &[u8], inbox: &mut Inbox) {
        match self.find_sender(datagram) {
            Ok((slot, outer)) => {
                if let Err(reason) = self.unwrap(slot, &outer, inbox) {
                    self.drop_from(slot, reason);
                }
            }
            Err(reason) => self.drops.count(reason),
        }
    }

    fn find_sender<'a>(&self, datagram: &'a [u8]) -> Result<(Slot, IpView<&'a [u8]>), DropReason> {
        let outer = IpView::new(datagram).map_err(|_| DropReason::Malformed)?;
        let IpAddr::V4(source) = outer.source() else { return Err(DropReason::Malformed) };
        if let Some(&slot) = self.by_address.get(&source) {
            return Ok((slot, outer));
        }
        // Tell a peer in another mode from a stranger: the remedies differ.
        let other = self
            .peers
            .iter()
            .position(|peer| peer.as_ref().is_some_and(|p| p.ipip_endpoint() == Some(source)));
        match other.and_then(|slot| Slot::try_from(slot).ok()) {
            Some(slot) => Ok((slot, outer)),
            None => Err(DropReason::UnknownPeer),
        }
    }

    fn unwrap(
        &mut self,
        slot: Slot,
        outer: &IpView<&[u8]>,
        inbox: &mut Inbox,
    ) -> Result<(), DropReason> {
        let mode = self.peer_mut(slot).map(|peer| peer.mode);
        if mode != Some(Mode::IpIp) {
            return Err(DropReason::WrongMode);
        }
        if outer.is_fragment() {
            return Err(DropReason::OuterFragment);
        }
        let payload = outer.payload();
        let len = packet_length(payload).map_err(|_| DropReason::Malformed)?;
        // Bytes after the inner packet are padding of some link.
        let inner = IpView::new(&payload[..len]).map_err(|_| DropReason::Malformed)?;
        match (outer.protocol(), inner.is_v6()) {
            (PROTO_IPV4, false) | (PROTO_IPV6, true) => {}
            _ => return Err(DropReason::Malformed),
        }
        if is_tunnel(&inner) {
            return Err(DropReason::Nested);
        }
        self.check_inner(slot, &inner)?;
        let marked = inner.ecn().decapsulated_under(outer.ecn()).ok_or(DropReason::Congestion)?;
        if len > inbox.pool.capacity() {
            return Err(DropReason::TooLong);
        }
        let mut packet = inbox.pool.take();
        packet.set_len(len);
        packet.data_mut().copy_from_slice(inner.bytes());
        if let Ok(mut copy) = IpView::new(packet.data_mut()) {
            copy.set_ecn(marked);
        }
        inbox.packets.push(packet);
        if let Some(peer) = self.peer_mut(slot) {
            peer.rx.count(len);
        }
        Ok(())
    }
}

fn is_tunnel<T: AsRef<[u8]>>(view: &IpView<T>) -> bool {
    matches!(view.protocol(), PROTO_IPV4 | PROTO_IPV6)
}
