//! The other end of a guest's Ethernet, without devices: frames in, verdicts out.
//!
//! On this segment there are two: the guest, and we, who answer ARP and neighbour
//! solicitations for every address that is not the guest's. So a guest reaches
//! everything through us, whichever netmask it has been given.
//!
//! A guest that asks what its network is, is told so by [`crate::services`].
//!
//! Left unanswered: questions about the guest's own addresses, and those of a sender
//! that has none yet (ARP probes, RFC 5227 §2.1.1; duplicate address detection,
//! RFC 4862 §5.4.3): who asks so wants to hear nothing.
//!
//! Invariants: no bytes panic; nothing is answered that does not come from the guest
//! as RFC 826 and RFC 4861 §7.1.1 have it; a packet passes only with a source that is
//! the guest's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use conet_dataplane::DropReason;
use conet_netsys::MacAddr;
use conet_wire::ip::{self, IpView};
use pnet_base::MacAddr as PnetMac;
use pnet_packet::Packet as _;
use pnet_packet::arp::{ArpHardwareTypes, ArpOperations, ArpPacket, MutableArpPacket};
use pnet_packet::ethernet::{EtherType, EtherTypes, EthernetPacket, MutableEthernetPacket};
use pnet_packet::icmpv6::ndp::{
    MutableNdpOptionPacket, MutableNeighborAdvertPacket, NdpOptionTypes, NeighborAdvertFlags,
    NeighborSolicitPacket,
};
use pnet_packet::icmpv6::{Icmpv6Code, Icmpv6Packet, Icmpv6Types, checksum};
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv6::{Ipv6Packet, MutableIpv6Packet};

use crate::services::{Lease, Services};

/// Our end of every guest's segment. Each has two stations only, so one address
/// serves all, and a guest keeps its neighbour entry through restarts. Locally
/// administered, `conet` in it.
pub(crate) const OURS: MacAddr = MacAddr([0x02, b'c', b'o', b'n', b'e', b't']);
/// An Ethernet header without a VLAN tag (IEEE 802.3).
pub(crate) const ETHERNET: usize = 14;
const ARP: usize = 28;
const IPV6: usize = 40;
/// A neighbour advertisement with one option (RFC 4861 §4.4).
const ADVERT: usize = 32;
/// Longest answer: of DHCP's, which are 576 bytes at most, and of DHCPv6's with as many
/// addresses as a guest is told.
pub(crate) const ANSWER_MAX: usize = 640;
const _: () = assert!(ETHERNET + IPV6 + ADVERT <= ANSWER_MAX);

/// What a frame of the guest's is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// An IP packet of so many bytes behind the Ethernet header, to be passed on.
    Packet(usize),
    /// A question; so many bytes of answer are to be sent back.
    Answer(usize),
    /// Nothing for us.
    Drop(DropReason),
}

/// The guest's Ethernet address, as it last said.
#[derive(Debug, Clone)]
struct Station(Arc<AtomicU64>);

impl Station {
    fn new(address: MacAddr) -> Self {
        Self(Arc::new(AtomicU64::new(Self::number(address))))
    }

    fn number(address: MacAddr) -> u64 {
        let [a, b, c, d, e, f] = address.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    fn set(&self, address: MacAddr) {
        // Written only where it is another: threads that read it share it.
        if self.0.load(Ordering::Relaxed) != Self::number(address) {
            self.0.store(Self::number(address), Ordering::Relaxed);
        }
    }

    fn get(&self) -> MacAddr {
        let [_, _, a, b, c, d, e, f] = self.0.load(Ordering::Relaxed).to_be_bytes();
        MacAddr([a, b, c, d, e, f])
    }
}

/// A guest's segment; what frames tell of the guest, all clones of it know.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    ours: MacAddr,
    guest: Station,
    addresses: Vec<IpAddr>,
    services: Option<Services>,
}

impl Segment {
    /// `guest` is its address to begin with; frames tell when it takes another.
    pub(crate) fn new(ours: MacAddr, guest: MacAddr, addresses: Vec<IpAddr>) -> Self {
        Self { ours, guest: Station::new(guest), addresses, services: None }
    }

    /// A guest that may ask what its network is.
    #[must_use]
    pub(crate) fn with_services(mut self, lease: Lease) -> Self {
        self.services = Some(Services::new(self.ours, lease));
        self
    }

    /// Writes what the guest is to hear every [`crate::services::ADVERT_INTERVAL`]; its
    /// length, none where there is nothing to say.
    pub(crate) fn advert(&self, answer: &mut [u8; ANSWER_MAX]) -> Option<usize> {
        self.services.as_ref()?.advert(self.guest.get(), answer)
    }

