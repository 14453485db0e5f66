//! Router advertisements for a guest with IPv6 addresses.
//!
//! They say who the router is, how long packets may be, who resolves names, and that
//! addresses come by DHCPv6. Nothing is on the link but us, so no prefix is either.
//!
//! A guest that speaks no DHCPv6, such as a kernel alone, has its address all the same
//! where it is the one that its card makes of the prefix (RFC 4862 §5.5.3, EUI-64): then,
//! and only then, the prefix is there for that.
//!
//! Sources: RFC 4861 §4.1, §4.2, §6.1.1, §6.2.6; RFC 4862 §5.5.3; RFC 8106 §5.1.

use std::net::Ipv6Addr;

use conet_netsys::MacAddr;
use conet_wire::ip;
use pnet_packet::icmpv6::ndp::RouterSolicitPacket;
use pnet_packet::icmpv6::{Icmpv6Code, Icmpv6Packet, Icmpv6Types, checksum};
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv6::Ipv6Packet;

use super::packet::{ipv6_header, link_local, with_interface};
use super::{ADVERT_INTERVAL, LEASE, Lease};
use crate::segment::{ANSWER_MAX, ETHERNET};

const ADVERT: u8 = 134;
/// Nodes of the link, and their Ethernet group (RFC 2464 §7).
const EVERYBODY: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const EVERYBODY_MAC: MacAddr = MacAddr([0x33, 0x33, 0, 0, 0, 1]);
/// Addresses, and the rest, are to be had by DHCPv6.
const MANAGED: u8 = 0x80;
const OTHER: u8 = 0x40;
/// A prefix that addresses may be made of, not on the link.
const AUTONOMOUS: u8 = 0x40;
/// Least MTU of IPv6 (RFC 8200 §5).
const LEAST_MTU: u16 = 1280;
/// Hops that the guest's packets begin with.
const HOPS: u8 = 64;

/// Who solicits, where a packet is a valid router solicitation.
pub(super) fn solicitation(packet: &[u8]) -> Option<Ipv6Addr> {
    let ip = Ipv6Packet::new(packet)?;
    let length = usize::from(ip.get_payload_length());
    let icmp = packet.get(ip::IPV6_HEADER..ip::IPV6_HEADER + length)?;
    let question = RouterSolicitPacket::new(icmp)?;
    let (from, to) = (ip.get_source(), ip.get_destination());
    let is_valid = ip.get_version() == 6
        && ip.get_next_header() == IpNextHeaderProtocols::Icmpv6
        && ip.get_hop_limit() == 255
        && question.get_icmpv6_type() == Icmpv6Types::RouterSolicit
        && question.get_icmpv6_code() == Icmpv6Code::new(0)
        && (from.is_unspecified() || from.is_unicast_link_local())
        && checksum(&Icmpv6Packet::new(icmp)?, &from, &to) == question.get_checksum();
    is_valid.then_some(from)
}

/// Writes the advertisement for who asks, or for all where that is nobody, the one card on
/// the link being `guest`; its length.
pub(super) fn write(
    lease: &Lease,
    ours: MacAddr,
    (asks, guest): (Ipv6Addr, MacAddr),
    frame: &mut [u8; ANSWER_MAX],
) -> Option<usize> {
    let seconds = |count: u64| u32::try_from(count).ok().map(u32::to_be_bytes);
    let lifetime = ADVERT_INTERVAL.as_secs().checked_mul(15)?;
    let mut icmp = vec![ADVERT, 0, 0, 0, HOPS, MANAGED | OTHER];
    icmp.extend(u16::try_from(lifetime).ok()?.to_be_bytes());
    // Times of reachability and of solicitations are the guest's own.
    icmp.extend([0; 8]);
    icmp.extend([1, 1]);
    icmp.extend(ours.0);
    if lease.mtu >= LEAST_MTU {
        icmp.extend([5, 1, 0, 0]);
        icmp.extend(u32::from(lease.mtu).to_be_bytes());
    }
    let made = |address: &Ipv6Addr| with_interface(*address, guest) == *address;
    for address in lease.v6().filter(made).take(1) {
        let mut prefix = address.octets();
        prefix[8..].fill(0);
        icmp.extend([3, 4, 64, AUTONOMOUS]);
        icmp.extend(seconds(2 * LEASE.as_secs())?);
        icmp.extend(seconds(LEASE.as_secs())?);
        icmp.extend([0; 4]);
        icmp.extend(prefix);
    }
    let resolvers: Vec<_> = lease.dns_v6().collect();
    if !resolvers.is_empty() {
        icmp.extend([25, 1 + 2 * u8::try_from(resolvers.len()).ok()?, 0, 0]);
        icmp.extend(seconds(lifetime)?);
        icmp.extend(resolvers.iter().flat_map(Ipv6Addr::octets));
    }
    let from = link_local(ours);
    let (to, mac) = if asks.is_unspecified() { (EVERYBODY, EVERYBODY_MAC) } else { (asks, guest) };
    let sum = checksum(&Icmpv6Packet::new(&icmp)?, &from, &to);
    icmp.get_mut(2..4)?.copy_from_slice(&sum.to_be_bytes());
    frame.get_mut(ETHERNET + ip::IPV6_HEADER..)?.get_mut(..icmp.len())?.copy_from_slice(&icmp);
    let header = (IpNextHeaderProtocols::Icmpv6, 255);
    ipv6_header([ours, mac], [from, to], header, icmp.len(), frame)
}
