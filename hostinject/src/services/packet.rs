//! Datagrams out of packets and into frames.
//!
//! Sources: RFC 768, RFC 791, RFC 8200.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use conet_netsys::MacAddr;
use conet_wire::ip::{self, IpView};
use pnet_base::MacAddr as PnetMac;
use pnet_packet::ethernet::{EtherType, EtherTypes, MutableEthernetPacket};
use pnet_packet::ip::{IpNextHeaderProtocol, IpNextHeaderProtocols};
use pnet_packet::ipv4::{self, Ipv4Flags, MutableIpv4Packet};
use pnet_packet::ipv6::MutableIpv6Packet;
use pnet_packet::udp::{self, MutableUdpPacket, UdpPacket};

use super::{DHCP, DHCP_CLIENT, DHCP6, DHCP6_CLIENT};
use crate::segment::ETHERNET;

const UDP: usize = 8;
/// Headers before a payload.
pub(super) const IPV4_UDP: usize = ip::IPV4_HEADER + UDP;
pub(super) const IPV6_UDP: usize = ip::IPV6_HEADER + UDP;
/// Offset of the protocol in either header.
const PROTOCOL_V4: usize = 9;
const PROTOCOL_V6: usize = 6;
const IS_UDP: u8 = 17;

/// A datagram of UDP, whole.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Datagram<'a> {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) payload: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// The one in a packet, if it is for this port.
    pub(super) fn of_v4(packet: &'a [u8], port: u16) -> Option<Self> {
        // One look for all that is something else.
        if packet.get(PROTOCOL_V4) != Some(&IS_UDP) {
            return None;
        }
        Self::of(packet, port).filter(|datagram| datagram.to.is_ipv4())
    }

    /// The same of IPv6; behind extension headers none is looked for.
    pub(super) fn of_v6(packet: &'a [u8], port: u16) -> Option<Self> {
        if packet.get(PROTOCOL_V6) != Some(&IS_UDP) {
            return None;
        }
        Self::of(packet, port).filter(|datagram| datagram.to.is_ipv6())
    }

    fn of(packet: &'a [u8], port: u16) -> Option<Self> {
        let packet = packet.get(..ip::packet_length(packet).ok()?)?;
        let view = IpView::new(packet).ok()?;
        if view.is_fragment() || view.protocol() != IS_UDP {
            return None;
        }
        let bytes = packet.get(view.header_len()..)?;
        let udp = UdpPacket::new(bytes)?;
        if udp.get_destination() != port {
            return None;
        }
        let payload = bytes.get(UDP..usize::from(udp.get_length()))?;
        Some(Self { from: view.source(), to: view.destination(), payload })
    }
}

/// The address that an Ethernet card has by itself on its link (RFC 4291 §2.5.6).
pub(super) fn link_local(mac: MacAddr) -> Ipv6Addr {
    let prefix = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0);
    with_interface(prefix, mac)
}

/// A prefix of 64 bits with a card's interface identifier (RFC 4291 appendix A).
pub(super) fn with_interface(prefix: Ipv6Addr, mac: MacAddr) -> Ipv6Addr {
    let mut octets = prefix.octets();
    let [a, b, c, d, e, f] = mac.0;
    octets[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    octets.into()
}

/// Puts headers before the payload of `len` bytes that lies in a frame already; its length.
pub(super) fn put_v4(
    macs: [MacAddr; 2],
    [from, to]: [Ipv4Addr; 2],
    len: usize,
    frame: &mut [u8],
) -> Option<usize> {
    ethernet(macs, EtherTypes::Ipv4, frame)?;
    let packet = frame.get_mut(ETHERNET..ETHERNET + IPV4_UDP + len)?;
    let total = u16::try_from(packet.len()).ok()?;
    let (header, datagram) = packet.split_at_mut(ip::IPV4_HEADER);
    udp_header([DHCP, DHCP_CLIENT], datagram)?;
    let sum = udp::ipv4_checksum(&UdpPacket::new(datagram)?, &from, &to);
    MutableUdpPacket::new(datagram)?.set_checksum(sum);
    header.fill(0);
    let mut ip = MutableIpv4Packet::new(header)?;
    ip.set_version(4);
    ip.set_header_length(5);
    ip.set_total_length(total);
    ip.set_flags(Ipv4Flags::DontFragment);
    ip.set_ttl(64);
    ip.set_next_level_protocol(IpNextHeaderProtocols::Udp);
    ip.set_source(from);
    ip.set_destination(to);
    let sum = ipv4::checksum(&ip.to_immutable());
    ip.set_checksum(sum);
    Some(ETHERNET + IPV4_UDP + len)
}

/// The same for IPv6.
pub(super) fn put_v6(
    macs: [MacAddr; 2],
    [from, to]: [Ipv6Addr; 2],
    len: usize,
    frame: &mut [u8],
) -> Option<usize> {
    let datagram = frame.get_mut(ETHERNET + ip::IPV6_HEADER..ETHERNET + IPV6_UDP + len)?;
    udp_header([DHCP6, DHCP6_CLIENT], datagram)?;
    let sum = udp::ipv6_checksum(&UdpPacket::new(datagram)?, &from, &to);
    MutableUdpPacket::new(datagram)?.set_checksum(sum);
    let hops = 64;
    ipv6_header(macs, [from, to], (IpNextHeaderProtocols::Udp, hops), UDP + len, frame)
}

/// Puts Ethernet's and IPv6's header before `len` bytes; the frame's length.
pub(super) fn ipv6_header(
    macs: [MacAddr; 2],
    [from, to]: [Ipv6Addr; 2],
    (protocol, hops): (IpNextHeaderProtocol, u8),
    len: usize,
    frame: &mut [u8],
) -> Option<usize> {
    ethernet(macs, EtherTypes::Ipv6, frame)?;
    let header = frame.get_mut(ETHERNET..ETHERNET + ip::IPV6_HEADER)?;
    header.fill(0);
    let mut ip = MutableIpv6Packet::new(header)?;
    ip.set_version(6);
    ip.set_payload_length(u16::try_from(len).ok()?);
    ip.set_next_header(protocol);
    ip.set_hop_limit(hops);
    ip.set_source(from);
    ip.set_destination(to);
    Some(ETHERNET + ip::IPV6_HEADER + len)
}

fn udp_header([from, to]: [u16; 2], datagram: &mut [u8]) -> Option<()> {
    let len = u16::try_from(datagram.len()).ok()?;
    let mut udp = MutableUdpPacket::new(datagram)?;
    udp.set_source(from);
    udp.set_destination(to);
    udp.set_length(len);
    udp.set_checksum(0);
    Some(())
}

fn ethernet([from, to]: [MacAddr; 2], kind: EtherType, frame: &mut [u8]) -> Option<()> {
    let mut ethernet = MutableEthernetPacket::new(frame)?;
    ethernet.set_source(PnetMac::from(from.0));
    ethernet.set_destination(PnetMac::from(to.0));
    ethernet.set_ethertype(kind);
    Some(())
}