    /// Takes a frame from the guest.
    pub(crate) fn handle_frame(&mut self, frame: &[u8], answer: &mut [u8; ANSWER_MAX]) -> Verdict {
        let Some(ethernet) = EthernetPacket::new(frame) else {
            return Verdict::Drop(DropReason::Malformed);
        };
        let source = MacAddr(ethernet.get_source().octets());
        // Multicast bit: no station has such an address.
        if source.0[0] & 1 != 0 {
            return Verdict::Drop(DropReason::Malformed);
        }
        self.guest.set(source);
        let answered = match ethernet.get_ethertype() {
            EtherTypes::Arp => self.answer_arp(ethernet.payload(), answer),
            EtherTypes::Ipv4 => match self.serve(false, ethernet.payload(), answer) {
                Some(served) => return served,
                None => return self.judge(&ethernet, 0),
            },
            EtherTypes::Ipv6 => match solicitation(ethernet.payload()) {
                Some((from, target)) => self.answer_solicitation(from, target, answer),
                None => match self.serve(true, ethernet.payload(), answer) {
                    Some(served) => return served,
                    None => return self.judge(&ethernet, 0),
                },
            },
            _ => return Verdict::Drop(DropReason::Malformed),
        };
        answered.map_or(Verdict::Drop(DropReason::NotUnicast), Verdict::Answer)
    }

    /// Takes the head of a frame that is longer than any question: Ethernet's header and
    /// all of IP's are in it, and behind it there are so many bytes more.
    pub(crate) fn handle_head(&mut self, head: &[u8], more: usize) -> Verdict {
        let Some(ethernet) = EthernetPacket::new(head) else {
            return Verdict::Drop(DropReason::Malformed);
        };
        let source = MacAddr(ethernet.get_source().octets());
        if source.0[0] & 1 != 0 {
            return Verdict::Drop(DropReason::Malformed);
        }
        self.guest.set(source);
        match ethernet.get_ethertype() {
            EtherTypes::Ipv4 | EtherTypes::Ipv6 => self.judge(&ethernet, more),
            _ => Verdict::Drop(DropReason::Malformed),
        }
    }

    /// What a service says to a packet; none where it is for none.
    fn serve(&self, is_v6: bool, packet: &[u8], answer: &mut [u8; ANSWER_MAX]) -> Option<Verdict> {
        let services = self.services.as_ref()?;
        let served = match is_v6 {
            true => services.handle_v6(self.guest.get(), packet, answer),
            false => services.handle_v4(self.guest.get(), packet, answer),
        };
        served.map(|served| served.map_or_else(Verdict::Drop, Verdict::Answer))
    }

    /// Writes the header of a frame that carries an IP packet to the guest.
    pub(crate) fn address(&self, header: &mut [u8], is_v6: bool) {
        let kind = if is_v6 { EtherTypes::Ipv6 } else { EtherTypes::Ipv4 };
        self.head(header, kind);
    }

    fn head(&self, frame: &mut [u8], kind: EtherType) {
        if let Some(mut ethernet) = MutableEthernetPacket::new(frame) {
            ethernet.set_destination(PnetMac::from(self.guest.get().0));
            ethernet.set_source(PnetMac::from(self.ours.0));
            ethernet.set_ethertype(kind);
        }
    }

    /// Whether a packet may pass, of which so many bytes more are elsewhere.
    fn judge(&self, ethernet: &EthernetPacket<'_>, more: usize) -> Verdict {
        if ethernet.get_destination().octets() != self.ours.0 {
            return Verdict::Drop(DropReason::NotUnicast);
        }
        let payload = ethernet.payload();
        // What a link pads a short packet with is behind its stated length.
        let stated = ip::stated_length(payload).ok();
        let Some(stated) = stated.filter(|stated| *stated <= payload.len() + more) else {
            return Verdict::Drop(DropReason::Malformed);
        };
        let Some(Ok(view)) = payload.get(..stated.min(payload.len())).map(IpView::quoted) else {
            return Verdict::Drop(DropReason::Malformed);
        };
        let is_v6 = ethernet.get_ethertype() == EtherTypes::Ipv6;
        if view.is_v6() != is_v6 {
            Verdict::Drop(DropReason::Malformed)
        } else if !ip::is_unicast(view.source()) || !ip::is_unicast(view.destination()) {
            Verdict::Drop(DropReason::NotUnicast)
        } else if !self.addresses.contains(&view.source()) {
            Verdict::Drop(DropReason::SourceNotAllowed)
        } else {
            Verdict::Packet(stated)
        }
    }

