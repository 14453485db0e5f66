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
use conet_wire::ip::{
    self, Ecn, IPV4_HEADER, IcmpError, IpView, OuterV4, PROTO_ICMP, PROTO_IPV4, PROTO_IPV6,
    packet_length,
};

use super::outbox::Way;
use super::peer::{LEAST_PATH_MTU, LEAST_V6_MTU, Peer};
use super::routes::Slot;
use super::{Core, Destination, Outbox, Replies};
use crate::{Inner, Mode, Outgoing};

/// Types and codes of ICMP (RFC 792, RFC 1191).
const DESTINATION_UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
const TIME_EXCEEDED: u8 = 11;

/// Hops of an outer packet (RFC 2003 §3.1 asks for the default; RFC 1700: 64).
const OUTER_TTL: u8 = 64;

/// Puts an outer header before each packet, in the outbox.
pub(crate) fn over_ip(
    peer: &mut Peer,
    packet: &Outgoing<'_>,
    may_fragment: bool,
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
        dont_fragment: view.dont_fragment() && !may_fragment,
        total_len: 0,
    };
    let way = Way { may_fragment, ..Way::new(Destination::Ip(destination), Ecn::NotEct) };
    for index in 0..packet.count() {
        let len = packet.len_of(index);
        let total = IPV4_HEADER + len;
        header.total_len = u16::try_from(total).map_err(|_| DropReason::TooLong)?;
        let space = out.reserve(way, total, total);
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
    may_fragment: bool,
    out: &mut Outbox,
) -> Result<(), DropReason> {
    let endpoint = peer.endpoint.ok_or(DropReason::NoEndpoint)?;
    let view = packet.view();
    if is_tunnel(view) {
        return Err(DropReason::Nested);
    }
    let way = Way { may_fragment, ..Way::new(Destination::Udp(endpoint), view.ecn()) };
    for index in 0..packet.count() {
        let len = packet.len_of(index);
        packet.write(index, out.reserve(way, len, len));
        out.commit(len);
        peer.tx.count(1, len);
    }
    Ok(())
}

impl Core {
    /// An IPv4 packet of protocol 4 or 41 from the network, with its header. Gives
    /// where the packet inside is, if it may go to the device. An error of ICMP about
    /// such a packet of ours is told to its sender in `back`.
    pub fn handle_ip(&mut self, datagram: &mut [u8], back: &mut Replies) -> Option<Inner> {
        if let Some(error) = IcmpView::of(datagram) {
            self.relay(&error, back);
            return None;
        }
        // The socket for errors hears those of others, too.
        if IpView::new(&*datagram).is_ok_and(|view| view.protocol() == PROTO_ICMP) {
            return None;
        }
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

    /// Tells the sender of the packet inside what became of the packet outside
    /// (RFC 2003 §4): only about what may have come through here to a peer. Redirects
    /// and whatever is said about the outer header alone are ours to ignore.
    fn relay(&mut self, error: &IcmpView<'_>, back: &mut Replies) {
        let &IcmpView { kind, code, mtu, outer, inner } = error;
        let IpAddr::V4(to) = outer.destination() else { return };
        let Some(&slot) = self.by_address.get(&to) else { return };
        if self.routes.owner(inner.destination()) != Some(slot) {
            return self.drop_from(slot, DropReason::BadError);
        }
        let overhead = Mode::IpIp.overhead(false);
        let what = match (kind, code) {
            (DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED) => {
                let fits = mtu.max(LEAST_PATH_MTU) - overhead;
                IcmpError::TooBig(if inner.is_v6() { fits.max(LEAST_V6_MTU) } else { fits })
            }
            (DESTINATION_UNREACHABLE | TIME_EXCEEDED, _) => IcmpError::Unreachable,
            _ => return,
        };
        let from = self.own.error_source(&inner);
        back.push(|space| ip::error(&inner, from, what, space));
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
        let Some(slot) = found.or_else(|| self.at_host(from.ip())) else {
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

    fn find_sender(&self, datagram: &[u8]) -> Result<Slot, DropReason> {
        let outer = IpView::new(datagram).map_err(|_| DropReason::Malformed)?;
        let IpAddr::V4(source) = outer.source() else { return Err(DropReason::Malformed) };
        let found = self.by_address.get(&source).copied();
        let other = || self.at_host(IpAddr::V4(source));
        found.or_else(other).ok_or(DropReason::UnknownPeer)
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
        let segment = if outer.dont_fragment() { identification(datagram) } else { 0 };
        let packet = &mut datagram[header..];
        match (protocol, packet.first().map(|first| first >> 4)) {
            (PROTO_IPV4, Some(4)) | (PROTO_IPV6, Some(6)) => {}
            _ => return Err(DropReason::Malformed),
        }
        let inner = self.unwrap_packet(slot, ecn, packet, false)?;
        let at = header + inner.at.start..header + inner.at.end;
        Ok(Inner { at, segment, ..inner })
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
        Ok(Inner { at: 0..len, trusted, segment: 0 })
    }
}

/// An error of ICMP that quotes a packet of a tunnel.
struct IcmpView<'a> {
    kind: u8,
    code: u8,
    mtu: u16,
    outer: IpView<&'a [u8]>,
    inner: IpView<&'a [u8]>,
}

impl<'a> IcmpView<'a> {
    /// None where it is something else, or quotes less than the inner header.
    fn of(datagram: &'a [u8]) -> Option<Self> {
        let view = IpView::new(datagram).ok().filter(|view| view.protocol() == PROTO_ICMP)?;
        let (head, quoted) = datagram[view.header_len()..].split_first_chunk::<8>()?;
        let outer =
            IpView::quoted(quoted).ok().filter(|outer| !outer.is_v6() && is_tunnel(outer))?;
        let inner = IpView::quoted(&quoted[outer.header_len()..]).ok()?;
        let mtu = u16::from_be_bytes([head[6], head[7]]);
        Some(Self { kind: head[0], code: head[1], mtu, outer, inner })
    }
}

/// Of an IPv4 header; `IpView` has found that there is one.
fn identification(datagram: &[u8]) -> u16 {
    datagram.get(4..6).map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}

fn is_tunnel<T: AsRef<[u8]>>(view: &IpView<T>) -> bool {
    matches!(view.protocol(), PROTO_IPV4 | PROTO_IPV6)
}