    /// RFC 826.
    fn answer_arp(&self, question: &[u8], answer: &mut [u8; ANSWER_MAX]) -> Option<usize> {
        let arp = ArpPacket::new(question)?;
        let (asks, asked) = (arp.get_sender_proto_addr(), arp.get_target_proto_addr());
        let is_question = arp.get_hardware_type() == ArpHardwareTypes::Ethernet
            && arp.get_protocol_type() == EtherTypes::Ipv4
            && arp.get_hw_addr_len() == 6
            && arp.get_proto_addr_len() == 4
            && arp.get_operation() == ArpOperations::Request;
        let is_ours = !asks.is_unspecified()
            && ip::is_unicast(IpAddr::V4(asked))
            && !self.addresses.contains(&IpAddr::V4(asked));
        if !is_question || !is_ours {
            return None;
        }
        self.head(answer, EtherTypes::Arp);
        self.write_arp(answer.get_mut(ETHERNET..)?, asked, asks)?;
        Some(ETHERNET + ARP)
    }

    fn write_arp(&self, bytes: &mut [u8], asked: Ipv4Addr, asks: Ipv4Addr) -> Option<()> {
        let mut reply = MutableArpPacket::new(bytes)?;
        reply.set_hardware_type(ArpHardwareTypes::Ethernet);
        reply.set_protocol_type(EtherTypes::Ipv4);
        reply.set_hw_addr_len(6);
        reply.set_proto_addr_len(4);
        reply.set_operation(ArpOperations::Reply);
        reply.set_sender_hw_addr(PnetMac::from(self.ours.0));
        reply.set_sender_proto_addr(asked);
        reply.set_target_hw_addr(PnetMac::from(self.guest.get().0));
        reply.set_target_proto_addr(asks);
        Some(())
    }

    /// RFC 4861 §7.2.4: a solicited advertisement, of a router.
    fn answer_solicitation(
        &self,
        asks: Ipv6Addr,
        asked: Ipv6Addr,
        answer: &mut [u8; ANSWER_MAX],
    ) -> Option<usize> {
        let is_ours = !asks.is_unspecified()
            && !asked.is_multicast()
            && !asked.is_unspecified()
            && !self.addresses.contains(&IpAddr::V6(asked));
        if !is_ours {
            return None;
        }
        self.head(answer, EtherTypes::Ipv6);
        let packet = answer.get_mut(ETHERNET..ETHERNET + IPV6 + ADVERT)?;
        let (header, advert) = packet.split_at_mut(IPV6);
        let mut ip = MutableIpv6Packet::new(header)?;
        ip.set_version(6);
        ip.set_traffic_class(0);
        ip.set_flow_label(0);
        ip.set_payload_length(u16::try_from(ADVERT).ok()?);
        ip.set_next_header(IpNextHeaderProtocols::Icmpv6);
        ip.set_hop_limit(255);
        ip.set_source(asked);
        ip.set_destination(asks);
        advert.fill(0);
        let mut reply = MutableNeighborAdvertPacket::new(advert)?;
        reply.set_icmpv6_type(Icmpv6Types::NeighborAdvert);
        reply.set_icmpv6_code(Icmpv6Code::new(0));
        let flags = NeighborAdvertFlags::Router
            | NeighborAdvertFlags::Solicited
            | NeighborAdvertFlags::Override;
        reply.set_flags(flags);
        reply.set_target_addr(asked);
        let mut option = MutableNdpOptionPacket::new(reply.get_options_raw_mut())?;
        option.set_option_type(NdpOptionTypes::TargetLLAddr);
        option.set_length(1);
        option.set_data(&self.ours.0);
        let sum = checksum(&Icmpv6Packet::new(advert)?, &asked, &asks);
        MutableNeighborAdvertPacket::new(advert)?.set_checksum(sum);
        Some(ETHERNET + IPV6 + ADVERT)
    }
}

/// Who solicits, and for whom, where a packet is a valid neighbour solicitation
/// (RFC 4861 §7.1.1).
fn solicitation(packet: &[u8]) -> Option<(Ipv6Addr, Ipv6Addr)> {
    let ip = Ipv6Packet::new(packet)?;
    let length = usize::from(ip.get_payload_length());
    let icmp = packet.get(IPV6..IPV6 + length)?;
    let question = NeighborSolicitPacket::new(icmp)?;
    let (from, to) = (ip.get_source(), ip.get_destination());
    let is_valid = ip.get_version() == 6
        && ip.get_next_header() == IpNextHeaderProtocols::Icmpv6
        && ip.get_hop_limit() == 255
        && question.get_icmpv6_type() == Icmpv6Types::NeighborSolicit
        && question.get_icmpv6_code() == Icmpv6Code::new(0)
        && checksum(&Icmpv6Packet::new(icmp)?, &from, &to) == question.get_checksum();
    is_valid.then(|| (from, question.get_target_addr()))
}

#[cfg(test)]
mod tests;
